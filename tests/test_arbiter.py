"""The arbiter on a fake clock: who commands, what stops the arm, what it takes to go on; once in real time."""

import dataclasses
import gc
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robots import RATE, Planned, Point

from robopolicy.deploy.arbiter import Arbiter
from robopolicy.deploy.clock import Clock, FakeClock, SystemClock, Ticker
from robopolicy.deploy.engine import Engine, InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.home import HomeSource
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.requests import REQUESTS, Ticket, mend
from robopolicy.deploy.safety import Mode, Reason, SafetyFilter, Stamp
from robopolicy.deploy.sources import ControlConfig, PolicySource, Source
from robopolicy.deploy.status import Period
from robopolicy.errors import ConfigError
from robopolicy.robot import Sample, State

HZ = 100
AXIS = {"unit": "m", "lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0}
AXIS |= {"start": 0.5, "max_step": 0.5}  # it may set off at once
LIMITS = SafetyLimits.model_validate({"rate": HZ, "coordinates": [{"name": name, **AXIS} for name in "ab"]})
WITH_DEADMAN = LIMITS.model_copy(update={"freshness": LIMITS.freshness.model_copy(update={"deadman": 0.25})})


class Faulty(Point):
    """A point robot whose senses can be tampered with.

    Attributes:
        sense: Changes what is measured.
        camera: When its picture came, and was made; None: it has no camera.
        blind: What it observes is no number.
        stuck: Why what it observes is of no use.
        broken: Methods that raise.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.sense: Callable[[State], State] = lambda state: state
        self.camera: Stamp | None = None
        self.blind = False
        self.stuck: Reason | None = None
        self.broken: set[str] = set()

    def state(self) -> State:
        self._check("state")
        return self.sense(super().state())

    def observe(self) -> Sample:
        self._check("observe")
        sample = super().observe()
        values = {"pos": np.full(2, np.nan, np.float32)} if self.blind else sample.values
        return Sample(values, sample.time, {} if self.camera is None else {"camera": self.camera}, self.stuck)

    def targets(self, action: np.ndarray) -> np.ndarray:
        self._check("targets")
        return super().targets(action)

    def command(self, positions: np.ndarray) -> None:
        self._check("command")
        super().command(positions)

    def _check(self, method: str) -> None:
        if method in self.broken:
            raise OSError(f"bus: {method}")


class Cell:
    """The robot under an arbiter with a policy that wants to be at ``value``, and home at (-0.2, 0.2)."""

    def __init__(
        self, *, limits: SafetyLimits = LIMITS, threaded: bool = False, delay: float = 0.02, guard: Any = None, **config: Any
    ) -> None:
        self.clock, self.planner = FakeClock(50.0), Planned((0.4, 0.0))
        self.robot, self.safety = Faulty(self.clock), SafetyFilter(limits)
        shadow = config.pop("shadow", False)
        args = (self.planner, 1 / RATE, self.clock, torch.Generator())
        self.engine = Engine(*args) if threaded else InlineEngine(*args, delay=delay)
        settings = ControlConfig(**config)
        executor = make_executor("latest")
        self.policy = PolicySource(self.robot, self.engine, executor, limits, settings, guard=guard)
        self.policy.prepare()
        self.seen: list[Period] = []
        sources: list[Source] = [self.policy, HomeSource(np.array([-0.2, 0.2]), limits)]
        self.arbiter = Arbiter(self.robot, self.safety, self.clock, sources, settings, shadow=shadow, watch=self.seen.append)
        self.ticker = Ticker(self.clock, 1 / HZ)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * HZ)):
            self.arbiter.step(self.ticker.wait())

    def ask(self, name: str, **arguments: Any) -> tuple[bool, str]:
        ticket = self.arbiter.request(name, **arguments)
        assert ticket.answer is None
        self.run(1 / HZ)
        return ticket.wait(0.0)

    def started(self, seconds: float = 0.3) -> "Cell":
        """Under way: by default at almost half a metre a second."""
        if self.safety.limits.freshness.deadman is not None:
            self.arbiter.request("deadman", pressed=True)
        assert self.ask("start") == (True, "policy begins")
        self.run(seconds)
        assert self.mode == "running"
        return self

    @property
    def mode(self) -> str:
        return self.arbiter.status.mode

    @property
    def cause(self) -> str:
        return self.arbiter.status.cause

    @property
    def sent(self) -> np.ndarray:
        return np.array([position for _, position in self.robot.sent]).reshape(-1, 2)

    def speed(self) -> float:
        return float(np.abs(self.sent[-1] - self.sent[-2]).max()) * HZ

    def smooth(self) -> bool:
        """Whether all that was sent keeps the limits."""
        sent = self.sent
        return bool(
            np.abs(np.diff(sent, 1, axis=0)).max(initial=0.0) <= 1.0 / HZ * (1 + 1e-6)
            and np.abs(np.diff(sent, 2, axis=0)).max(initial=0.0) <= 5.0 / HZ**2 * (1 + 1e-6)
            and np.abs(np.diff(sent, 3, axis=0)).max(initial=0.0) <= 100.0 / HZ**3 * (1 + 1e-6)
        )


# ---- who commands ------------------------------------------------------------------------------------------------------------


def test_nothing_is_sent_before_it_is_started() -> None:
    cell = Cell()
    assert cell.mode == "idle"
    cell.run(0.2)
    for name in ("stop", "idle", "reset"):
        assert cell.ask(name)[0]
    cell.run(0.2)
    assert cell.robot.sent == []
    assert cell.arbiter.status.set_point is None
    cell.arbiter.end("done")
    assert cell.robot.sent == []
    assert cell.robot.stopped


def test_a_policy_commands_after_its_first_plan_and_its_rows_count_from_then() -> None:
    cell = Cell(delay=0.5)
    assert cell.ask("start") == (True, "policy begins")
    cell.run(0.4)
    assert cell.mode == "starting"
    assert len(cell.sent) == 41, "the arm is held while the plan is awaited"
    assert (cell.sent == 0.0).all()
    cell.run(0.2)
    assert cell.mode == "running"
    rows = cell.arbiter.log.rows()
    first = rows[rows["chunk"] >= 0][0]
    assert first["age"] == 0.0, "though inference took half a second"
    cell.run(1.5)
    assert cell.robot.at == pytest.approx([0.4, 0.0], abs=1e-3)
    assert cell.smooth()
    assert cell.cause == ""


def test_the_wait_for_a_first_plan_is_longer_than_holds_may_last_and_holds_no_thread_up() -> None:
    cell = Cell(threaded=True)
    cell.planner.gate.clear()
    cell.planner.begun.clear()
    assert cell.ask("start")[0]
    assert cell.planner.begun.wait(20)
    cell.run(2.0)  # auto_resume is 1 s
    assert cell.mode == "starting"
    cell.planner.gate.set()
    end = time.monotonic() + 20
    while cell.mode == "starting" and time.monotonic() < end:
        cell.run(1 / HZ)
        time.sleep(0.001)
    assert cell.mode == "running"
    cell.engine.close()


def test_what_ends_a_policy_keeps_sending_the_held_set_point() -> None:
    cell = Cell().started()
    assert cell.speed() > 0.1
    assert cell.ask("stop", why="lunch") == (True, "stops")
    assert cell.cause == "lunch"
    cell.run(1.0)
    count, held = len(cell.sent), cell.sent[-1]
    cell.run(0.5)
    assert len(cell.sent) == count + 50
    assert (cell.sent[count:] == held).all()
    assert (cell.mode, cell.arbiter.status.source) == ("stopped", "idle")
    assert cell.smooth()
    cell.started()
    assert cell.smooth(), "it goes on from where it was held"


def test_home_takes_over_from_a_policy_and_the_other_way_round() -> None:
    cell = Cell().started()
    assert cell.ask("home") == (True, "home begins")
    assert cell.mode == "running"
    cell.run(0.5)
    assert cell.ask("start") == (True, "policy begins")
    cell.run(1.0)
    assert cell.arbiter.status.source == "policy"
    cell.run(1.0)
    assert cell.robot.at == pytest.approx([0.4, 0.0], abs=1e-3)
    assert cell.ask("home")[0]
    cell.run(10.0)
    assert (cell.mode, cell.cause) == ("stopped", "home reached")
    assert cell.robot.at == pytest.approx([-0.2, 0.2], abs=1e-6)
    assert cell.smooth()


def test_requests_say_what_came_of_them() -> None:
    cell = Cell().started()
    assert cell.ask("start") == (False, "policy commands already")
    assert cell.ask("reset") == (False, "it runs; stop first")
    assert cell.ask("start", source="hom") == (False, "no source 'hom': did you mean 'home'?")
    with pytest.raises(ConfigError, match="did you mean 'estop'"):
        cell.arbiter.request("e-stop")
    assert cell.arbiter.status.request is not None
    assert cell.arbiter.status.request.name == "start"
    assert cell.ask("deadman") == (False, "KeyError: 'pressed'")
    assert cell.mode == "running", "a wrong request disturbs nothing"


def test_nothing_moves_for_a_request_that_came_long_ago() -> None:
    cell = Cell()
    tickets = [cell.arbiter.request(name) for name in ("start", "home", "reset")]
    cell.clock.time += 3.0  # nobody ran control meanwhile
    cell.run(0.5)
    assert [ticket.wait(0.0)[0] for ticket in tickets] == [False] * 3
    assert "too late" in tickets[0].wait(0.0)[1]
    assert cell.robot.sent == []


def test_a_control_thread_that_hangs_is_said() -> None:
    ok, message = Cell().arbiter.request("stop").wait(0.01)
    assert not ok
    assert "hangs or does not run" in message


# ---- starts that are refused -------------------------------------------------------------------------------------------------


def test_a_start_outside_the_limits_names_the_joint() -> None:
    cell = Cell()
    cell.robot.at[1] = 1.3
    assert cell.ask("start") == (False, "refused: start_outside b: 1.3, limit 1")
    assert cell.cause == "refused: start_outside b: 1.3, limit 1"
    cell.run(0.2)
    assert cell.robot.sent == []


def test_a_start_far_from_the_training_data_names_the_joint() -> None:
    cell = Cell(guard=lambda values: (Reason("start_unfamiliar", "pos a", 0.0, 0.1),))
    asked = len(cell.planner.asked)
    assert cell.ask("start") == (False, "refused: start_unfamiliar pos a: 0, limit 0.1")
    cell.run(0.2)
    assert cell.robot.sent == []
    assert len(cell.planner.asked) == asked


@pytest.mark.parametrize("fault", ["old", "never", "nan", "blind", "broken", "camera"])
def test_no_start_without_measurements(fault: str) -> None:
    cell = Cell()
    senses: dict[str, Callable[[State], State]] = {
        "old": lambda state: State(state.positions, Stamp(state.stamp.came - 0.2)),
        "never": lambda state: State(np.full(2, np.nan), Stamp(-np.inf)),
        "nan": lambda state: State(np.array([0.0, np.nan]), state.stamp),
    }
    cell.robot.sense = senses.get(fault, lambda state: state)
    cell.robot.blind, cell.robot.broken = fault == "blind", {"observe"} if fault == "broken" else set()
    cell.robot.camera = Stamp(cell.clock.now() - 0.4) if fault == "camera" else None
    ok, message = cell.ask("start")
    assert not ok
    said = {"old": "stale state: 0.2", "never": "state_not_finite a", "nan": "state_not_finite b", "camera": "stale camera: 0.4"}
    assert said.get(fault, "observ") in message
    cell.run(0.2)
    assert cell.robot.sent == []


def test_an_arm_that_was_moved_meanwhile_needs_a_reset_and_a_start() -> None:
    cell = Cell().started()
    cell.ask("stop")
    cell.run(0.5)
    cell.robot.sense = lambda state: State(state.positions + np.array([0.0, 0.3]), state.stamp)
    assert cell.ask("start") == (False, "refused: start_moved b: 0.3, limit 0.2")
    assert cell.ask("reset") == (True, "start begins where the arm is measured")
    assert cell.ask("start")[0]
    assert cell.sent[-1][1] == pytest.approx(0.3)


# ---- the emergency stop ------------------------------------------------------------------------------------------------------


def test_an_emergency_stop_latches_until_reset_and_start() -> None:
    cell = Cell().started()
    assert cell.ask("estop") == (True, "stops")
    assert cell.mode == "estopped"
    assert cell.ask("reset") == (False, "the arm still moves; wait until it stands")
    cell.run(1.0)
    held = cell.sent[-1]
    for name in ("start", "home"):
        assert cell.ask(name) == (False, "estopped: reset first, then start")
    assert cell.ask("stop")[0]
    cell.run(1.0)
    assert (cell.mode, cell.cause) == ("estopped", "estop asked")
    assert cell.ask("reset")[0]
    cell.run(1.0)
    assert cell.mode == "stopped", "a reset moves nothing"
    assert (cell.sent[-200:] == held).all()
    cell.started()
    assert cell.smooth()


def test_an_emergency_stop_before_the_first_start_latches_too() -> None:
    cell = Cell()
    assert cell.ask("estop", why="button")[0]
    assert cell.ask("start") == (False, "estopped: reset first, then start")
    assert cell.ask("reset")[0]
    cell.started()


def test_a_filter_that_was_stopped_before_stays_so() -> None:
    cell = Cell()
    cell.safety.estop("button")
    later = Arbiter(cell.robot, cell.safety, cell.clock)
    assert (later.status.mode, later.status.cause) == ("estopped", "estop button")


def test_an_emergency_stop_while_the_first_plan_is_awaited() -> None:
    cell = Cell(delay=0.5)
    assert cell.ask("start")[0]
    assert cell.ask("estop")[0]
    cell.run(1.0)
    assert cell.mode == "estopped"
    assert (cell.sent == 0.0).all()


# ---- faults ------------------------------------------------------------------------------------------------------------------

NAN: Callable[[State], State] = lambda state: State(np.array([np.nan, 0.0]), state.stamp)  # noqa: E731
OLD: Callable[[State], State] = lambda state: State(state.positions, Stamp(state.stamp.came - 0.2))  # noqa: E731
MADE_LONG_AGO: Callable[[State], State] = lambda state: State(state.positions, Stamp(state.stamp.came, state.stamp.came - 0.5))  # noqa: E731
NEVER: Callable[[State], State] = lambda state: State(state.positions, Stamp(-np.inf))  # noqa: E731
SHORT: Callable[[State], State] = lambda state: State(state.positions[:1], state.stamp)  # noqa: E731


@pytest.mark.parametrize(
    ("sense", "said"),
    [
        (NAN, "state_not_finite a"),
        (SHORT, "state_not_finite shape (1,)"),
        (OLD, "stale state: 0.2"),
        (MADE_LONG_AGO, "stale state: 0.5"),
        (NEVER, "stale state: inf"),
    ],
)
def test_a_bad_state_holds_within_one_period_and_a_short_one_is_got_over(sense: Callable[[State], State], said: str) -> None:
    cell = Cell().started()
    cell.robot.sense = sense
    cell.run(1 / HZ)
    assert cell.mode == "holding"
    assert said in cell.cause
    cell.run(0.5)
    assert cell.speed() == 0.0
    cell.robot.sense = lambda state: state
    cell.run(0.05)
    assert (cell.mode, cell.cause) == ("running", "")
    cell.robot.sense = sense
    cell.run(1.1)  # auto_resume is 1 s
    assert cell.mode == "stopped"
    assert said in cell.cause
    cell.robot.sense = lambda state: state
    cell.run(0.5)
    assert cell.mode == "stopped", "a long one needs a start"
    assert cell.smooth()


def test_a_state_that_freezes_while_the_arm_moves_stops_it() -> None:
    cell = Cell().started(0.1)
    frozen = cell.robot.state().positions
    cell.robot.sense = lambda state: State(frozen, state.stamp)
    cell.run(1.0)
    assert cell.mode == "stopped"
    assert "tracking a" in cell.cause
    assert np.abs(cell.sent[-1] - frozen).max() < 0.4, "0.2 and the way of the stop"
    assert cell.smooth()


def test_a_camera_that_freezes_holds_and_then_stops() -> None:
    cell = Cell()
    cell.robot.camera = Stamp(cell.clock.now())
    assert cell.ask("start")[0]
    for _ in range(30):
        cell.robot.camera = Stamp(cell.clock.now())
        cell.run(1 / HZ)
    assert cell.mode == "running"
    assert cell.arbiter.status.ages["camera"] < 0.1
    cell.run(0.4)
    assert cell.mode == "holding"
    assert "stale camera" in cell.cause
    cell.run(1.1)
    assert cell.mode == "stopped"
    assert "stale camera" in cell.cause
    assert cell.ask("home")[0]
    cell.run(0.5)
    assert cell.mode == "running", "the way home needs no camera"


def test_an_observation_that_is_no_number_holds_and_reaches_no_network() -> None:
    cell = Cell().started()
    cell.robot.blind = True
    cell.run(0.1)  # two observations
    assert (cell.mode, cell.cause) == ("holding", "observation_not_finite pos")
    cell.robot.blind = False
    cell.run(0.1)
    assert cell.mode == "running"
    assert all(np.isfinite(obs["pos"]).all() for obs, *_ in cell.planner.asked)
    cell.robot.blind = True
    cell.run(1.2)
    assert cell.mode == "stopped"


def test_an_observation_that_the_robot_calls_unusable_holds_and_then_stops_and_says_why() -> None:
    """A camera that repeats its picture has new stamps: only the robot has seen it."""
    cell, stuck = Cell().started(), Reason("stuck", "front", 1.04, 1.0)
    cell.robot.stuck = stuck
    asked = len(cell.planner.asked)
    cell.run(0.1)
    assert (cell.mode, cell.cause) == ("holding", "stuck front: 1.04, limit 1")
    cell.run(1.2)
    assert (cell.mode, cell.cause) == ("stopped", "stuck front: 1.04, limit 1")
    assert len(cell.planner.asked) <= asked + 1
    assert cell.ask("start") == (False, "refused: stuck front: 1.04, limit 1")
    cell.robot.stuck = None
    assert cell.ask("start")[0]


@pytest.mark.parametrize("what", ["state", "camera"])
def test_no_start_by_a_clock_that_is_ahead_and_no_stop_either(what: str) -> None:
    cell = Cell()
    offset = 0.52

    def stamp() -> Stamp:
        return Stamp(cell.clock.now(), cell.clock.now() + offset)

    def sense() -> None:
        if what == "state":
            cell.robot.sense = lambda state: State(state.positions, stamp())
        else:
            cell.robot.camera = stamp()

    sense()
    ok, message = cell.ask("start")
    assert not ok
    assert message == f"refused: clock_ahead {what}: 0.52, limit {0.15 if what == 'state' else 0.3:g}"
    assert "run chrony" in mend(message)
    assert cell.robot.sent == []
    if what == "state":
        assert cell.ask("home")[1] == message
    offset = 0.1
    sense()
    assert cell.ask("start")[0]
    for k in range(40):
        offset = 0.1 if k < 10 else 0.52  # while it runs: arrival still tells
        sense()
        cell.run(1 / HZ)
    assert cell.mode == "running"
    assert cell.safety.counters["clock_skew"] > 0


def test_what_ends_inference_stops_the_arm_at_once_and_is_said() -> None:
    cell = Cell(replan=2).started()
    cell.planner.error = RuntimeError("out of memory")
    cell.run(0.15)
    assert cell.mode == "stopped"
    assert cell.cause == "inference RuntimeError('out of memory')"
    cell.run(0.5)
    assert cell.speed() == 0.0
    assert cell.ask("start")[0], "it is tried again"
    cell.run(0.1)
    assert cell.mode == "stopped"
    assert "out of memory" in cell.cause
    cell.planner.error = None
    cell.started()


def test_the_death_of_the_inference_process_stops_the_arm_before_the_next_plan_is_asked_for() -> None:
    cell = Cell().started()
    asked = len(cell.planner.asked)
    cell.planner.fault = RuntimeError("killed by signal 9")  # type: ignore[attr-defined]  # as of a ProcessPlanner
    cell.run(1 / HZ)
    assert cell.mode == "stopped"
    assert "signal 9" in cell.cause
    assert len(cell.planner.asked) == asked
    ok, message = cell.ask("start")
    assert not ok
    assert "signal 9" in message


def test_inference_that_hangs_stops_the_arm() -> None:
    cell = Cell(threaded=True, max_starved=30)
    cell.ask("start")
    end = time.monotonic() + 20
    while cell.mode == "starting" and time.monotonic() < end:
        cell.run(1 / HZ)
        time.sleep(0.001)
    cell.planner.gate.clear()
    cell.run(2.5)
    assert cell.mode == "stopped"
    assert cell.cause == "watchdog no plan for 30 periods"
    assert cell.smooth()
    cell.planner.gate.set()
    cell.engine.close()


def test_a_first_plan_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, machine = Cell(threaded=True), SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("robopolicy.deploy.sources.time", machine)
    cell.planner.gate.clear()
    assert cell.ask("start")[0]
    cell.run(0.1)
    assert cell.mode == "starting"
    machine.monotonic = lambda: 30.1
    cell.run(1 / HZ)
    assert cell.mode == "stopped"
    assert "no plan came within 30 s; inference hangs" in cell.cause
    cell.planner.gate.set()
    cell.engine.close()


@pytest.mark.parametrize("method", ["state", "observe", "targets", "command"])
def test_an_exception_in_a_period_stops_the_arm_smoothly_and_control_goes_on(method: str) -> None:
    cell = Cell().started()
    cell.robot.broken = {method}
    cell.run(0.06)  # an observation among them
    if method == "command":  # a robot that takes no commands cannot be braked, only told so
        cell.robot.broken = set()
    cell.run(0.5)
    assert cell.mode == "stopped"
    assert cell.cause == f"fault: OSError('bus: {method}')"
    assert "bus" in cell.arbiter.status.fault
    assert cell.speed() == 0.0
    assert cell.smooth() or method == "command"
    held = len(cell.sent)
    cell.run(0.1)
    assert len(cell.sent) == held + 10, "also without measurements the held position is sent"
    assert cell.ask("estop") == (True, "stands"), "requests are still answered"
    cell.robot.broken = set()
    assert cell.ask("reset")[0]
    assert cell.arbiter.status.fault == ""
    cell.started()


def test_one_command_that_fails_does_not_make_the_next_twice_as_large() -> None:
    cell, wait = Cell().started(0.5), [0, 1]
    works = cell.robot.command

    def once(positions: np.ndarray) -> None:
        if wait and wait.pop():
            raise OSError("bus")
        works(positions)

    cell.robot.command = once  # type: ignore[method-assign]
    cell.run(0.5)
    assert cell.mode == "stopped"
    assert cell.smooth()


def test_an_exception_of_who_watches_stops_the_arm_too() -> None:
    cell = Cell().started()
    cell.arbiter.watch = lambda period: 1 / 0  # type: ignore[assignment]
    cell.run(0.5)
    assert cell.mode == "stopped"
    assert "ZeroDivisionError" in cell.cause
    assert cell.speed() == 0.0


def test_home_from_nowhere_is_refused_and_the_policy_goes_on() -> None:
    cell = Cell().started()
    cell.robot.sense = NAN
    cell.run(1 / HZ)
    assert cell.mode == "holding"
    assert cell.ask("home") == (False, "refused: state_not_finite")
    assert cell.arbiter.status.source == "policy"
    cell.robot.sense = lambda state: state
    cell.run(0.1)
    assert cell.mode == "running"


def test_a_robot_that_hangs_for_long_is_a_gap_and_nothing_jumps() -> None:
    cell = Cell().started()
    held = cell.sent[-1]
    cell.clock.time += 0.5
    cell.run(1 / HZ)
    assert cell.mode == "holding"
    assert cell.sent[-1] == pytest.approx(held)
    assert cell.arbiter.skipped >= 48
    cell.run(0.1)
    assert cell.mode == "running"


@pytest.mark.parametrize("awaited", [False, True])
def test_a_pause_longer_than_a_hold_may_last_needs_a_start(awaited: bool) -> None:
    """A program that was halted, in a debugger or by the system, must not move the arm when it goes on."""
    cell = Cell(delay=0.8)
    assert cell.ask("start")[0]
    cell.run(0.2 if awaited else 1.2)
    assert cell.mode == ("starting" if awaited else "running")
    cell.clock.time += 10.0
    cell.run(1.5)
    assert cell.mode == "stopped"
    assert "no period for 10.0 s" in cell.cause
    assert cell.speed() == 0.0
    assert cell.ask("start")[0]


def test_a_first_plan_from_a_world_of_long_ago_is_not_carried_out() -> None:
    """The arm stood meanwhile, others did not."""
    cell = Cell(threaded=True)
    cell.planner.gate.clear()
    assert cell.ask("start")[0]
    cell.run(5.0)
    cell.planner.gate.set()
    asked = len(cell.planner.asked)
    while cell.engine._answered < cell.engine._asked:
        time.sleep(0.001)
    cell.run(1 / HZ)
    assert cell.mode == "starting"
    while cell.engine._answered < cell.engine._asked:
        time.sleep(0.001)
    cell.run(1 / HZ)
    assert len(cell.planner.asked) == asked + 1
    assert cell.mode == "running"
    cell.engine.close()


def test_too_many_late_periods_stop_the_arm() -> None:
    cell = Cell(max_missed=5).started()
    works = cell.robot.command

    def slow(positions: np.ndarray) -> None:
        cell.clock.time += 0.012
        works(positions)

    cell.robot.command = slow  # type: ignore[method-assign]
    cell.run(0.1)
    assert cell.mode == "stopped"
    assert "5 periods in a row were missed" in cell.cause
    assert cell.arbiter.status.missed >= 5


# ---- the deadman -------------------------------------------------------------------------------------------------------------


def test_without_the_deadman_nothing_starts_and_its_release_stops() -> None:
    cell = Cell(limits=WITH_DEADMAN)
    assert cell.arbiter.status.deadman is False
    ok, message = cell.ask("start")
    assert not ok
    assert "deadman" in message
    cell.started(0.2)
    assert cell.arbiter.status.deadman is True
    cell.ask("deadman", pressed=False)
    assert (cell.mode, cell.cause) == ("stopped", "deadman released")
    cell.arbiter.request("deadman", pressed=True)
    cell.run(0.5)
    assert cell.mode == "stopped", "pressing it again starts nothing"
    assert cell.speed() == 0.0
    assert cell.smooth()


def test_a_deadman_that_is_not_heard_of_stops_for_good() -> None:
    cell = Cell(limits=WITH_DEADMAN).started(0.2)
    cell.run(0.1)
    assert cell.mode == "stopped"
    assert "deadman" in cell.cause
    cell.arbiter.request("deadman", pressed=True)
    cell.run(0.2)
    assert cell.mode == "stopped"


def test_a_release_between_two_periods_is_not_missed() -> None:
    cell = Cell(limits=WITH_DEADMAN).started(0.1)
    for pressed in (False, True):
        cell.arbiter.request("deadman", pressed=pressed)
    cell.run(1 / HZ)
    assert cell.mode == "stopped"


def test_a_deadman_released_while_the_first_plan_is_awaited() -> None:
    cell = Cell(limits=WITH_DEADMAN, delay=0.5)
    cell.arbiter.request("deadman", pressed=True)
    assert cell.ask("start")[0]
    cell.run(1.0)  # nobody says that it is pressed
    assert cell.mode == "stopped"
    assert "deadman" in cell.cause
    assert (cell.sent == 0.0).all()


# ---- shadow ------------------------------------------------------------------------------------------------------------------


def test_a_shadow_does_everything_and_sends_nothing() -> None:
    cell = Cell(shadow=True).started()
    cell.run(1.0)
    assert cell.robot.sent == []
    assert cell.mode == "running", "that the arm does not follow is no reason to stop"
    wanted = cell.seen[-1].result.executed
    assert wanted == pytest.approx(np.array([0.4, 0.0]), abs=1e-3)
    cell.robot.sense = NAN
    cell.run(1 / HZ)
    assert cell.mode == "holding", "its senses are watched as ever"
    cell.robot.sense = lambda state: State(state.positions + 0.5, state.stamp)  # somebody else moves the arm
    cell.ask("stop")
    cell.run(0.5)
    cell.started(0.05)
    assert cell.seen[-1].result.executed == pytest.approx(np.array([0.5, 0.5]), abs=0.05), "it begins where the arm is"
    assert cell.ask("home")[0]
    cell.run(0.1)
    assert cell.ask("start")[0]
    cell.run(1.0)
    assert cell.mode == "running"
    cell.arbiter.end("done")
    assert cell.robot.sent == []
    assert not cell.robot.stopped


# ---- what is told ------------------------------------------------------------------------------------------------------------


def test_the_status_is_complete_and_cannot_be_changed() -> None:
    cell = Cell().started(1.0)
    status = cell.arbiter.status
    assert status.time == pytest.approx(cell.clock.now())
    assert status.rate == pytest.approx(HZ)
    assert status.lateness_ms["p99"] == pytest.approx(0.0, abs=1e-6)
    assert set(status.ages) == {"state", "command"}
    assert status.names == ("a", "b")
    assert status.set_point == tuple(cell.sent[-1])
    assert status.reports["policy"]["inference_ms"]["p50"] == pytest.approx(20.0)
    assert status.reports["policy"]["chunks"] >= 2
    assert status.periods == len(cell.seen) == 101
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.mode = "idle"  # type: ignore[misc]
    cell.planner.value = np.array([5.0, 0.0], np.float32)
    cell.run(1.0)
    assert any(reason.startswith("position_limit a") for reason in cell.arbiter.status.reasons)
    assert cell.arbiter.status.counters["position_limit"] > 10
    assert status.counters["position_limit" if "position_limit" in status.counters else "stop"] <= 10, "of then"


def test_what_does_not_fit_is_refused() -> None:
    clock = FakeClock()
    one = LIMITS.model_copy(update={"coordinates": LIMITS.coordinates[:1]})
    with pytest.raises(ConfigError, match="the robot takes a, b, the safety limits are for a"):
        Arbiter(Point(clock), SafetyFilter(one), clock)


def test_a_period_frees_all_that_it_allocates() -> None:
    cell = Cell(log_size=100).started(1.0)
    cell.arbiter.watch = None  # it and the next two keep everything
    cell.robot.sent, cell.planner.asked = deque(maxlen=3), deque(maxlen=3)  # type: ignore[assignment]
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        cell.run(1.0)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        cell.run(5.0)
        after, peak = tracemalloc.get_traced_memory()
        garbage = gc.collect()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert peak - before < 60_000, "what a period needs, and the last of what fills up"
    assert after - before < 20_000, "40 bytes kept a period would be it; each chunk leaves a Switch, of which 1000 are kept"
    assert garbage < 50, "no cycles, or nobody would collect them"


# ---- any order of requests ---------------------------------------------------------------------------------------------------

BAD: dict[str, Callable[[State], State]] = {"well": lambda state: state, "nan": NAN, "old": OLD}
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from([name for name in REQUESTS if name != "deadman"])),
        st.tuples(st.just("thumb"), st.sampled_from(["on", "on", "off", "away"])),
        st.tuples(st.just("sense"), st.sampled_from(["well", "well", "nan", "old"])),
        st.tuples(st.just("wait"), st.sampled_from(["0.01", "0.03", "0.2", "0.6"])),
    ),
    max_size=30,
)


@given(steps)
@settings(max_examples=100, deadline=None)
def test_in_any_order_of_requests_an_emergency_stop_holds_and_nothing_jumps(script: list[tuple[str, str]]) -> None:
    """A model of what people may rely on, in a few lines: latched is latched, and only a start lets the arm move."""
    cell, thumb = Cell(limits=WITH_DEADMAN, delay=0.03), "on"
    latched = allowed = False  # by the model

    def run(seconds: float) -> None:
        for _ in range(round(seconds * HZ)):
            if thumb == "on":
                cell.arbiter.request("deadman", pressed=True)
            cell.run(1 / HZ)

    for kind, what in script:
        if kind == "sense":
            cell.robot.sense = BAD[what]
        elif kind == "thumb":
            thumb = what
            if what == "off":
                cell.arbiter.request("deadman", pressed=False)
                run(1 / HZ)
                allowed = False
        elif kind == "wait":
            before, standing = cell.robot.at, cell.safety.still
            run(float(what))
            if standing and not allowed:
                assert (cell.robot.at == before).all()
        else:
            ticket = cell.arbiter.request(what)
            run(1 / HZ)
            ok, message = ticket.wait(0.0)
            assert message, "every request is answered"
            assert not (ok and latched and what in ("start", "home")), "no start while it is latched"
            latched = what == "estop" or (latched and not (what == "reset" and ok))
            allowed = (allowed or (ok and what in ("start", "home"))) and what not in ("stop", "idle", "estop")
        assert latched == (cell.safety.mode is Mode.ESTOPPED)
        assert allowed or cell.safety.mode not in (Mode.RUNNING, Mode.HOLDING)
    assert cell.smooth()
    assert np.isfinite(cell.sent).all()
    assert np.abs(cell.sent).max(initial=0.0) <= 0.95 + 1e-6


# ---- the control thread ------------------------------------------------------------------------------------------------------


def test_the_control_thread_in_real_time() -> None:
    clock = SystemClock()
    robot, safety, planner = Faulty(clock), SafetyFilter(LIMITS), Planned((0.4, 0.0))
    settings = ControlConfig(max_missed=10_000, max_starved=10_000)
    engine = Engine(planner, 1 / RATE, clock, torch.Generator())
    policy = PolicySource(robot, engine, make_executor("latest"), LIMITS, settings)
    policy.prepare()
    arbiter = Arbiter(robot, safety, clock, [policy], settings)
    until = threading.Event()
    thread = threading.Thread(target=arbiter.run, args=(until,), daemon=True)
    thread.start()
    assert arbiter.request("start").wait(20.0) == (True, "policy begins")
    end = time.monotonic() + 20
    while np.abs(robot.at).max() < 0.05 and time.monotonic() < end:
        time.sleep(0.01)
    assert np.abs(robot.at).max() >= 0.05
    assert arbiter.request("estop").wait(20.0)[0]
    assert arbiter.status.mode == "estopped"
    assert arbiter.request("start").wait(20.0)[0] is False
    count = len(robot.sent)
    while len(robot.sent) < count + 5 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(robot.sent) >= count + 5, "what is held is sent"
    until.set()
    thread.join(20.0)
    assert not thread.is_alive()
    assert robot.stopped
    assert safety.still
    assert arbiter.status.periods > 10
    engine.close()


def test_the_end_of_control_stops_smoothly_and_leaves_no_request_unanswered() -> None:
    cell = Cell().started()
    until = threading.Event()
    left: list[Ticket] = []
    works = cell.robot.stop

    def stop() -> None:
        left.extend(cell.arbiter.request(name) for name in ("start", "estop"))
        works()

    cell.robot.stop = stop  # type: ignore[method-assign]
    until.set()
    cell.arbiter.run(until)
    assert cell.robot.stopped
    assert cell.safety.still
    assert cell.smooth()
    assert cell.cause == "control ends"
    assert [ticket.wait(0.0) for ticket in left] == [(False, "control has ended"), (True, "control has ended")]
    assert cell.mode == "estopped", "an emergency stop counts when nobody listens any more"


def test_commands_that_fail_now_and_then_do_not_end_the_ramp_at_the_end() -> None:
    cell, wait = Cell().started(), [True, False, True]
    works = cell.robot.command

    def sometimes(positions: np.ndarray) -> None:
        if wait and wait.pop(0):
            raise OSError("bus")
        works(positions)

    cell.robot.command = sometimes  # type: ignore[method-assign]
    with pytest.raises(OSError, match="bus"):
        cell.arbiter.end("done")
    assert cell.robot.stopped
    assert cell.robot.at == pytest.approx(cell.safety.set_point)
    assert cell.safety.still


def test_a_source_that_cannot_end_has_no_say_any_more() -> None:
    cell = Cell().started()
    cell.policy.end = lambda: 1 / 0  # type: ignore[assignment, method-assign]
    assert cell.ask("stop") == (True, "stops")
    cell.run(0.5)
    assert (cell.mode, cell.arbiter.status.source, cell.speed()) == ("stopped", "idle", 0.0)
    assert "ZeroDivisionError" in cell.arbiter.status.fault
    assert cell.smooth()


def test_control_ends_also_when_the_robot_takes_no_commands() -> None:
    cell = Cell().started()
    cell.robot.broken = {"command"}
    until = threading.Event()
    until.set()
    cell.arbiter.run(until)
    assert cell.robot.stopped
    assert "bus" in cell.arbiter.status.fault
