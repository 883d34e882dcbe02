"""The arbiter on a fake clock: who commands, what stops the arm, what it takes to go on; once in real time."""

import dataclasses
import gc
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from arbiter_cell import HZ, LIMITS, NAN, OLD, WITH_DEADMAN, Cell, Faulty
from hypothesis import given, settings
from hypothesis import strategies as st
from robots import RATE, Planned, Point

from robopolicy.deploy.arbiter import Arbiter
from robopolicy.deploy.clock import FakeClock, SystemClock
from robopolicy.deploy.engine import Engine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.requests import REQUESTS, Ticket
from robopolicy.deploy.safety import Mode, Reason, SafetyFilter, Stamp
from robopolicy.deploy.sources import ControlConfig, PolicySource
from robopolicy.errors import ConfigError
from robopolicy.robot import State

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


@pytest.mark.parametrize("name", ["start", "home", "reset", "stop", "estop"])
def test_what_nobody_waits_for_any_more_is_not_granted_later(name: str) -> None:
    """Who asked was told that control has not answered. A stop is done however late."""
    cell = Cell().started() if name in ("stop", "estop") else Cell()
    ticket = cell.arbiter.request(name)
    assert ticket.wait(0.0)[1].startswith("control has not answered")
    cell.run(0.5)
    if name in ("stop", "estop"):
        assert cell.mode == ("stopped" if name == "stop" else "estopped")
        assert ticket.wait(0.0)[0]
    else:
        assert cell.robot.sent == []
        assert not ticket.wait(0.0)[0]
        assert cell.ask(name)[0], "and it may be asked for again"


def test_a_start_that_is_taken_back_while_it_is_granted_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell()
    ticket, begin = cell.arbiter.request("start"), cell.arbiter.begin

    def slow(*arguments: Any, **options: Any) -> tuple[Reason, ...]:
        assert not ticket.wait(0.0)[0]
        return begin(*arguments, **options)

    monkeypatch.setattr(cell.arbiter, "begin", slow)
    cell.run(0.5)
    assert cell.mode == "stopped"
    assert not cell.arbiter.commanded
    assert (cell.sent == 0.0).all()


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


# ---- a second master ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "stop", "idle", "estop"])
def test_who_is_mute_comes_to_rest_and_sends_nothing_until_a_start_from_where_the_arm_is(before: str) -> None:
    """Two who command it make an arm jump: also where ours only holds it."""
    cell = Cell().started()
    if before:
        assert cell.ask(before)[0]
        cell.run(0.5)
        held = len(cell.sent)
    assert cell.ask("mute", why="another")[0]
    if not before:
        assert cell.cause == "another"
        assert (cell.arbiter.status.muted, cell.arbiter.silent) == ("", True), "it decelerates"
        cell.run(0.5)
        held = len(cell.sent)
        assert cell.speed() < 0.01, "down to where it rests"
        assert cell.smooth()
    assert cell.arbiter.status.muted == "another"
    assert cell.robot.stopped, "a controller of velocities would go on with the last"
    cell.robot.at = cell.robot.at + 0.1  # by the other
    for name in ("stop", "mute", "idle", *(["estop", "reset"] if before == "estop" else [])):
        assert cell.ask(name)[0]
        cell.run(0.2)
    cell.robot.broken = {"state"}  # which sends what is held, else
    cell.run(0.1)
    cell.robot.broken = set()
    cell.robot.sense = NAN
    assert not cell.ask("start")[0]
    cell.robot.sense = lambda state: state
    assert cell.arbiter.status.muted == "another"
    assert len(cell.sent) == held
    there = cell.robot.at
    assert cell.ask("home" if before == "idle" else "start")[0]
    assert cell.arbiter.status.muted == ""
    assert cell.sent[held] == pytest.approx(there, abs=1e-3)
    cell.run(0.3)
    assert len(cell.sent) == held + 31
    assert cell.mode == "running"


def test_who_is_mute_leaves_the_robot_to_the_other_at_the_end_too() -> None:
    """A zero would go between the velocities of who commands it now."""
    cell = Cell().started()
    assert cell.ask("mute", why="another")[0]
    cell.run(0.5)
    assert cell.robot.stopped
    sent, cell.robot.stopped = len(cell.sent), False
    cell.arbiter.end("control ends")
    assert (cell.robot.stopped, len(cell.sent)) == (False, sent)
    cell = Cell().started()
    assert cell.ask("mute", why="another")[0]
    assert not cell.safety.still
    cell.arbiter.end("control ends")
    assert cell.robot.stopped, "it was not mute yet"


def test_who_was_never_started_is_not_mute() -> None:
    cell = Cell()
    assert cell.arbiter.silent
    assert cell.ask("mute") == (True, "stands")
    assert cell.arbiter.status.muted == ""
    assert not cell.robot.stopped
    cell.started()
    assert not cell.arbiter.silent


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
            allowed = (allowed or (ok and what in ("start", "home"))) and what not in ("stop", "mute", "idle", "estop")
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
