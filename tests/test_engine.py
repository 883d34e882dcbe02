"""Inference beside control: nobody waits, nothing old is carried out, nothing fails in silence."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from robots import Planned

from robopolicy.deploy.chunk import Chunk
from robopolicy.deploy.clock import FakeClock
from robopolicy.deploy.engine import Engine, EngineConfig, InlineEngine, Mailbox, rows_between
from robopolicy.deploy.latency import DelayEstimate, Log, Recorder

ROW = 0.05
OBS = {"pos": np.zeros((2, 2), np.float32)}


class Setup:
    """An engine on a fake clock, started."""

    def __init__(self, **config: object) -> None:
        self.clock, self.planner = FakeClock(100.0), Planned()
        self.engine = Engine(self.planner, ROW, self.clock, torch.Generator(), EngineConfig(**config))  # type: ignore[arg-type]
        self.engine.start(OBS)

    def post(self, previous: Chunk | None = None) -> None:
        self.engine.post(OBS, self.clock.now(), previous)

    def answer(self) -> Chunk | None:
        """The chunk of the last request, once inference is done."""
        until(lambda: not self.engine.busy)
        return self.engine.take()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen within 20 s"
        time.sleep(0.001)


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.planner.gate.set()
    made.engine.close()


def plan(rows: int = 16, index: int = 0, obs_time: float = 100.0) -> Chunk:
    return Chunk(np.zeros((rows, 2), np.float32), obs_time, ROW, obs_time, index)


def test_a_chunk_comes_with_its_times(setup: Setup) -> None:
    assert setup.engine.take() is None
    setup.planner.begun.clear()
    setup.planner.gate.clear()
    setup.post()
    setup.planner.begun.wait(20)
    setup.clock.time += 0.03
    setup.planner.gate.set()
    chunk = setup.answer()
    assert chunk is not None
    assert (chunk.obs_time, chunk.dt, chunk.index) == (100.0, ROW, 0)
    assert chunk.ready_time == pytest.approx(100.03)
    assert chunk.actions.shape == (16, 2)
    assert setup.engine.take() is None, "a chunk is taken once"
    assert setup.engine.latency.values == pytest.approx([0.03])


def test_warming_up_leaves_nothing_behind(setup: Setup) -> None:
    assert len(setup.planner.asked) == 3
    assert setup.planner.resets == 1
    assert setup.engine.take() is None
    assert setup.engine.latency.count == 0


def test_a_policy_that_does_not_work_is_found_before_the_loop() -> None:
    planner = Planned()
    planner.error = ValueError("no weights")
    engine = Engine(planner, ROW, FakeClock(), torch.Generator())
    with pytest.raises(ValueError, match="no weights"):
        engine.start(OBS)


def test_slow_inference_never_keeps_control_waiting(setup: Setup) -> None:
    setup.planner.gate.clear()
    slowest = 0.0
    for _ in range(2000):
        begin = time.perf_counter()
        setup.post(plan())
        assert setup.engine.take() is None
        assert setup.engine.busy
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 5.0  # the gate would keep it for 30 s
    assert len(setup.planner.asked) <= 4, "requests replace each other while inference is at work"
    setup.planner.gate.set()
    assert setup.answer() is not None


def test_the_newest_observation_wins(setup: Setup) -> None:
    setup.planner.begun.clear()
    setup.planner.gate.clear()
    setup.post()
    setup.planner.begun.wait(20)
    for k in range(5):
        setup.engine.post({"pos": np.full((2, 2), float(k))}, 100.0 + k, None)
    setup.planner.gate.set()
    chunk = setup.answer()
    assert chunk is not None
    assert chunk.obs_time == 104.0
    assert [float(obs["pos"].max()) for obs, *_ in setup.planner.asked[-2:]] == [0.0, 4.0]


def test_an_exception_reaches_control_and_ends_with_the_episode(setup: Setup) -> None:
    setup.planner.error = RuntimeError("CUDA is out of memory")
    setup.post()
    until(lambda: setup.engine.fault is not None)
    assert "out of memory" in str(setup.engine.fault)
    assert setup.answer() is None
    setup.planner.error = None
    setup.engine.reset()
    assert setup.engine.fault is None
    setup.post()
    assert setup.answer() is not None


def test_a_thread_that_is_gone_is_a_fault(setup: Setup) -> None:
    setup.engine._wake.put(False)
    until(lambda: setup.engine.fault is not None)
    assert "gone" in str(setup.engine.fault)


def test_a_reset_drops_what_is_on_its_way(setup: Setup) -> None:
    setup.planner.begun.clear()
    setup.planner.gate.clear()
    setup.post()
    setup.planner.begun.wait(20)  # inference of the old episode is at work
    setup.engine.reset()
    assert not setup.engine.busy
    setup.planner.gate.set()
    until(lambda: setup.engine._answers._slot)
    assert setup.engine.take() is None
    assert setup.engine.counters["stale"] == 1
    before = setup.planner.resets
    setup.post()
    chunk = setup.answer()
    assert chunk is not None
    assert setup.planner.resets == before + 1, "a planner with a memory must forget the old episode"


def test_an_old_fault_does_not_hold_a_new_episode(setup: Setup) -> None:
    setup.planner.begun.clear()
    setup.planner.gate.clear()
    setup.planner.error = RuntimeError("late")
    setup.post()
    setup.planner.begun.wait(20)
    setup.engine.reset()
    setup.planner.gate.set()
    until(lambda: setup.engine._fault is not None)
    assert setup.engine.fault is None


def test_the_planner_is_told_what_is_in_progress_and_how_much_of_it_will_be_over(setup: Setup) -> None:
    setup.engine._delay = DelayEstimate(initial=0.07)
    actions = np.arange(10, dtype=np.float32).reshape(5, 2)
    setup.post(Chunk(actions, 100.0, ROW, 100.0, 3))
    assert setup.answer() is not None
    _, previous, delay = setup.planner.asked[-1]
    assert delay == 2  # 70 ms and the margin are two rows of 50 ms
    assert previous.known.tolist() == [5]
    assert previous.actions.shape == (1, 16, 2)
    assert previous.actions[0, :5].tolist() == actions.tolist()
    setup.engine._delay = DelayEstimate(initial=9.0)
    setup.post(Chunk(actions, 100.0, ROW, 100.0, 3))
    assert setup.answer() is not None
    assert setup.planner.asked[-1][2] == 5, "no more can be over than is planned"


@pytest.mark.parametrize(("late", "kept"), [("use", True), ("discard", False)])
def test_a_chunk_that_comes_later_than_it_was_made_for(late: str, kept: bool) -> None:
    setup = Setup(late=late)
    setup.engine._delay = DelayEstimate(initial=0.04)
    setup.post(plan())
    until(lambda: not setup.engine.busy)
    setup.clock.time += 0.11  # one row was taken to be over, it is two now
    assert (setup.engine.take() is not None) == kept
    assert setup.engine.counters["late"] == 1
    assert setup.engine.counters["discarded"] == (not kept)
    setup.post(plan())
    until(lambda: not setup.engine.busy)
    setup.clock.time += 0.04
    assert setup.engine.take() is not None
    setup.post(plan())
    until(lambda: not setup.engine.busy)
    setup.clock.time += 0.81
    assert setup.engine.take() is None, "all of its rows are over"
    assert setup.engine.counters["useless"] == 1
    setup.engine.close()


def test_inline_inference_takes_the_time_that_it_is_told() -> None:
    clock, planner = FakeClock(10.0), Planned()
    engine = InlineEngine(planner, ROW, clock, torch.Generator(), delay=0.12)
    engine.start(OBS)
    engine.post(OBS, clock.now(), plan())
    assert planner.asked[-1][2] == 3
    clock.time = 10.119
    assert engine.take() is None
    assert engine.busy
    clock.time = 10.12
    chunk = engine.take()
    assert chunk is not None
    assert chunk.ready_time == pytest.approx(10.12)
    assert not engine.busy
    engine.post(OBS, clock.now(), plan())
    engine.reset()
    clock.time += 1.0
    assert engine.take() is None
    planner.error = ValueError("mad")
    engine.post(OBS, clock.now(), plan())
    assert isinstance(engine.fault, ValueError)


def test_mailboxes_keep_the_newest() -> None:
    box: Mailbox[int] = Mailbox()
    assert box.take() is None
    box.put(1)
    box.put(2)
    assert box.take() == 2
    assert box.take() is None


def test_the_delay_to_expect_is_the_longest_of_the_last_and_is_forgotten() -> None:
    delay = DelayEstimate(window=3, initial=0.5)
    assert delay.seconds == 0.5
    for value, expected in ((0.1, 0.1), (0.3, 0.3), (0.1, 0.3), (0.1, 0.3), (0.1, 0.1)):
        delay.add(value)
        assert delay.seconds == expected


@pytest.mark.parametrize(
    ("delay", "least", "rows", "expected"), [(0.0, 8, 16, 8), (0.1, 8, 16, 8), (0.5, 8, 16, 5), (0.9, 8, 16, 1), (0.02, 1, 16, 1)]
)
def test_the_next_plan_is_asked_for_before_this_one_runs_out(delay: float, least: int, rows: int, expected: int) -> None:
    assert rows_between(delay, least, rows, ROW) == expected


def test_records_go_round() -> None:
    recorder = Recorder(100)
    assert np.isnan(recorder.summary()["p50"])
    for value in range(1000):
        recorder.add(value)
    assert recorder.summary()["max"] == 999
    assert recorder.summary()["p50"] == 949
    assert recorder.summary()["n"] == 1000
    log = Log(5, {"time": 0, "action": 2})
    for k in range(8):
        row = log.next()
        row["time"], row["action"] = k, [k, -k]
    assert log.rows()["time"].tolist() == [3, 4, 5, 6, 7]
    assert log.rows()["action"][-1].tolist() == [7, -7]
