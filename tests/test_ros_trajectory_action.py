"""FollowJointTrajectory on the virtual arm: which goals are taken, how they end. control_msgs is in no package: stand-ins."""

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ros import Sandbox

from hardware.ros2 import controllers
from hardware.ros2.contract import message_type
from hardware.ros2.trajectories import WATCH, Trajectories, TrajectoryGoals
from robopolicy.deploy.clock import FakeClock
from robopolicy.deploy.limits import load_limits
from sim.driver import CommandError, Driver
from sim.virtual import ArmWorld

JOINTS = [f"joint{i}" for i in range(1, 8)]
FIRST, FOURTH = np.eye(7)[0], np.eye(7)[3]
ARM = np.arange(7)
NOW = 1000.0  # of stamps, when a rig begins [s]


def duration(seconds: float) -> SimpleNamespace:
    return SimpleNamespace(sec=int(seconds // 1), nanosec=round(seconds % 1 * 1e9))


def point(positions: Any, seconds: float, **more: Any) -> SimpleNamespace:
    values = {"positions": list(positions), "velocities": [], "accelerations": [], "effort": []} | more
    return SimpleNamespace(time_from_start=duration(seconds), **values)


def trajectory(*points: SimpleNamespace, joints: list[str] = JOINTS, stamp: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), joint_names=joints, points=list(points))


def tolerance(name: str, position: float = 0.0, velocity: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(name=name, position=position, velocity=velocity, acceleration=0.0)


class Action:
    """``control_msgs/action/FollowJointTrajectory``."""

    class Result(SimpleNamespace):
        SUCCESSFUL, INVALID_GOAL, INVALID_JOINTS, OLD_HEADER_TIMESTAMP, PATH_TOLERANCE_VIOLATED, GOAL_TOLERANCE_VIOLATED = (
            0, -1, -2, -3, -4, -5
        )  # fmt: skip

    class Feedback(SimpleNamespace):
        def __init__(self) -> None:
            parts = {name: SimpleNamespace() for name in ("header", "desired", "actual", "error")}
            super().__init__(joint_names=[], **parts)


class Handle:
    """``rclpy.action.server.ServerGoalHandle``: a goal's states, and what may follow on which."""

    def __init__(self, request: Any) -> None:
        self.request, self.state = request, "executing"
        self.feedback: list[Any] = []
        self.results: list[Any] = []

    @property
    def is_cancel_requested(self) -> bool:
        return self.state == "canceling"

    @property
    def code(self) -> int:
        (result,) = self.results
        return int(result.error_code)

    @property
    def why(self) -> str:
        (result,) = self.results
        return str(result.error_string)

    def publish_feedback(self, feedback: Any) -> None:
        self.feedback.append(feedback)

    def succeed(self) -> None:
        self._end("succeeded", "executing", "canceling")

    def abort(self) -> None:
        self._end("aborted", "executing", "canceling")

    def canceled(self) -> None:
        self._end("canceled", "canceling")

    def _end(self, state: str, *allowed: str) -> None:
        assert self.state in allowed, f"{self.state} -> {state}"
        self.state = state


class Rig:
    """The goals of a driver on a fake clock."""

    def __init__(self, world: ArmWorld) -> None:
        self.clock, self.warnings = FakeClock(5.0), list[str]()
        self.driver = Driver(world, load_limits("arm"), self.clock)
        self.driver.reset(100_000)
        self.world, self.begin = world, world.positions[:7].copy()
        age: Callable[[Any], float | None] = lambda stamp: self.clock.now() - 5.0 + NOW - stamp if stamp else None  # noqa: E731
        self.trajectories = Trajectories(self.driver, JOINTS, age)
        self.goals = TrajectoryGoals(self.driver, self.trajectories, Action, lambda: self.clock.now(), self.warnings.append)

    def send(self, *points: SimpleNamespace, **more: Any) -> Handle:
        """A goal that is taken."""
        goal = {"path_tolerance": [], "goal_tolerance": [], "goal_time_tolerance": duration(0.0)} | more
        handle = Handle(SimpleNamespace(trajectory=trajectory(*points), **goal))
        self.goals.check(handle.request)
        self.goals.start(handle, handle.results.append)
        return handle

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * WATCH)):
            self.clock.time += 1.0 / WATCH
            self.driver.advance()
            self.goals.update()

    def moved(self) -> float:
        """Joint 1, since the beginning."""
        return float(self.world.positions[0] - self.begin[0])


@pytest.fixture(scope="module")
def world() -> ArmWorld:
    return ArmWorld("lift")


@pytest.fixture
def rig(world: ArmWorld) -> Rig:
    return Rig(world)


# ---- what is taken -----------------------------------------------------------------------------------------------------------


def test_joints_come_in_any_order(rig: Rig) -> None:
    goal = (rig.begin + 0.1 * FIRST)[::-1]
    columns, times, points = rig.trajectories.read(trajectory(point(goal, 1.5), joints=JOINTS[::-1]))
    assert columns.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert times.tolist() == [1.5]
    assert points.tolist() == [goal.tolist()]


@pytest.mark.parametrize(
    ("code", "why", "make"),
    [
        ("INVALID_JOINTS", "expected joint1", lambda q: trajectory(point(q[:6], 1.0), joints=JOINTS[:6])),
        ("INVALID_JOINTS", "for no joints", lambda q: trajectory(point([], 1.0), joints=[])),
        ("INVALID_JOINTS", "elbow", lambda q: trajectory(point(q, 1.0), joints=[*JOINTS[:6], "elbow"])),
        ("INVALID_JOINTS", "joint1, joint1", lambda q: trajectory(point(q, 1.0), joints=["joint1", *JOINTS[:6]])),
        ("INVALID_GOAL", "0 times", lambda q: trajectory()),
        ("INVALID_GOAL", "has not 7 positions", lambda q: trajectory(point(q[:6], 1.0))),
        ("INVALID_GOAL", "7 velocities", lambda q: trajectory(point(q, 1.0, velocities=[0.0]), point(q, 2.0))),
        ("INVALID_GOAL", "efforts", lambda q: trajectory(point(q, 1.0, effort=[0.0] * 7))),
        ("INVALID_GOAL", "must increase", lambda q: trajectory(point(q, 1.0), point(q, 1.0))),
        ("INVALID_GOAL", "no velocity", lambda q: trajectory(point(q, 1.0, velocities=[0.0] * 6 + [0.1]))),
        ("INVALID_GOAL", "no velocity", lambda q: trajectory(point(q, 1.0, velocities=[0.0] * 6 + [float("nan")]))),
        ("INVALID_GOAL", "not finite", lambda q: trajectory(point([*q[:6], float("nan")], 1.0))),
        ("OLD_HEADER_TIMESTAMP", "past", lambda q: trajectory(point(q, 1.0), stamp=NOW - 1.5)),
    ],
)
def test_what_the_controller_refuses_is_refused_and_a_running_goal_goes_on(
    rig: Rig, code: str, why: str, make: Callable[[Any], Any]
) -> None:
    running = rig.send(point(rig.begin + 0.1 * FIRST, 1.0))
    with pytest.raises(CommandError, match=why) as error:
        rig.goals.check(SimpleNamespace(trajectory=make(rig.begin)))
    assert error.value.code == code
    assert rig.driver.record.counts["refused"] == 1
    rig.wait(1.5)
    assert running.state == "succeeded"


def test_a_goal_that_became_past_before_it_began_is_aborted(rig: Rig) -> None:
    handle = Handle(SimpleNamespace(trajectory=trajectory(point(rig.begin, 1.0), stamp=NOW)))
    rig.goals.check(handle.request)
    rig.clock.time += 2.0
    rig.goals.start(handle, handle.results.append)
    assert (handle.state, handle.code) == ("aborted", Action.Result.OLD_HEADER_TIMESTAMP)


# ---- how goals end -----------------------------------------------------------------------------------------------------------


def test_a_goal_succeeds_when_the_arm_stands_at_its_end(rig: Rig) -> None:
    handle = rig.send(point(rig.begin + 0.1 * FIRST, 0.5), point(rig.begin + 0.2 * FIRST, 1.5))
    rig.wait(1.4)
    assert handle.state == "executing"
    rig.wait(0.6)
    assert (handle.state, handle.code) == ("succeeded", Action.Result.SUCCESSFUL)
    assert rig.moved() == pytest.approx(0.2, abs=2e-3)
    early, late = handle.feedback[19], handle.feedback[49]  # at 0.4 s and 1 s
    assert early.joint_names == JOINTS
    assert early.desired.positions[0] == pytest.approx(rig.begin[0] + 0.08, abs=1e-6)
    assert early.desired.velocities[0] == pytest.approx(0.2)
    assert late.desired.velocities[0] == pytest.approx(0.1)
    assert late.actual.velocities[0] == pytest.approx(0.1, abs=0.02)
    assert late.error.positions[0] == pytest.approx(late.desired.positions[0] - late.actual.positions[0])
    rig.wait(0.5)
    assert len(handle.results) == 1


def test_a_new_goal_ends_the_one_before(rig: Rig) -> None:
    first = rig.send(point(rig.begin + 0.4 * FIRST, 2.0))
    rig.wait(0.5)
    second = rig.send(point(rig.begin, 0.5))
    assert (first.state, first.code, first.why) == ("aborted", Action.Result.INVALID_GOAL, "another goal came")
    rig.wait(1.0)
    assert second.state == "succeeded"
    assert rig.moved() == pytest.approx(0.0, abs=2e-3)


@pytest.mark.parametrize("kind", ["topic", "stream", "reset"])
def test_another_command_ends_a_goal_and_is_carried_out(rig: Rig, kind: str) -> None:
    handle = rig.send(point(rig.begin + 0.4 * FIRST, 2.0))
    rig.wait(0.5)
    if kind == "topic":
        rig.driver.follow(*rig.trajectories.read(trajectory(point(rig.begin, 0.5))))
    elif kind == "stream":
        rig.driver.stream(ARM, rig.driver.progress().targets[:7])
    else:
        rig.driver.reset(100_000)
    rig.wait(1.0)
    assert (handle.state, handle.code) == ("aborted", Action.Result.INVALID_GOAL)
    assert "another command came" in handle.why
    assert rig.moved() == pytest.approx(0.1 if kind == "stream" else 0.0, abs=2e-3)


def test_after_its_end_a_goal_leaves_the_arm_to_others(rig: Rig) -> None:
    handle = rig.send(point(rig.begin, 0.2))
    rig.wait(0.5)
    rig.driver.follow(ARM, np.array([0.5]), (rig.begin + 0.05 * FIRST)[None])
    rig.wait(1.0)
    assert handle.state == "succeeded"
    assert not rig.goals.cancel(handle)
    assert rig.moved() == pytest.approx(0.05, abs=2e-3)


def test_a_cancelled_goal_holds_the_arm_where_it_is(rig: Rig) -> None:
    handle = rig.send(point(rig.begin + 0.4 * FIRST, 2.0))
    rig.wait(1.0)
    assert rig.goals.cancel(handle)
    handle.state = "canceling"  # as rclpy does when the callback says yes
    rig.wait(0.5)
    assert handle.state == "canceled"
    assert rig.moved() == pytest.approx(0.2, abs=2e-3)
    rig.driver.stream(ARM, rig.begin + 0.21 * FIRST)
    rig.wait(0.5)
    assert rig.moved() == pytest.approx(0.21, abs=2e-3), "takes commands again, from there"


def test_cancelling_does_not_stop_who_came_after_the_goal(rig: Rig) -> None:
    handle = rig.send(point(rig.begin + 0.4 * FIRST, 2.0))
    rig.wait(0.1)
    rig.driver.follow(ARM, np.array([0.5]), rig.begin[None])
    assert rig.goals.cancel(handle)
    handle.state = "canceling"
    rig.wait(1.0)
    assert handle.state == "canceled"
    assert rig.moved() == pytest.approx(0.0, abs=2e-3)


def test_a_leap_in_any_segment_of_a_trajectory_is_a_reflex(rig: Rig) -> None:
    handle = rig.send(point(rig.begin, 1.0), point(rig.begin + 1.0 * FIRST, 1.004))
    rig.wait(1.1)
    assert handle.state == "aborted"
    assert "reflex: joint1 was told to move 1 rad in 0.004 s" in handle.why
    assert abs(rig.moved()) < 0.01
    assert rig.driver.record.counts["reflexes"] == 1


def test_a_reflex_ends_a_goal_and_no_other_is_taken(rig: Rig) -> None:
    handle = rig.send(point(rig.begin + 0.4 * FIRST, 2.0))
    rig.wait(0.5)
    rig.driver.stream(ARM, rig.begin + 0.5 * FOURTH)
    rig.wait(0.5)
    assert (handle.state, handle.code) == ("aborted", Action.Result.INVALID_GOAL)
    assert "reflex: joint4 was told" in handle.why
    with pytest.raises(CommandError, match="the arm stands: joint4"):
        rig.send(point(rig.begin, 1.0))
    rig.driver.reset_reflex()
    fast = rig.send(point(rig.begin + 3.0 * FIRST, 0.2))
    rig.wait(0.1)
    assert "reflex: joint1 was told" in fast.why
    assert "goal aborted, INVALID_GOAL: reflex: joint1" in rig.warnings[-1]


# ---- tolerances --------------------------------------------------------------------------------------------------------------


def test_a_violated_path_tolerance_holds_the_arm(rig: Rig) -> None:
    handle = rig.send(point(rig.begin + 0.5 * FIRST, 1.0), path_tolerance=[tolerance("joint1", position=1e-3)])
    rig.wait(1.0)
    assert (handle.state, handle.code) == ("aborted", Action.Result.PATH_TOLERANCE_VIOLATED)
    assert handle.why.startswith("path tolerance: joint1 is ")
    assert rig.moved() < 0.1


@pytest.mark.parametrize("bounds", [{"position": 1e-9}, {"velocity": 1e-12}])
def test_a_goal_that_is_not_reached_in_its_time_is_aborted(rig: Rig, bounds: dict[str, float]) -> None:
    impossible = [tolerance("joint1", **bounds)]
    handle = rig.send(point(rig.begin + 0.1 * FIRST, 0.5), goal_tolerance=impossible, goal_time_tolerance=duration(0.3))
    rig.wait(0.7)
    assert handle.state == "executing"
    rig.wait(0.3)
    assert (handle.state, handle.code) == ("aborted", Action.Result.GOAL_TOLERANCE_VIOLATED)
    patient = rig.send(point(rig.begin + 0.2 * FIRST, 0.5), goal_tolerance=impossible)
    rig.wait(1.0)
    assert patient.state == "executing", "no time says: as long as it takes"


def test_tolerances_of_minus_one_are_none(rig: Rig) -> None:
    handle = rig.send(point(rig.begin + 0.5 * FIRST, 1.0), goal_tolerance=[tolerance(name, velocity=-1.0) for name in JOINTS])
    rig.wait(1.02)
    assert handle.state == "succeeded", "at once; else it would have to stand"
    assert rig.world.velocities[0] > 0.1


@pytest.mark.parametrize(("name", "value"), [("elbow", 0.1), ("joint2", -2.0), ("joint2", float("nan"))])
def test_impossible_tolerances_are_told_and_the_defaults_hold(rig: Rig, name: str, value: float) -> None:
    tolerances = [tolerance("joint1", position=1e-3), tolerance(name, position=value)]
    handle = rig.send(point(rig.begin + 0.5 * FIRST, 1.0), path_tolerance=tolerances)
    rig.wait(1.5)
    assert handle.state == "succeeded"
    (warning,) = rig.warnings
    assert name in warning


# ---- the trajectory itself ---------------------------------------------------------------------------------------------------


def test_points_that_are_past_are_left_out(rig: Rig) -> None:
    wave = trajectory(
        point(rig.begin - 0.2 * FIRST, 0.5), point(rig.begin - 0.1 * FIRST, 1.0), point(rig.begin + 0.1 * FIRST, 2.0),
        stamp=NOW - 1.5,
    )  # fmt: skip
    rig.driver.follow(*rig.trajectories.read(wave))
    rig.wait(0.24)
    assert rig.driver.progress().targets[0] == pytest.approx(rig.begin[0] + 0.048, abs=1e-3)
    rig.wait(0.5)
    assert rig.moved() == pytest.approx(0.1, abs=2e-3)


def test_a_trajectory_that_follows_on_a_stream_does_not_leap_to_its_end(rig: Rig) -> None:
    rig.driver.stream(ARM, rig.begin)
    rig.driver.follow(ARM, np.array([1.0]), (rig.begin + 0.5 * FIRST)[None])
    rig.wait(0.02)  # shorter than it takes to reach what was streamed
    assert rig.driver.progress().targets[0] == pytest.approx(rig.begin[0] + 0.01, abs=2e-3)


def test_a_stream_into_a_trajectory_is_judged_from_where_the_arm_is(rig: Rig) -> None:
    rig.driver.follow(ARM, np.array([2.0]), (rig.begin + 0.4 * FIRST)[None])
    rig.wait(0.5)
    rig.driver.stream(ARM, rig.begin + 0.1 * FIRST)
    assert rig.driver.reflex == ""
    rig.driver.follow(ARM, np.array([2.0]), (rig.begin + 0.4 * FIRST)[None])
    rig.driver.stream(ARM, rig.begin + 0.4 * FIRST)
    assert "joint1 was told to move 0.3 rad" in rig.driver.reflex


# ---- ROS ---------------------------------------------------------------------------------------------------------------------


def test_nothing_waits_for_a_goal_and_its_result_is_handed_over_at_its_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from rclpy.action import CancelResponse, GoalResponse

    timers: list[Callable[[], None]] = []
    told: list[tuple[Any, Any]] = []

    class Server:
        """``rclpy.action.ActionServer``, with nobody to serve."""

        def __init__(self, node: Any, action: Any, name: str, execute: Any, *, goal_callback: Any, cancel_callback: Any) -> None:
            self.name, self.asked, self.cancelled = name, goal_callback, cancel_callback

        def notify_execute(self, handle: Any, callback: Callable[[Any], Any]) -> None:
            told.append((handle, callback(handle)))

    warnings: list[str] = []
    logger = SimpleNamespace(warning=warnings.append)
    node = SimpleNamespace(create_timer=lambda period, look: timers.append(look), get_logger=lambda: logger)
    monkeypatch.setattr("rclpy.action.ActionServer", Server)
    server = controllers.serve_goals(node, Action, "follow", rig.goals)
    (look,) = timers

    handle = rig.send(point(rig.begin + 0.1 * FIRST, 0.5))
    assert server.asked(handle.request) is GoalResponse.ACCEPT
    wrong = SimpleNamespace(trajectory=trajectory(point(rig.begin[:6], 0.5), joints=JOINTS[:6]))
    assert server.asked(wrong) is GoalResponse.REJECT
    assert "goal rejected, INVALID_JOINTS" in warnings[0]
    handle = Handle(handle.request)
    server.notify_execute(handle, None)
    assert told == []
    assert server.cancelled(Handle(handle.request)) is CancelResponse.REJECT, "another one"
    rig.wait(1.0)
    ((who, result),) = told
    assert who is handle
    assert (handle.state, result.error_code) == ("succeeded", 0)
    look()


def test_without_control_msgs_the_arm_says_that_there_is_no_action_and_takes_the_topic(
    ros: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ros.folder / "control_msgs.py").write_text("raise ImportError('hidden by the test')")  # a sourced ROS may have it
    monkeypatch.setenv("PYTHONPATH", str(ros.folder), prepend=os.pathsep)
    arm = ros.start("hardware.ros2.virtual_arm", seed=100_000, cameras=False)
    arm.wait_for_output("Hz of physics")
    (line,) = [line for line in arm.output().splitlines() if "joint_trajectory_controller/follow_joint_trajectory" in line]
    assert "[INFO]" in line
    assert "is not served: there is no message control_msgs/action/FollowJointTrajectory here (hidden by the test)" in line
    message = message_type("trajectory_msgs/msg/JointTrajectory")(joint_names=JOINTS[:6])
    publisher = ros.node.create_publisher(type(message), controllers.TRAJECTORY_TOPIC, 1)
    ros.until(lambda: publisher.get_subscription_count() > 0, what="somebody who takes trajectories")
    publisher.publish(message)
    arm.wait_for_output("expected joint1")
    record = json.loads(ros.call(message_type("std_srvs/srv/Trigger"), "virtual_arm/record").message)
    assert record["refused"] == 1
