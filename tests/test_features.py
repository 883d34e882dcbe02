"""Feature declarations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robopolicy.errors import DataError
from robopolicy.features import DTYPES, Feature


@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    unit=st.sampled_from(["", "m", "rad"]),
    rate=st.none() | st.floats(0.1, 1e4),
)
def test_declarations_survive_json(shape: list[int], dtype: str, unit: str, rate: float | None) -> None:
    feature = Feature("x", tuple(shape), dtype, unit, (), rate)
    assert Feature.from_json("x", feature.to_json()) == feature


@pytest.mark.parametrize(
    "kwargs",
    [
        {"shape": (0,)},
        {"shape": (2,), "dtype": "complex64"},
        {"shape": (2,), "names": ("a",)},
        {"shape": (2,), "rate": 0.0},
        {"shape": (2,), "rate": float("nan")},
    ],
)
def test_impossible_declarations_are_refused(kwargs: dict) -> None:
    with pytest.raises(DataError, match="feature 'x'"):
        Feature("x", **kwargs)


@pytest.mark.parametrize(
    "value", [{}, {"shape": [2], "units": "m"}, {"shape": "ab"}, {"shape": 3}, {"shape": [2], "rate": "fast"}]
)
def test_foreign_json_is_refused(value: dict) -> None:
    with pytest.raises(DataError, match="feature 'x'"):
        Feature.from_json("x", value)


def test_images_are_uint8_with_one_or_three_channels() -> None:
    assert Feature("x", (9, 9, 3), "uint8").is_image
    assert not Feature("x", (9, 9, 3), "float32").is_image
    assert not Feature("x", (9, 9, 4), "uint8").is_image
