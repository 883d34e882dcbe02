"""Configuration: typed, strict, and its errors name the nearest valid key."""

from typing import Any, Self

import pydantic
import pytest
import yaml

from robopolicy.config import Config, apply_overrides, component, full, load_yaml, parse
from robopolicy.errors import ConfigError


class Inner(Config):
    width: int = 8
    rate: float | None = None


class Outer(Config):
    name: str
    inner: Inner = Inner()
    extra: Inner | None = None


class Thing:
    class Config(Config):
        size: int = 3


REGISTRY = {"thing": f"{__name__}:Thing"}


def test_a_full_config_survives_a_round_trip_through_yaml() -> None:
    config = parse(Outer, {"name": "a", "inner": {"width": 3}})
    assert parse(Outer, yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"nme": "a", "name": "b"}, "unknown key 'nme': did you mean 'name'?"),
        ({"name": "a", "inner": {"widht": 3}}, "unknown key 'inner.widht': did you mean 'width'?"),
        ({"name": "a", "extra": {"widht": 3}}, "unknown key 'extra.widht': did you mean 'width'?"),
        ({"name": "a", "inner": {"width": "wide"}}, "key 'inner.width'"),
        ({"name": "a", "inner": {"width": 2.5}}, "key 'inner.width'"),
        ({"name": "a", "inner": {"width": True}}, "key 'inner.width'"),
        ({"name": "a", "inner": {"width": "8"}}, "key 'inner.width'"),
        ({"name": "a", "inner": {"width": 8.0}}, "key 'inner.width'"),
        ({"name": "a", "inner": {"rate": "fast"}}, "key 'inner.rate'"),
        ({"name": "a", "inner": {"rate": float("nan")}}, "key 'inner.rate': Input should be a finite number"),
        ({"name": "a", "inner": {"rate": float("inf")}}, "key 'inner.rate': Input should be a finite number"),
        ({"name": "a", "inner": 3}, "key 'inner'"),
        ({}, "key 'name' is required"),
        ({"name": 3}, "key 'name'"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_key(value: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_parsed_as_yaml_and_leave_the_original_alone() -> None:
    original = {"a": {"b": 1}, "keep": [1]}
    assert apply_overrides(original, ["a.b=2.5", "a.c=[x, y]", "d.e=null"]) == {
        "a": {"b": 2.5, "c": ["x", "y"]},
        "keep": [1],
        "d": {"e": None},
    }
    assert original == {"a": {"b": 1}, "keep": [1]}


@pytest.mark.parametrize("override", ["a", "=3", "a.b.c=1", "a={", "keep.x=1"])
def test_a_malformed_override_is_an_error(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides({"a": {"b": 1}, "keep": [1]}, [override])


def test_small_exponents_without_a_point_are_numbers() -> None:
    # YAML 1.1 reads 3e-4 as a string; people write it all the time.
    assert parse(Inner, apply_overrides({}, ["rate=3e-4"])).rate == 3e-4


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text", "!!python/object/apply:os.system ['true']"])
def test_yaml_that_is_no_mapping_is_an_error(tmp_path: Any, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_yaml(path)


def test_an_absent_config_names_its_neighbour(tmp_path: Any) -> None:
    (tmp_path / "lift_flow.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"did you mean '.*lift_flow\.yaml'"):
        load_yaml(tmp_path / "lift_flwo.yaml")
    with pytest.raises(ConfigError, match=r"there is no YAML file in '.*nowhere'"):
        load_yaml(tmp_path / "nowhere" / "lift_flow.yaml")


def test_components_are_found_by_short_name_and_by_dotted_path() -> None:
    for name in ("thing", f"{__name__}:Thing"):
        cls, config = component("thing", {"type": name, "size": 5}, REGISTRY)
        assert cls is Thing
        assert full({"type": name}, config) == {"type": name, "size": 5}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "thnig"}, "did you mean 'thing'?"),
        ({"type": "thing", "siez": 1}, "unknown key 'siez': did you mean 'size'?"),
        ({"type": "no.module:X"}, "cannot be imported"),
        ({"type": "json:JSONDecoder"}, "no nested Config"),
        ({"size": 1}, "expected a mapping with a 'type'"),
        (3, "expected a mapping with a 'type'"),
    ],
)
def test_a_wrong_component_is_an_error(value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        component("thing", value, REGISTRY)
    assert expected in str(caught.value)


def test_an_unknown_component_is_answered_in_sentences() -> None:
    with pytest.raises(ConfigError, match=r"unknown net 'zzz': valid: dit, mlp\. Or give a dotted path"):
        component("net", "zzz", {"mlp": "a:B", "dit": "a:C"})
    with pytest.raises(ConfigError, match=r"unknown net 'mpl': did you mean 'mlp'\? Or give a dotted path"):
        component("net", "mpl", {"mlp": "a:B", "dit": "a:C"})


def test_keys_that_do_not_fit_together_are_named_by_the_message_alone() -> None:
    class Pair(Config):
        low: int = 0
        high: int = 1

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.low > self.high:
                raise ValueError("low is above high")
            return self

    with pytest.raises(ConfigError) as caught:
        parse(Pair, {"low": 2}, "pair.yaml")
    assert str(caught.value) == "pair.yaml: low is above high"
