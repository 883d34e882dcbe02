"""Faults on the way from senses to commands, and the deadman: what stops the arm, on a fake clock."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from arbiter_cell import HZ, NAN, OLD, WITH_DEADMAN, Cell

from robopolicy.deploy.requests import mend
from robopolicy.deploy.safety import Reason, Stamp
from robopolicy.robot import State

# ---- faults ------------------------------------------------------------------------------------------------------------------

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
    machine.monotonic = lambda: 3.1
    cell.run(2.8)
    assert cell.mode == "starting", "a simulation is slower than time, maybe"
    cell.run(0.2)
    assert cell.mode == "stopped"
    assert cell.cause == "the first plan took longer than 3 s; inference hangs, or is slow here"
    assert cell.arbiter.status.fault == "", "it is over with the next start"
    cell.planner.gate.set()
    while cell.engine._answered < cell.engine._asked:
        time.sleep(0.001)
    cell.run(0.5)
    assert (cell.sent == 0.0).all(), "a plan that comes later moves nothing"
    assert cell.ask("start")[0]
    while cell.engine._answered < cell.engine._asked:
        time.sleep(0.001)
    cell.run(0.2)
    assert cell.mode == "running"
    chunks = cell.arbiter.log.rows()["chunk"]
    assert chunks[chunks >= 0][0] == 1, "not the plan that was asked for before"
    assert cell.smooth()
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
    cell.planner.begun.clear()
    assert cell.ask("start")[0]
    cell.run(5.0)
    assert cell.planner.begun.wait(30.0)
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
