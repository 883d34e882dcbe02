"""The start guard: ranges from normalisers, refusals that name the entry, and none where nothing is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopolicy.config import parse
from robopolicy.data.normalize import Mode, Normalizer
from robopolicy.deploy.export import export
from robopolicy.deploy.exported import ExportedPolicy
from robopolicy.deploy.guard import Range, StartGuard, trained_ranges
from robopolicy.features import Feature
from robopolicy.policy import Policy, PolicyConfig

JOINTS = Feature("joints", (2,), unit="rad", names=("shoulder", "elbow"))
PLACE = Feature("place", (2, 2), unit="m")
DATA = np.array([[-1.0, 2.0], [3.0, 4.0], [1.0, 3.0]])


def policy(mode: Mode = "minmax", data: np.ndarray = DATA) -> Policy:
    config = parse(PolicyConfig, {"horizon": 4, "n_action_steps": 2, "net": {"type": "mlp", "width": 8, "depth": 1}})
    normalizers = {
        "joints": Normalizer.fit(data, mode),
        "place": Normalizer.fit(np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])),
        "action": Normalizer(2),
    }
    return Policy(config, {"joints": JOINTS, "place": PLACE}, Feature("action", (2,)), normalizers)


def observation(joints: Any = (1.0, 3.0), place: Any = 0.5) -> dict[str, np.ndarray]:
    return {"joints": np.array(joints, np.float32), "place": np.full((2, 2), place, np.float32)}


def test_ranges_are_those_of_the_data() -> None:
    ranges = trained_ranges(policy())
    assert ranges["joints"].lower == pytest.approx([-1.0, 2.0], abs=1e-5)
    assert ranges["joints"].upper == pytest.approx([3.0, 4.0], abs=1e-5)


def test_within_the_range_and_its_margin_it_may_begin() -> None:
    guard = StartGuard.of(policy(), margin=0.5)
    assert guard(observation()) == ()
    assert guard(observation((-1.0, 4.0))) == ()
    assert guard(observation((-1.9, 4.4))) == ()  # half of the half ranges, 2 and 1


def test_a_refusal_names_the_joint_what_was_found_and_the_limit() -> None:
    guard = StartGuard.of(policy(), margin=0.5)
    assert [str(r) for r in guard(observation((1.0, 4.7)))] == ["start_unfamiliar joints elbow: 4.7, limit 4.5"]
    assert [str(r) for r in guard(observation((-2.5, 3.0)))] == ["start_unfamiliar joints shoulder: -2.5, limit -2"]
    assert [r.what for r in guard(observation((9.0, 9.0), place=7.0))] == [
        "joints shoulder", "joints elbow", "place[0]", "place[1]", "place[2]", "place[3]",
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    assert [r.what for r in StartGuard.of(policy())(observation((1.0, bad)))] == ["joints elbow"]


def test_what_is_missing_or_of_another_shape_is_refused() -> None:
    guard = StartGuard.of(policy())
    assert [r.kind for r in guard({"joints": np.zeros(3)})] == ["observation_shape", "observation_missing"]


def test_three_standard_deviations_are_the_range_of_a_standardised_observation() -> None:
    data = np.random.default_rng(0).normal([0.0, 10.0], [1.0, 0.1], (5000, 2))
    guard = StartGuard.of(policy("meanstd", data), margin=0.0)
    assert guard(observation((2.8, 10.2))) == ()
    assert [r.what for r in guard(observation((3.3, 9.6)))] == ["joints shoulder", "joints elbow"]


def test_an_observation_that_is_not_normalised_is_not_judged() -> None:
    guard = StartGuard.of(policy("identity"))
    assert guard.judges == ("place",)
    assert guard(observation((1e6, -1e6))) == ()


def test_a_joint_that_never_moved_may_be_a_unit_away_but_not_farther() -> None:
    guard = StartGuard.of(policy(data=np.array([[0.0, 2.0], [1.0, 2.0]])), margin=0.0)
    assert guard(observation((0.5, 2.9))) == ()
    assert [r.what for r in guard(observation((0.5, 3.1)))] == ["joints elbow"]


def test_an_export_refuses_as_its_checkpoint_does(tmp_path: Path) -> None:
    made = policy()
    exported = export(made.eval(), tmp_path / "export", "torchscript")
    for values in (observation(), observation((1.0, 9.0), place=7.0)):
        assert StartGuard.of(exported)(values) == StartGuard.of(made)(values)
    assert StartGuard.of(ExportedPolicy(tmp_path / "export")).judges == ("joints", "place")


def test_ranges_are_enough() -> None:
    guard = StartGuard({"joints": Range((0.0, 0.0), (1.0, 1.0))}, {"joints": JOINTS}, margin=0.0)
    assert [str(r) for r in guard({"joints": np.array([0.5, 2.0])})] == ["start_unfamiliar joints elbow: 2, limit 1"]
