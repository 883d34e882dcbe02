"""Executors: rows are looked up by time, whenever chunks come and whenever they are asked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from robopolicy.deploy.chunk import Chunk
from robopolicy.deploy.executor import Ensemble, Executor, Latest, Receding, make_executor
from robopolicy.errors import ConfigError, EvaluationError

DT = 0.1
ALL = ["latest", "ensemble", {"type": "receding", "rows": 4}]


def chunk(index: int, start: int, rows: int = 8, offset: float = 0.0, delay: int = 0) -> Chunk:
    """Rows that say which tick they are for, plus ``offset``; observed at tick ``start``."""
    actions = np.stack([np.arange(start, start + rows) + offset, np.zeros(rows)], axis=1).astype(np.float32)
    return Chunk(actions, start * DT, DT, (start + delay) * DT, index)


def test_rows_are_found_by_time_at_any_rate_and_after_ten_hours() -> None:
    for begin in (0, 360_000):
        executor = Latest()
        executor.add(chunk(0, begin))
        for tick in range(begin, begin + 8):
            for share in (0.0, 0.3, 0.99):
                assert executor.action((tick + share) * DT).action[0] == tick
        assert executor.held == 0


def test_latest_swaps_at_arrival_drops_what_has_passed_and_measures_the_jump() -> None:
    executor = Latest()
    executor.add(chunk(0, 0))
    assert [executor.action(k * DT).action[0] for k in range(5)] == [0, 1, 2, 3, 4]
    executor.add(chunk(1, 2, offset=0.5, delay=3))
    command = executor.action(5 * DT)
    assert command.action[0] == 5.5
    assert command.chunk == 1
    assert command.age == pytest.approx(3 * DT)
    assert [switch.jump for switch in executor.switches] == [0.5]
    executor.add(chunk(0, 1))  # late: older than what is being carried out
    assert executor.action(6 * DT).action[0] == 6.5
    assert len(executor.switches) == 1


@pytest.mark.parametrize("setting", ALL, ids=str)
def test_beyond_the_plan_the_last_action_is_held_and_counted(setting: str | dict[str, object]) -> None:
    executor = make_executor(setting)
    with pytest.raises(EvaluationError, match="no chunk yet"):
        executor.action(0.0)
    assert executor.remaining(0.0) is None
    executor.add(chunk(0, 0, rows=4))
    commands = [executor.action(k * DT) for k in range(7)]
    assert [c.starved for c in commands] == [False] * 4 + [True] * 3
    assert [c.action[0] for c in commands] == [0, 1, 2, 3, 3, 3, 3]
    assert executor.held == 3
    executor.reset()
    assert executor.held == 0
    with pytest.raises(EvaluationError):
        executor.action(0.0)


def test_receding_starts_at_arrival_and_stops_after_its_rows() -> None:
    executor = Receding(Receding.Config(rows=3))
    executor.add(chunk(0, 0, delay=2))
    assert [executor.action(k * DT).action[0] for k in range(2, 7)] == [0, 1, 2, 2, 2]
    assert executor.held == 2
    assert executor.action(7 * DT).age == pytest.approx(7 * DT)


@pytest.mark.parametrize("m", [0.0, 0.01, 1.0, -1.0])
def test_ensembling_weighs_the_oldest_most(m: float) -> None:
    executor = Ensemble(Ensemble.Config(m=m))
    for index in range(3):
        executor.add(chunk(index, index, offset=float(index)))
    weights = np.exp(-m * np.arange(3))
    assert executor.action(4 * DT).action[0] == pytest.approx(4 + weights @ np.arange(3) / weights.sum())
    assert executor.action(8 * DT).action[0] == pytest.approx(8 + weights[:2] @ [1, 2] / weights[:2].sum())
    assert executor.action(9 * DT).action[0] == 11  # only the newest reaches it


def test_ensembling_forgets_chunks_that_are_over_and_measures_its_jump() -> None:
    executor = Ensemble(Ensemble.Config(m=0.0))
    executor.add(chunk(0, 0))
    executor.action(0.0)
    executor.add(chunk(1, 1, offset=1.0))
    executor.action(DT)
    assert executor.switches[-1].jump == pytest.approx(0.5)
    for index in range(2, 40):
        executor.add(chunk(index, index))
        executor.action(index * DT)
    assert len(executor._chunks) <= 8


@pytest.mark.parametrize("setting", ALL, ids=str)
def test_all_executors_agree_when_the_chunks_do(setting: str | dict[str, object]) -> None:
    """A deterministic policy in a world that stands still: plans of the same function of time."""
    executor, said = make_executor(setting), []
    for tick in range(20):
        if tick % 4 == 0:
            executor.add(chunk(tick // 4, tick))
        said.append(executor.action(tick * DT).action[0])
    assert said == list(range(20))
    if not isinstance(executor, Receding):  # its plans do not overlap: what counts there is the way from the action held
        assert [switch.jump for switch in executor.switches] == [0] * 4


@pytest.mark.parametrize("setting", ["latest", "ensemble"])
def test_what_remains_starts_at_now(setting: str) -> None:
    executor = make_executor(setting)
    executor.add(chunk(0, 0))
    left = executor.remaining(3.4 * DT)
    assert left is not None
    np.testing.assert_array_equal(left.actions[:, 0], [3, 4, 5, 6, 7])
    assert left.obs_time == pytest.approx(3 * DT)
    assert executor.remaining(8 * DT) is None


@pytest.mark.parametrize("setting", ["latest", "ensemble"])
@pytest.mark.parametrize("jitter", [-0.001, -1e-8, 0.0, 1e-8, 0.001])
def test_what_remains_starts_at_the_nearest_row(setting: str, jitter: float) -> None:
    """Observations come a little early or late; the new plan's row 0 must meet the old plan's row for that time."""
    executor = make_executor(setting)
    executor.add(chunk(0, 0))
    left = executor.remaining(4 * DT + jitter)
    assert left is not None
    assert left.actions[:, 0].tolist() == [4, 5, 6, 7]
    assert executor.remaining(7.9 * DT) is None, "the row that is nearest is not planned"


@pytest.mark.parametrize("setting", ["latest", "ensemble"])
def test_rows_around_now_for_interpolation(setting: str) -> None:
    executor = make_executor(setting)
    executor.add(chunk(0, 0))
    found = executor.rows(3.4 * DT)
    assert found is not None
    actions, start, dt = found
    assert actions[:, 0].tolist() == [2, 3, 4, 5]
    assert start == pytest.approx(2 * DT)
    assert dt == DT
    at_the_start, start, _ = executor.rows(0.0) or pytest.fail("nothing planned")
    assert at_the_start[:, 0].tolist() == [0, 1, 2]
    assert start == 0.0
    at_the_end, *_ = executor.rows(7.5 * DT) or pytest.fail("nothing planned")
    assert at_the_end[:, 0].tolist() == [6, 7]
    assert executor.rows(9 * DT) is None


def test_asking_does_not_change_anything() -> None:
    executor: Executor = Latest()
    executor.add(chunk(0, 0))
    executor.action(0.0)
    executor.add(chunk(1, 1, offset=2.0))
    executor.remaining(DT)
    executor.rows(DT)
    assert not executor.switches
    assert executor.action(DT).action[0] == 3
    assert math.isclose(executor.switches[0].jump, 2.0)


def test_an_unknown_executor_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="latest"):
        make_executor("lates")
    with pytest.raises(ConfigError, match="rows"):
        make_executor({"type": "receding", "row": 3})
