"""Faults of streams: each does what it says, alone, and the same again with the same seed."""

import numpy as np
import pytest

from hardware.ros2.faults import NAMES, Channel, Faults, Reading
from robopolicy.config import parse
from robopolicy.errors import RobopolicyError

N = 400


def play(faults: Faults, n: int = N, period: float = 0.01, seed: int = 0, late: float = 1.0) -> list[tuple[float, Reading]]:
    """(time, reading) as they come out of a channel; reading k has stamp k and values k, k + 1, k + 2."""
    channel, found = Channel(seed), []
    channel.faults = faults
    for k in range(n):
        channel.push(k * period, Reading(k, np.arange(k, k + 3.0), ("a", "b", "c")))
        found += [(k * period, reading) for reading in channel.due(k * period)]
    return found + [(n * period + late, reading) for reading in channel.due(n * period + late)]


def stamps(found: list[tuple[float, Reading]]) -> list[int]:
    return [reading.stamp for _, reading in found]


def test_without_faults_everything_comes_as_it_is_at_once() -> None:
    found = play(Faults())
    assert stamps(found) == list(range(N))
    assert [time for time, _ in found] == [k * 0.01 for k in range(N)]
    assert all((reading.values == np.arange(reading.stamp, reading.stamp + 3)).all() for _, reading in found)


def test_drop_and_duplicate() -> None:
    assert play(Faults(drop=1.0)) == []
    kept = stamps(play(Faults(drop=0.5)))
    assert 0.4 * N < len(kept) < 0.6 * N
    assert kept == sorted(set(kept))
    twice = stamps(play(Faults(duplicate=1.0)))
    assert twice == [k for k in range(N) for _ in range(2)]


def test_delay_keeps_order_and_stamps() -> None:
    found = play(Faults(delay=0.3))
    assert stamps(found) == list(range(N))
    assert all(time >= reading.stamp * 0.01 + 0.3 - 1e-9 for time, reading in found)


def test_reorder_swaps_neighbours_and_loses_at_most_the_last() -> None:
    found = stamps(play(Faults(reorder=0.5)))
    assert len(found) >= N - 1
    assert sorted(found) == list(range(len(found)))
    assert found != sorted(found)
    assert all(abs(k - stamp) <= 1 for k, stamp in enumerate(found))


def test_nan_spoils_one_entry_and_pictures_become_noise() -> None:
    found = play(Faults(nan=1.0))
    assert all(np.isnan(reading.values).sum() == 1 for _, reading in found)
    channel = Channel(0)
    channel.faults = Faults(nan=1.0)
    channel.push(0.0, Reading(0, np.zeros(100, np.uint8), ("jpeg",)))
    (reading,) = channel.due(0.0)
    assert reading.values.dtype == np.uint8
    assert reading.values.any()


def test_freeze_repeats_the_last_reading_and_stuck_its_values_only() -> None:
    channel = Channel(0)
    out = []
    for k in range(30):
        channel.faults = Faults(freeze=10 <= k < 20, stuck=k >= 20)
        channel.push(k, Reading(k, np.array([float(k)]), ("a",)))
        out += [(reading.stamp, float(reading.values[0])) for reading in channel.due(k)]
    assert out[:10] == [(k, k) for k in range(10)]
    assert out[10:20] == [(9, 9.0)] * 10
    assert out[20:] == [(k, 19.0) for k in range(20, 30)]


def test_wrong_names_lengths_and_clocks() -> None:
    assert all(reading.names == ("not_a", "b", "c") for _, reading in play(Faults(wrong_names=1.0)))
    assert all(reading.values.shape == (2,) for _, reading in play(Faults(wrong_length=1.0)))
    assert stamps(play(Faults(clock_jump=-0.5))) == [k - 500_000_000 for k in range(N)]


def test_the_same_seed_gives_the_same_faults_and_each_fault_its_own_draws() -> None:
    faults = Faults(drop=0.3, duplicate=0.2, reorder=0.2, nan=0.1)
    assert stamps(play(faults)) == stamps(play(faults))
    assert stamps(play(faults)) != stamps(play(faults, seed=1))
    assert stamps(play(Faults(drop=0.3))) == stamps(play(Faults(drop=0.3, delay=0.05)))
    assert set(stamps(play(Faults(drop=0.3)))) == set(stamps(play(Faults(drop=0.3, duplicate=0.5))))


def test_counters_say_how_often() -> None:
    channel = Channel(0)
    channel.faults = Faults(drop=1.0, clock_jump=1.0)
    for k in range(5):
        channel.push(k, Reading(k, np.zeros(1), ("a",)))
    assert channel.counters == {"drop": 5, "clock_jump": 5}


def test_values_out_of_range_are_refused_and_every_name_is_a_fault() -> None:
    with pytest.raises(RobopolicyError, match="drop"):
        parse(Faults, {"drop": 1.5})
    assert set(NAMES) == set(Faults.model_fields)
