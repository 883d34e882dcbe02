"""Normalisers: right ranges, exact inverses, constants that do not explode, streams equal to the whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.data import normalize as normalize_module
from robopolicy.data.episodes import Episodes
from robopolicy.data.normalize import Mode, Normalizer, Statistics
from robopolicy.errors import DataError
from robopolicy.features import Feature

MODES: list[Mode] = ["minmax", "meanstd", "quantile", "identity"]


def make_rows(seed: int, count: int = 400, size: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) * rng.uniform(1e-3, 500, size) + rng.uniform(-1000, 1000, size)


def test_each_mode_maps_to_its_range() -> None:
    rows = make_rows(0)
    x = torch.from_numpy(rows)
    y = Normalizer.fit(rows, "minmax").normalize(x)
    assert torch.allclose(y.amin(0), torch.tensor(-1.0, dtype=y.dtype), atol=1e-3)
    assert torch.allclose(y.amax(0), torch.tensor(1.0, dtype=y.dtype), atol=1e-3)
    y = Normalizer.fit(rows, "meanstd").normalize(x)
    assert torch.allclose(y.mean(0), torch.tensor(0.0, dtype=y.dtype), atol=1e-3)
    assert torch.allclose(y.std(0, correction=0), torch.tensor(1.0, dtype=y.dtype), atol=1e-3)
    y = Normalizer.fit(rows, "quantile").normalize(x)
    assert ((y.abs() <= 1.0001).double().mean(0) >= 0.97).all()
    assert y.abs().max() > 1.0
    assert torch.equal(Normalizer.fit(rows, "identity").normalize(x), x)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), mode=st.sampled_from(MODES))
def test_unnormalize_inverts_normalize(seed: int, mode: Mode) -> None:
    rows = make_rows(seed)
    normalizer = Normalizer.fit(rows, mode).double()
    x = torch.from_numpy(rows)
    assert torch.allclose(normalizer.unnormalize(normalizer.normalize(x)), x, rtol=1e-10, atol=1e-9)
    single = x.float()
    back = Normalizer.fit(rows, mode).unnormalize(Normalizer.fit(rows, mode).normalize(single))
    assert torch.allclose(back, single, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("mode", ["minmax", "meanstd", "quantile"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e-9, 512.0, 1e6])
def test_constant_entries_are_centred_and_do_not_explode(mode: Mode, value: float) -> None:
    rows = np.stack([np.full(50, value), np.linspace(0, 1, 50)], axis=1)
    normalizer = Normalizer.fit(rows, mode).double()
    x = torch.tensor([[value, 0.5], [value + 0.01, 0.5]], dtype=torch.float64)
    y = normalizer.normalize(x)
    assert abs(y[0, 0]) <= 1e-6 * max(1.0, abs(value))
    assert abs(y[1, 0]) <= 0.02 + 1e-6 * abs(value)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 400), max_size=6), mode=st.sampled_from(MODES))
def test_a_stream_of_blocks_gives_what_the_whole_gives(seed: int, cuts: list[int], mode: Mode) -> None:
    rows = make_rows(seed)
    streamed = Normalizer.fit(iter(np.split(rows, sorted(cuts))), mode)
    assert streamed.equal(Normalizer.fit(rows, mode), rtol=1e-5)


def test_streaming_statistics_are_those_of_numpy() -> None:
    rows = make_rows(1, 5000)
    stats = Statistics()
    for block in np.split(rows, [1, 17, 900, 901, 4000]):
        stats.update(block.reshape(1, *block.shape))
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, rows.std(0), rtol=1e-10)
    np.testing.assert_array_equal(stats.minimum, rows.min(0))
    np.testing.assert_allclose(stats.quantiles((0.01, 0.99)), np.quantile(rows, [0.01, 0.99], axis=0))


def test_quantiles_of_long_streams_come_from_a_uniform_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalize_module, "_SAMPLE", 2000)
    rows = np.linspace(0, 1, 100_000)[:, None]  # sorted: a sample of any one part would be far off
    stats = Statistics()
    for block in np.array_split(rows, 37):
        stats.update(block)
    low, high = stats.quantiles((0.1, 0.9))
    assert low[0] == pytest.approx(0.1, abs=0.03)
    assert high[0] == pytest.approx(0.9, abs=0.03)
    assert stats.count == 100_000


def test_features_of_any_shape_are_normalised_entry_by_entry() -> None:
    rows = make_rows(2, size=6)
    normalizer = Normalizer.fit(rows)
    x = torch.from_numpy(rows).float()
    flat = normalizer.normalize(x)
    assert torch.equal(normalizer.normalize(x.reshape(20, 20, 3, 2)), flat.reshape(20, 20, 3, 2))
    scalar = Normalizer.fit(rows[:, :1])
    assert torch.equal(scalar.normalize(x[:, 0]), scalar.normalize(x[:, :1])[:, 0])
    with pytest.raises(DataError, match="must hold 6"):
        normalizer.normalize(torch.zeros(4, 5))


def test_it_travels_in_the_state_dict_and_equal_notices_differences() -> None:
    rows = make_rows(3)
    fitted = Normalizer.fit(rows)
    copy = Normalizer(5)
    assert not copy.equal(fitted)
    copy.load_state_dict(fitted.state_dict())
    assert copy.equal(fitted)
    assert not copy.equal(Normalizer.fit(rows[:, :4]))
    copy.scale[0] *= 1.001
    assert not copy.equal(fitted)


def test_fitting_to_a_store_reads_every_step(tmp_path: Path) -> None:
    rows = make_rows(4, 9000, 3).astype(np.float32)
    with Episodes.create(tmp_path / "set.zarr", {"state": Feature("state", (3,))}) as episodes:
        for block in np.split(rows, [5000]):
            episodes.append({"state": block})
        assert Normalizer.fit_feature(episodes, "state").equal(Normalizer.fit(rows))


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="did you mean 'minmax'"):
        Normalizer(3, "minmaxx")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no data"):
        Normalizer.fit(np.zeros((0, 3)))
    with pytest.raises(DataError, match="NaN"):
        Normalizer.fit(np.array([[0.0, np.nan]]))
