"""The safety filter's limits: presets, what is refused in them, and how errors say to mend it."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from robopolicy.config import parse
from robopolicy.deploy.limits import SafetyLimits, load_limits
from robopolicy.deploy.safety import SafetyFilter
from robopolicy.errors import ConfigError
from sim.arm import model as arm


def test_the_preset_of_the_arm_has_the_limits_of_the_arm() -> None:
    found = load_limits("arm")
    joints = found.coordinates[:7]
    assert found.names[:7] == arm.JOINT_NAMES
    assert [c.lower for c in joints] == arm.LOWER.tolist()
    assert [c.upper for c in joints] == arm.UPPER.tolist()
    assert [c.velocity for c in joints] == arm.VELOCITY_LIMIT.tolist()
    assert found.coordinates[7].upper == arm.GRIPPER_MAX_WIDTH


def test_errors_say_how_to_mend_the_limits(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"no preset of safety limits 'amr': did you mean 'arm'"):
        load_limits("amr")
    document = "coordinates: [{name: a, lower: 0.0, upper: 0.1, velocity: 1.0, acceleration: 1.0, jerk: 1.0}]"
    (tmp_path / "x.yaml").write_text(document)
    with pytest.raises(ConfigError, match=r"'a': nothing is left between lower and upper"):
        load_limits(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="give them or drop the box"):
        SafetyFilter(load_limits("arm"))
    with pytest.raises(ConfigError, match=r"unknown key 'scale\.speed'"):
        load_limits("arm", scale={"speed": 0.5})


def every_limit() -> dict[str, Any]:
    """Limits of one coordinate in which no number is left out."""
    box = {"lower": [-1.0, -1.0, -1.0], "upper": [1.0, 1.0, 1.0], "table": 0.0}
    freshness = {"inputs": {"front": 0.5}, "deadman": 0.5}
    coordinate = {"name": "a", "lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0}
    made = parse(SafetyLimits, {"coordinates": [coordinate], "workspace": box, "freshness": freshness})
    return made.model_dump(mode="json")


def numbers(value: Any, *at: Any) -> Iterator[tuple[Any, ...]]:
    """Where numbers stand in a document; one that holds nothing somewhere would hide some."""
    if isinstance(value, dict | list):
        assert value
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(entry, *at, key)
    else:
        assert isinstance(value, str | float)
        if isinstance(value, float):
            yield at


@pytest.mark.parametrize("at", numbers(every_limit()), ids=lambda at: ".".join(map(str, at)))
def test_no_limit_is_nan_or_infinite(at: tuple[Any, ...], tmp_path: Path) -> None:
    """NaN answers every comparison with no, so a limit of NaN would be none."""
    for bad in (math.nan, math.inf, -math.inf):
        document = every_limit()
        place = functools.reduce(lambda part, key: part[key], at[:-1], document)
        place[at[-1]] = bad
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(document))
        with pytest.raises(ConfigError, match=at[-1] if isinstance(at[-1], str) else at[-2]):
            load_limits(tmp_path / "x.yaml")


def test_an_input_must_be_given_time() -> None:
    for limit in (0.0, -1.0):
        with pytest.raises(ConfigError, match=r"freshness\.inputs\.front"):
            parse(SafetyLimits, {**every_limit(), "freshness": {"inputs": {"front": limit}}})
