"""The safety filter: no output breaks a limit whatever comes in, every step does its work, and good commands are followed."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torture import SETUPS, Judge, torture

from robopolicy.config import parse
from robopolicy.deploy.limits import SafetyLimits, load_limits
from robopolicy.deploy.motion import Motion
from robopolicy.deploy.safety import Mode, Reason, Result, SafetyFilter, Stamp
from robopolicy.deploy.workspace import CartesianKinematics, Workspace
from sim.arm import model as arm
from sim.arm.control import Kinematics as Inverse
from sim.arm.robot import ArmKinematics

DT = 0.004


def limits(**changes: Any) -> SafetyLimits:
    """Two joints without a workspace; a margin of 0.1, velocity 1, acceleration 5, jerk 100."""
    joint = {"lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0, "margin": 0.1, "max_step": 0.3}
    document = {"coordinates": [{"name": "a", **joint}, {"name": "b", **joint}], **changes}
    return SafetyLimits.model_validate_json(json.dumps(document))


class Arm:
    """Calls a filter at its rate with inputs that are right, unless told otherwise; the arm follows at once."""

    def __init__(self, start: tuple[float, float] = (0.0, 0.0), **changes: Any) -> None:
        self.limits = limits(**changes)
        self.filter = SafetyFilter(self.limits)
        self.judge = Judge(self.limits, None)
        self.now = 10.0
        self.out = np.array(start)
        self.ticks = 0
        assert self.start(self.out) == ()
        self.judge.seat(self.out)

    def start(self, state: Any, **changes: Any) -> tuple[Reason, ...]:
        return self.filter.start(state, Stamp(self.now), self.now, **changes)

    def __call__(self, command: Any, **changes: Any) -> Result:
        self.now += changes.pop("dt", DT)
        inputs = {"now": self.now, "state": self.out, "stamps": {"state": Stamp(self.now)}, **changes}
        command = None if command is None else np.array(command, np.float64)
        result = self.filter(command=command, **inputs)
        self.judge(self.ticks, result)
        self.ticks += 1
        assert result.executed is not None
        self.out = result.executed
        return result

    def run(self, command: Any, ticks: int, **changes: Any) -> Result:
        for _ in range(ticks):
            result = self(command, **changes)
        return result

    def ends_still(self) -> bool:
        """It comes to rest within the time that its limits need, and stays there; no limit was broken on the way."""
        for _ in range(80):
            before = self.out
            self([math.nan, 0.0])
        return bool((self.out == before).all()) and not self.judge.broken


def kinds(result: Result) -> list[str]:
    return [reason.kind for reason in result.reasons]


# ---- the invariant -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setup", "seed", "ticks"), [("arm", 1, 20_000), ("arm", 2, 20_000), ("cartesian", 3, 60_000)])
def test_no_output_breaks_a_limit_whatever_comes_in(setup: str, seed: int, ticks: int) -> None:
    found, kinematics, where = SETUPS[setup]()
    safety, judge, modes = torture(found, kinematics, where, ticks, seed)
    assert judge.broken == []
    assert min(judge.worst[name] for name in ("velocity", "acceleration", "jerk")) > 0.99, "the limits were never reached"
    assert modes[Mode.RUNNING] > 0.3 * ticks, "nothing was tested while running"
    assert {"stale", "time", "tracking", "position_limit", "workspace", "max_step", "estop", "stop"} <= set(safety.counters)
    assert len(safety.counters) > 12


entries = st.one_of(st.floats(-1.2, 1.2), st.floats(allow_nan=True, allow_infinity=True))
velocities = st.one_of(st.none(), st.tuples(entries, entries))
spell = st.tuples(st.tuples(entries, entries), velocities, st.integers(1, 60), st.sampled_from(["", "stop", "estop"]))


@example(  # found by chance: it came in from a margin, and the stop led out again by 3e-5 rad
    spells=[((0.0, 0.0), None, 11, ""), ((-1.0, 0.0), None, 24, "")], start=(-0.916015625, 1.0)
)
@given(spells=st.lists(spell, min_size=1, max_size=12), start=st.tuples(st.floats(-1.0, 1.0), st.floats(-1.0, 1.0)))
@settings(max_examples=120, deadline=None)
def test_any_sequence_of_commands_keeps_the_limits(spells: list[Any], start: tuple[float, float]) -> None:
    arm_ = Arm(start)
    for command, velocity, repeats, event in spells:
        if event:
            getattr(arm_.filter, event)()
        for _ in range(repeats):
            arm_(command, velocity=None if velocity is None else np.array(velocity))
        if arm_.filter.still:
            arm_.filter.reset()
            arm_.start(arm_.out)
    assert arm_.ends_still()
    assert arm_.judge.broken == []


def test_the_judge_finds_what_breaks_a_limit() -> None:
    def broken(*outputs: float) -> list[str]:
        judge = Judge(limits(), None)
        judge.seat(np.zeros(2))
        for tick, value in enumerate(outputs):
            judge(tick, Result(Mode.RUNNING, None, np.array([value, 0.0]), ()))
        return [text.split(": ")[1] for text in judge.broken]

    inside = 100 * DT**3  # the jerk limit for one tick, from rest
    assert broken(inside) == []
    assert broken(1.01 * inside) == ["jerk"]
    assert "acceleration" in broken(1.01 * 5 * DT**2)
    assert "velocity" in broken(1.01 * DT)
    assert "position" in broken(0.91)
    assert broken(math.nan) == ["the output is [nan  0.]"]


# ---- following -----------------------------------------------------------------------------------------------------------------


def test_a_target_within_reach_is_reached_and_kept() -> None:
    arm_ = Arm()
    result = arm_.run([0.1, -0.12], 200)
    assert arm_.out == pytest.approx([0.1, -0.12], abs=1e-9)
    assert result.mode is Mode.RUNNING
    assert result.reasons == ()


def test_a_moving_target_with_its_velocity_is_followed_without_lag() -> None:
    errors = {}
    for told in (True, False):
        arm_ = Arm()
        for k in range(500):
            t = k * DT
            target, rate = 0.3 * np.sin(2 * t), 0.6 * np.cos(2 * t)
            arm_([target, 0.0], velocity=np.array([rate, 0.0]) if told else None)
            error = abs(arm_.out[0] - target)
            errors[told] = max(errors.get(told, 0.0), error) if k > 150 else 0.0
        assert arm_.judge.broken == []
    assert errors[True] < 0.003
    assert errors[False] > 5 * errors[True]


# ---- every step ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "what", "wrong"),
    [
        ("state_not_finite", "b", lambda now: {"state": np.array([0.0, math.nan])}),
        ("state_not_finite", "shape (3,)", lambda now: {"state": np.zeros(3)}),
        ("stale", "state", lambda now: {"stamps": {"state": Stamp(now - 0.151)}}),
        ("stale", "state", lambda now: {"stamps": {"state": Stamp(now, now - 0.151)}}),
        ("stale", "state", lambda now: {"stamps": {"state": Stamp(now - 0.151, now)}}),
        ("stale", "state", lambda now: {"stamps": {"state": Stamp(math.nan)}}),
        ("stale", "state", lambda now: {"stamps": {"state": Stamp(now, math.nan)}}),
        ("stale", "state", lambda now: {"stamps": {"state": Stamp(now + 0.2)}}),
        ("stale", "state", lambda now: {"stamps": {}}),
        ("stale", "front", lambda now: {"stamps": {"state": Stamp(now), "front": Stamp(now - 0.31)}}),
        ("stale", "command", lambda now: {"command_age": 1.01}),
        ("stale", "command", lambda now: {"command_age": math.nan}),
        ("time", "now", lambda now: {"now": now - 1.0}),
        ("time", "now", lambda now: {"now": math.nan}),
        ("tracking", "a", lambda now: {"state": np.array([0.9, 0.0])}),
    ],
)  # fmt: skip
def test_what_is_wrong_holds_the_arm_within_one_period(kind: str, what: str, wrong: Callable[[float], dict[str, Any]]) -> None:
    arm_ = Arm()
    arm_.run([0.14, 0.14], 20)
    assert np.abs(np.diff(arm_.judge._history[-2:], axis=0)).min() > 1e-5, "it must be moving"
    result = arm_([0.14, 0.14], **wrong(arm_.now + DT))
    assert (kind, what) in [(reason.kind, reason.what) for reason in result.reasons]
    assert result.mode is (Mode.STOPPED if kind == "tracking" else Mode.HOLDING)
    assert arm_.filter.counters[kind] == arm_.filter.events[kind] == 1
    assert arm_.ends_still()


@pytest.mark.parametrize("command", [None, [math.nan, 0.0], [math.inf, 0.0], [0.0], [[0.0, 0.0]]])
def test_a_command_that_is_none_holds_the_arm(command: Any) -> None:
    arm_ = Arm()
    arm_.run([0.14, 0.14], 20)
    assert arm_(command).mode is Mode.HOLDING
    assert arm_.ends_still()


@pytest.mark.parametrize(
    "bad",
    [[None, 0.0], ["a", "b"], "ab", [10**400, 0], np.array([1j, 0.0]), [[0.0], [0.0, 0.0]], object(), [True, False]],
    ids=["none", "texts", "text", "huge", "complex", "ragged", "object", "truth"],
)
@pytest.mark.parametrize("who", ["state", "command"])
def test_what_is_no_number_holds_the_arm_like_nan(who: str, bad: Any) -> None:
    arm_ = Arm()
    arm_.run([0.14, 0.14], 20)
    arm_.now += DT
    inputs = {"state": arm_.out, "command": np.array([0.14, 0.14]), who: bad}
    result = arm_.filter(arm_.now, stamps={"state": Stamp(arm_.now)}, velocity=bad, **inputs)
    assert (result.mode, kinds(result)) == (Mode.HOLDING, [f"{who}_not_finite"])
    other = SafetyFilter(limits())
    assert [reason.kind for reason in other.start(bad, Stamp(0.0), 0.0)] == ["state_not_finite"]


def test_a_velocity_that_is_no_number_is_not_followed() -> None:
    arm_, other = Arm(), Arm()
    for each, velocity in ((arm_, ["a", None]), (other, None)):
        each.run([0.14, 0.14], 20, velocity=velocity)
    np.testing.assert_array_equal(arm_.out, other.out)


@pytest.mark.parametrize(
    "right",
    [
        lambda now: {"stamps": {"state": Stamp(now - 0.149, now - 0.149)}},
        lambda now: {"stamps": {"state": Stamp(now), "front": Stamp(now - 0.29)}},
        lambda now: {"command_age": 0.99},
        lambda now: {"state": None},
    ],
)
def test_what_is_nearly_wrong_does_not(right: Callable[[float], dict[str, Any]]) -> None:
    arm_ = Arm()
    arm_.run([0.14, 0.14], 20)
    changes = right(arm_.now + DT)
    if "state" in changes:
        changes["state"] = arm_.out + 0.199
    assert arm_([0.14, 0.14], **changes).mode is Mode.RUNNING


def test_an_input_that_must_come_and_does_not_holds() -> None:
    arm_ = Arm(freshness={"inputs": {"front": 0.5}})
    assert kinds(arm_([0.0, 0.0])) == ["stale"]
    fresh = {"state": Stamp(arm_.now + DT), "front": Stamp(arm_.now - 0.45)}
    assert arm_([0.0, 0.0], stamps=fresh).mode is Mode.RUNNING


def test_clocks_that_disagree_are_reported_and_do_not_hold() -> None:
    arm_ = Arm()
    result = arm_([0.0, 0.0], stamps={"state": Stamp(arm_.now, arm_.now + 3600.0)})
    assert (kinds(result), result.mode) == (["clock_skew"], Mode.RUNNING)
    arm_ = Arm()
    for _ in range(120):
        result = arm_([0.0, 0.0], stamps={"state": Stamp(arm_.now, arm_.now - 0.08)})
    assert (kinds(result), result.mode) == (["clock_skew"], Mode.RUNNING)
    assert arm_.filter.counters["clock_skew"] == 21  # once a hundred stamps were all old
    assert kinds(arm_([0.0, 0.0], stamps={"state": Stamp(arm_.now, arm_.now - 0.01)})) == []


def test_nothing_starts_while_the_measured_state_is_stamped_ahead() -> None:
    """Its age cannot be seen: a frozen driver would seem fresh for as long as its clock is ahead."""
    arm_ = Arm()
    arm_.filter.stop()
    refused = arm_.filter.start(arm_.out, Stamp(arm_.now, arm_.now + 0.52), arm_.now)
    assert [(r.kind, r.what) for r in refused] == [("clock_ahead", "state")]
    assert refused[0].found == pytest.approx(0.52)
    assert arm_.filter.start(arm_.out, Stamp(arm_.now, arm_.now + 0.1), arm_.now) == ()


def test_without_the_deadman_the_arm_stands() -> None:
    arm_ = Arm(freshness={"deadman": 0.25})
    assert kinds(arm_([0.1, 0.0])) == ["deadman"]
    assert arm_([0.1, 0.0], deadman=Stamp(arm_.now)).mode is Mode.RUNNING
    assert arm_([0.1, 0.0], deadman=Stamp(arm_.now - 0.26)).mode is Mode.HOLDING
    assert arm_([0.1, 0.0], deadman=Stamp(math.nan)).mode is Mode.HOLDING


def test_commands_outside_the_joint_limits_end_at_the_margin() -> None:
    arm_ = Arm(ramp=1.0)
    arm_.run([1e300, -5.0], 600)
    assert arm_.out == pytest.approx([0.9, -0.9], abs=1e-6)
    assert arm_.filter.counters["position_limit"] == 600
    assert not arm_.judge.broken


def test_a_far_target_is_drawn_near() -> None:
    arm_ = Arm(ramp=1.0)
    result = arm_([0.8, 0.0])
    assert [(r.kind, r.what, r.found, r.limit) for r in result.reasons if r.kind == "max_step"] == [("max_step", "a", 0.8, 0.3)]
    # From 0.3 rad away the arm would brake in time to stop there; it is at full speed for longer the farther it may look.
    near, far = Arm(ramp=1.0), Arm(ramp=1.0, coordinates=[{**c.model_dump(), "max_step": 0.05} for c in limits().coordinates])
    near.run([0.8, 0.0], 60)
    far.run([0.8, 0.0], 60)
    assert far.out[0] < 0.8 * near.out[0]


def test_a_far_first_target_starts_a_ramp() -> None:
    arm_ = Arm()
    result = arm_([0.5, 0.0])
    assert "ramp" in kinds(result)
    speeds = []
    while "ramp" in kinds(result):
        before = arm_.out
        result = arm_([0.5, 0.0])
        speeds.append(abs(arm_.out[0] - before[0]) / DT)
    assert max(speeds[:-1]) == pytest.approx(0.2, abs=1e-6)  # a fifth of the speed
    assert arm_.out[0] == pytest.approx(0.5 - 0.15, abs=0.002)  # until it is near
    arm_.run([0.5, 0.0], 300)
    arm_.run([-0.5, 0.0], 60)
    assert abs(arm_.judge._history[-1, 0] - arm_.judge._history[-2, 0]) / DT > 0.5  # later ones are no first targets


def test_a_far_first_target_is_refused_where_that_is_asked_for() -> None:
    arm_ = Arm(on_far_start="refuse")
    result = arm_([0.0, 0.5])
    assert result.mode is Mode.STOPPED
    assert str(result.reasons[-1]) == "start_far b: 0.5, limit 0.15"
    arm_.run([0.0, 0.0], 10)
    assert arm_.filter.mode is Mode.STOPPED
    assert arm_.start(arm_.out) == ()
    assert arm_([0.0, 0.1]).mode is Mode.RUNNING


def test_a_short_hold_ends_by_itself_and_a_long_one_does_not() -> None:
    arm_ = Arm()
    arm_.run([0.1, 0.0], 100)
    arm_.run(None, 240)
    assert arm_.filter.mode is Mode.HOLDING
    assert arm_([0.1, 0.0]).mode is Mode.RUNNING
    arm_.run(None, 260)
    assert arm_.filter.mode is Mode.STOPPED
    assert arm_.run([0.0, 0.0], 100).mode is Mode.STOPPED
    assert arm_.start(arm_.out) == ()
    assert arm_([0.0, 0.0]).mode is Mode.RUNNING
    assert arm_.filter.events["no_command"] == 2


def test_after_a_hold_the_first_target_is_a_first_one_again() -> None:
    arm_ = Arm()
    arm_.run([0.1, 0.0], 200)
    assert "ramp" not in kinds(arm_([0.4, 0.0]))
    arm_(None)
    assert "ramp" in kinds(arm_([0.4, 0.0]))


def test_the_emergency_stop_is_latched() -> None:
    arm_ = Arm()
    arm_.run([0.14, 0.0], 20)
    arm_.filter.estop("button")
    assert str(arm_([0.14, 0.0]).reasons[-1]) == "estop button"
    assert not arm_.filter.reset(), "it still moves"
    assert [reason.kind for reason in arm_.start(arm_.out)] == ["estopped"]
    arm_.run([0.14, 0.0], 100)
    held = arm_.out
    assert arm_.start(arm_.out) != ()
    assert arm_.filter.reset()
    assert arm_([0.14, 0.0]).mode is Mode.STOPPED
    assert (arm_.out == held).all()
    assert arm_.start(arm_.out) == ()
    assert arm_([0.14, 0.0]).mode is Mode.RUNNING
    assert not arm_.judge.broken


def test_an_emergency_stop_before_the_start_keeps_the_arm_from_starting() -> None:
    safety = SafetyFilter(limits())
    safety.estop()
    assert safety(0.0, np.zeros(2), np.zeros(2), stamps={"state": Stamp(0.0)}).executed is None
    assert safety.start(np.zeros(2), Stamp(0.0), 0.0) != ()
    assert safety.reset()
    assert safety.mode is Mode.IDLE
    assert safety.start(np.zeros(2), Stamp(0.0), 0.0) == ()


def test_before_the_start_nothing_may_be_sent() -> None:
    result = SafetyFilter(limits())(0.0, np.zeros(2), np.zeros(2), stamps={"state": Stamp(0.0)})
    assert (result.mode, result.executed) == (Mode.IDLE, None)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ([0.0, 1.2], "start_outside b: 1.2, limit 1"),
        ([-1.1, 0.0], "start_outside a: -1.1, limit -1"),
        ([math.nan, 0.0], "state_not_finite a"),
        ([0.0], "state_not_finite shape (1,)"),
    ],
)
def test_a_start_outside_is_refused_and_says_which_joint(state: list[float], text: str) -> None:
    safety = SafetyFilter(limits())
    assert [str(reason) for reason in safety.start(np.array(state), Stamp(0.0), 0.0)] == [text]
    assert safety.mode is Mode.IDLE


def test_a_start_within_the_margin_only_comes_in() -> None:
    arm_ = Arm((0.95, 0.0))
    lowest = 0.95
    for _ in range(400):
        arm_([1.0, 0.0])
        assert arm_.out[0] <= lowest + 1e-9
        lowest = min(lowest, float(arm_.out[0]))
    assert lowest == pytest.approx(0.9, abs=1e-6)


def test_within_the_margin_it_never_turns_back() -> None:
    """A million adversarial ticks found two turns of 2e-5 rad: commands changed while it came in, and it stopped."""

    def taken(velocity: float, acceleration: float) -> bool:
        motion = Motion(DT, np.ones(1), np.full(1, 5.0), np.full(1, 100.0))
        motion.seat(np.array([0.95]), np.array([-0.9]), np.array([0.9]))
        motion.position, motion.velocity, motion.acceleration = np.array([0.93]), np.array([velocity]), np.array([acceleration])
        return motion.propose(np.array([0.8]), None, 1.0, lambda *_: True)

    assert taken(-0.3, 5.0), "braking on the way in"
    assert not taken(-0.02, 5.0), "a stop from here leads out again, though not as far as it began"


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_a_margin_that_was_left_is_not_entered_again(side: float) -> None:
    motion = Motion(DT, np.ones(1), np.full(1, 5.0), np.full(1, 100.0))
    motion.seat(np.array([side * 0.95]), np.array([-0.9]), np.array([0.9]))
    motion.position = np.array([side * 0.8])
    motion.close()
    for _ in range(200):
        if not motion.propose(np.array([side * 0.95]), None, 1.0, lambda *_: True):
            motion.brake()
    assert 0.85 < side * motion.position[0] <= 0.9 + 1e-6


def test_an_arm_that_was_moved_while_it_stood_is_not_pulled_back() -> None:
    arm_ = Arm()
    arm_.run([0.1, 0.0], 100)
    arm_.filter.stop()
    arm_.run([0.1, 0.0], 100)
    moved = arm_.out + np.array([0.0, 0.3])
    assert [reason.what for reason in arm_.start(moved)] == ["b"]
    assert arm_.start(moved, reseat=True) == ()
    assert arm_.filter.set_point == pytest.approx(moved)


def test_the_set_point_does_not_jump_while_it_moves() -> None:
    arm_ = Arm()
    arm_.run([0.14, 0.0], 20)
    arm_.filter.stop()
    assert [reason.kind for reason in arm_.start(arm_.out, reseat=True)] == ["start_moving"]


def test_reseating_while_running_is_refused() -> None:
    arm_ = Arm()
    assert [reason.kind for reason in arm_.start(arm_.out, reseat=True)] == ["start_running"]
    arm_([math.nan, 0.0])
    assert arm_.filter.mode is Mode.HOLDING
    assert [reason.kind for reason in arm_.start(arm_.out, reseat=True)] == ["start_running"]


@pytest.mark.parametrize("stamp", [Stamp(9.8), Stamp(10.0, 9.8), Stamp(math.nan), Stamp(11.0)])
def test_a_start_from_an_old_measurement_is_refused(stamp: Stamp) -> None:
    safety = SafetyFilter(limits())
    assert [(reason.kind, reason.what) for reason in safety.start(np.zeros(2), stamp, 10.0)] == [("stale", "state")]
    assert safety.mode is Mode.IDLE


@pytest.mark.parametrize("back", [-500.0, math.nan])
def test_a_clock_that_went_back_ends_in_a_stop(back: float) -> None:
    arm_ = Arm()
    arm_.run([0.1, 0.0], 50)
    good = arm_.now
    for tick in range(300):  # 1.2 s of calls
        result = arm_([0.1, 0.0], now=back + tick * DT, stamps={"state": Stamp(back + tick * DT)})
    assert result.mode is Mode.STOPPED
    arm_.now = good
    assert arm_([0.5, 0.0]).mode is Mode.STOPPED, "it goes on by itself"


def test_after_a_gap_motion_starts_from_rest() -> None:
    arm_ = Arm()
    arm_.run([0.14, 0.14], 20)
    before = arm_.out
    result = arm_([0.14, 0.14], dt=0.051)
    assert (kinds(result), result.mode) == (["gap"], Mode.HOLDING)
    assert (arm_.out == before).all()
    assert arm_([0.14, 0.14]).mode is Mode.RUNNING
    assert (np.abs(arm_.out - before) <= 100 * DT**3 * (1 + 1e-9)).all()


# ---- the workspace -------------------------------------------------------------------------------------------------------------


def box_arm() -> tuple[SafetyFilter, ArmKinematics, np.ndarray]:
    kinematics = ArmKinematics()
    safety = SafetyFilter(load_limits("arm", on_far_start="ramp", ramp=1.0), kinematics)
    start = np.append(arm.home(0.45, 0.10), 0.04)
    assert safety.start(start, Stamp(0.0), 0.0) == ()
    return safety, kinematics, start


def test_the_tool_slides_along_the_table_instead_of_stopping() -> None:
    safety, kinematics, q = box_arm()
    inverse = Inverse()
    for k in range(900):
        pos = np.array([0.40 + 0.0002 * k, 0.0, -0.05])  # 5 cm below the table, forwards at 5 cm/s
        wanted = np.append(inverse.inverse(q[:7], pos, np.array([0.0, 1.0, 0.0, 0.0]), iterations=6), 0.04)
        result = safety(k * DT, q, wanted, stamps={"state": Stamp(k * DT)})
        assert result.executed is not None
        q = result.executed
        assert kinematics.points(q)[0, 2] > 0.004 - 1e-3
    assert kinematics.points(q)[0] == pytest.approx([0.58, 0.0, 0.008], abs=0.01)
    assert result.mode is Mode.RUNNING
    assert "workspace" in kinds(result)


def test_the_projection_of_a_command_outside_lies_on_the_border() -> None:
    config = load_limits("arm").workspace
    assert config is not None
    workspace, kinematics = Workspace(config, ArmKinematics()), ArmKinematics()
    start = np.append(arm.home(0.45, 0.2), 0.04)
    bounds = np.append(arm.LOWER, 0.0), np.append(arm.UPPER, 0.08)
    assert workspace.project(start, start, *bounds) is None
    for target in ([0.45, 0.0, -0.03], [0.15, 0.0, 0.2], [0.45, 0.5, 0.1]):
        q = np.append(Inverse().inverse(start[:7], np.array(target), np.array([0.0, 1.0, 0.0, 0.0]), iterations=30), 0.04)
        moved = workspace.project(q, start, *bounds)
        assert moved is not None
        commanded, point = kinematics.points(q)[0].copy(), kinematics.points(moved)[0]
        nearest = np.clip(commanded, np.array(config.lower) + config.margin, np.array(config.upper) - config.margin)
        assert point == pytest.approx(nearest, abs=1e-5)


def test_a_box_keeps_the_tool_of_a_cartesian_robot_in() -> None:
    found, kinematics, _ = SETUPS["cartesian"]()
    found = found.model_copy(update={"on_far_start": "ramp", "freshness": found.freshness.model_copy(update={"deadman": None})})
    safety, out = SafetyFilter(found, kinematics), np.array([0.3, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert safety.start(out, Stamp(0.0), 0.0) == ()
    for k in range(2000):
        result = safety(k * 0.01, out, np.array([0.85, 0.55, 0.3, 0.0, 0.0, 1.0]), stamps={"state": Stamp(k * 0.01)})
        assert result.executed is not None
        out = result.executed
    assert out == pytest.approx([0.695, 0.395, 0.3, 0.0, 0.0, 1.0], abs=1e-5)


def test_a_start_outside_the_box_is_refused_or_only_comes_in() -> None:
    safety, kinematics, _ = box_arm()
    outside = np.append(arm.home(0.70, 0.10), 0.04)
    outside[1] += 0.2
    safety = SafetyFilter(load_limits("arm"), kinematics)
    assert [reason.kind for reason in safety.start(outside, Stamp(0.0), 0.0)] == ["start_outside"]
    q = np.append(arm.home(0.45, -0.010), 0.04)  # 14 mm below the box
    assert safety.start(q, Stamp(0.0), 0.0) == ()
    height = -0.010
    for k in range(500):
        result = safety(k * DT, q, np.append(arm.home(0.45, 0.05), 0.04), stamps={"state": Stamp(k * DT)})
        assert result.executed is not None
        q = result.executed
        assert kinematics.points(q)[0, 2] >= height - 1e-5
        height = min(0.004, max(height, float(kinematics.points(q)[0, 2])))
    assert height == 0.004


class Elbow:
    """A tool at ``x, y, z`` and an elbow at the height of a fourth coordinate."""

    names = ("tool", "elbow")
    levers = None

    def points(self, coordinates: np.ndarray) -> np.ndarray:
        return np.array([coordinates[:3], [0.0, 0.0, coordinates[3]]])

    def jacobians(self) -> np.ndarray:
        found = np.zeros((2, 3, 4))
        found[0, :, :3], found[1, 2, 3] = np.eye(3), 1.0
        return found


def test_the_table_is_for_every_point_and_the_box_for_the_tool() -> None:
    place = {"unit": "m", "lower": -1.0, "upper": 1.0, "velocity": 1.0, "acceleration": 5.0, "jerk": 100.0}
    document = {
        "coordinates": [{"name": name, **place} for name in ("x", "y", "z", "elbow")],
        "workspace": {"lower": [-0.3, -0.3, 0.1], "upper": [0.3, 0.3, 0.5], "table": 0.05},
        "ramp": 1.0,
    }
    safety, q = SafetyFilter(SafetyLimits.model_validate_json(json.dumps(document)), Elbow()), np.array([0.0, 0.0, 0.3, 0.8])
    assert safety.start(q, Stamp(0.0), 0.0) == ()
    for k in range(1500):
        result = safety(k * DT, q, np.array([0.0, 0.0, 0.3, -0.5]), stamps={"state": Stamp(k * DT)})
        assert result.executed is not None
        q = result.executed
    assert q == pytest.approx([0.0, 0.0, 0.3, 0.055], abs=1e-4)  # above the box, as it may be, and not below the table
    assert ("workspace", "elbow.z") in [(reason.kind, reason.what) for reason in result.reasons]


def test_a_stop_is_looked_at_to_its_end_and_a_widened_box_closes() -> None:
    found, kinematics, _ = SETUPS["cartesian"]()
    assert found.workspace is not None
    workspace, still = Workspace(found.workspace, kinematics), np.ones(6)
    inside, outside = np.array([0.3, 0.0, 0.3, 0.0, 0.0, 0.0]), np.array([0.19, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert workspace.admits(inside, still, 0.2, lambda time: inside)
    assert not workspace.admits(inside, still, 0.2, lambda time: outside if time > 0.15 else inside)
    assert not workspace.admits(outside, still, 0.2, lambda time: inside)
    workspace.seat(outside)
    assert workspace.admits(outside, still, 0.2, lambda time: inside)
    workspace.close(inside)
    assert not workspace.admits(outside, still, 0.2, lambda time: inside)


def test_levers_bound_how_far_points_move() -> None:
    kinematics, rng = ArmKinematics(), np.random.default_rng(0)
    assert kinematics.levers is not None
    for _ in range(300):
        q = np.append(rng.uniform(arm.LOWER, arm.UPPER), 0.04)
        kinematics.points(q)
        reach = np.linalg.norm(kinematics.jacobians(), axis=1)
        assert (reach <= kinematics.levers + 1e-9).all()


def test_jacobians_are_derivatives_of_the_points() -> None:
    kinematics, rng = ArmKinematics(), np.random.default_rng(1)
    q, step = np.append(rng.uniform(arm.LOWER, arm.UPPER), 0.04), 1e-6
    points = kinematics.points(q).copy()
    jacobians = kinematics.jacobians().copy()
    for i in range(8):
        moved = q.copy()
        moved[i] += step
        assert (kinematics.points(moved) - points) / step == pytest.approx(jacobians[:, :, i], abs=1e-5)


# ---- motion and config ---------------------------------------------------------------------------------------------------------


def test_a_step_that_leaves_no_room_to_stop_is_not_taken() -> None:
    motion = Motion(DT, np.ones(1), np.full(1, 5.0), np.full(1, 100.0))
    motion.seat(np.zeros(1), np.array([-0.5]), np.array([0.5]))
    taken = 0
    for _ in range(400):  # a target beyond the bounds, as nothing above would let through
        if motion.propose(np.array([3.0]), None, 1.0, lambda *_: True):
            taken += 1
        else:
            motion.brake()
        assert motion.position[0] <= 0.5 + 1e-6
    assert taken > 50
    assert motion.position[0] > 0.45


def test_kinematics_that_answer_nan_let_nothing_through() -> None:
    class Broken(CartesianKinematics):
        broken = False

        def points(self, coordinates: np.ndarray) -> np.ndarray:
            return np.full((1, 3), np.nan) if self.broken else super().points(coordinates)

    joint = {"lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0}
    box = {"lower": [-0.5] * 3, "upper": [0.5] * 3}
    bounds = parse(SafetyLimits, {"coordinates": [{"name": name, **joint} for name in "xyz"], "workspace": box})
    safety = SafetyFilter(bounds, kinematics := Broken(3))
    kinematics.broken = True
    assert [reason.kind for reason in safety.start(np.zeros(3), Stamp(0.0), 0.0)] == ["start_outside"]
    kinematics.broken = False
    assert safety.start(np.zeros(3), Stamp(0.0), 0.0) == ()
    kinematics.broken = True
    for tick in range(1, 100):
        result = safety(tick * DT, safety.set_point, np.full(3, 0.1), stamps={"state": Stamp(tick * DT)})
    np.testing.assert_array_equal(result.executed, np.zeros(3))


def test_cartesian_kinematics_are_the_first_three_coordinates() -> None:
    kinematics = CartesianKinematics(6)
    assert kinematics.points(np.arange(6.0)).tolist() == [[0.0, 1.0, 2.0]]
    assert kinematics.jacobians().shape == (1, 3, 6)
