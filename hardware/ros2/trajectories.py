"""Trajectories as joint_trajectory_controller takes them, and goals of FollowJointTrajectory as it watches and ends them. No ROS.

The defaults are the controller's: no path tolerance, no goal tolerance but that joints stand, as long to reach it as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from sim.driver import CommandError, Driver, Progress

WATCH = 50.0  # a running goal is looked at so often [Hz]
STOPPED = 0.01  # a joint that is slower stands [rad/s]: the controller's `stopped_velocity_tolerance`
_MOVING = 1e-7  # the last point's velocities may not be more [rad/s]


class Trajectories:
    """Reads ``trajectory_msgs/JointTrajectory`` as joint_trajectory_controller does: joints by name, all of them.

    Args:
        driver: Counts what is refused.
        joints: Of the controller, in its order.
        age: Seconds since a header stamp; None for the stamp 0, which means now.

    Attributes:
        joints: Names.
        columns: Of the driver's coordinates ``[n]``.
    """

    def __init__(self, driver: Driver, joints: Iterable[str], age: Callable[[Any], float | None]) -> None:
        self._driver, self._age, self.joints = driver, age, list(joints)
        names = list(driver.world.names)
        self.columns = np.array([names.index(name) for name in self.joints])

    def read(self, message: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Columns ``[n]``, times from now ``[k]`` [s] and points ``[k, n]``, for :meth:`sim.driver.Driver.follow`.

        Raises:
            CommandError: The controller would not take it.
        """
        refusal, found, points = self._driver.refusal, list(message.joint_names), list(message.points)
        if sorted(found) != sorted(self.joints):
            expected = ", ".join(self.joints)
            raise refusal(f"trajectory for {', '.join(found) or 'no joints'}; expected {expected}", "INVALID_JOINTS")
        if any(len(point.positions) != len(found) for point in points):
            raise refusal(f"a point of a trajectory has not {len(found)} positions")
        if any(len(values) not in (0, len(found)) for point in points for values in (point.velocities, point.accelerations)):
            raise refusal(f"a point of a trajectory has not {len(found)} velocities and accelerations, or none")
        if any(len(point.effort) for point in points):
            raise refusal("efforts in a trajectory are not supported")
        if points and not all(abs(velocity) <= _MOVING for velocity in points[-1].velocities):
            raise refusal("the last point of a trajectory must have no velocity")
        begin = -(self._age(message.header.stamp) or 0.0)
        times = np.array([begin + _seconds(point.time_from_start) for point in points])
        columns = self.columns[[self.joints.index(name) for name in found]]
        positions = np.array([list(point.positions) for point in points])
        self._driver.check_trajectory(columns, times, positions)
        return columns, times, positions


class GoalHandle(Protocol):
    """What a goal can be told: ``rclpy.action.server.ServerGoalHandle``."""

    @property
    def request(self) -> Any: ...

    @property
    def is_cancel_requested(self) -> bool: ...

    def publish_feedback(self, feedback: Any) -> None: ...

    def succeed(self) -> None: ...

    def abort(self) -> None: ...

    def canceled(self) -> None: ...


class _Bounds(NamedTuple):
    """How far joints may be from where they should be ``[n]``: positions and velocities; infinite: as far as they like."""

    positions: np.ndarray
    velocities: np.ndarray

    def violation(self, joints: list[str], positions: np.ndarray, velocities: np.ndarray) -> str:
        """The worst joint's, by errors of positions and velocities ``[n]``; empty: none."""
        for errors, bounds, unit in ((positions, self.positions, "rad"), (velocities, self.velocities, "rad/s")):
            ratios = np.abs(errors) / bounds
            i = int(ratios.argmax())
            if ratios[i] > 1.0:
                return f"{joints[i]} is {abs(errors[i]):.3g} {unit} off, tolerance {bounds[i]:g}"
        return ""


@dataclass
class _Running:
    """The goal that the arm carries out."""

    handle: GoalHandle
    done: Callable[[Any], None]
    command: int  # the driver's number of it
    path: _Bounds
    goal: _Bounds
    patience: float  # after its end, to reach it [s]
    cancelled: bool = False


class TrajectoryGoals:
    """Goals of FollowJointTrajectory, one at a time. Every method from the same thread; none waits.

    Args:
        driver: Of the arm.
        trajectories: Checks and reads them, as for the topic.
        action: ``control_msgs/action/FollowJointTrajectory``.
        stamp: The header stamp of now.
        warn: Told why goals are aborted, and of tolerances that are ignored.
    """

    def __init__(
        self, driver: Driver, trajectories: Trajectories, action: Any, stamp: Callable[[], Any], warn: Callable[[str], Any]
    ) -> None:
        self._driver, self._trajectories, self._action = driver, trajectories, action
        self._stamp, self._warn = stamp, warn
        self._running: _Running | None = None

    def check(self, request: Any) -> None:
        """Raises CommandError for a goal that is not taken."""
        if self._driver.reflex:
            raise self._driver.refusal(f"the arm stands: {self._driver.reflex}")
        self._trajectories.read(request.trajectory)

    def start(self, handle: GoalHandle, done: Callable[[Any], None]) -> None:
        """Carry a goal out instead of the one before; ``done`` is given the result, once."""
        request = handle.request
        try:
            command = self._driver.follow(*self._trajectories.read(request.trajectory))
        except CommandError as error:  # it ended since it was checked
            self._tell(handle, done, error.code, str(error))
            return
        if self._running is not None:
            self._end(self._running, "INVALID_GOAL", "another goal came")
        path, goal = self._bounds(request.path_tolerance), self._bounds(request.goal_tolerance, STOPPED)
        patience = _seconds(request.goal_time_tolerance)
        self._running = _Running(handle, done, command, path, goal, patience if patience > 0 else float("inf"))

    def cancel(self, handle: GoalHandle) -> bool:
        """The arm holds at once; the goal ends when it is looked at next. Whether it is the goal that runs."""
        run = self._running
        if run is None or run.handle is not handle:
            return False
        if not self._stopped(run, self._driver.progress()):
            self._driver.hold()
        run.cancelled = True
        return True

    def update(self) -> None:
        """Look how the goal fares: feedback, and its end. To be called :data:`WATCH` times a second."""
        if (run := self._running) is None:
            return
        progress = self._driver.progress()
        if run.cancelled:
            self._end(run, "SUCCESSFUL", "cancelled: the arm holds")  # the controller's result has this code, too
        elif why := self._stopped(run, progress):
            self._end(run, "INVALID_GOAL", why)
        else:
            self._watch(run, progress)

    def _stopped(self, run: _Running, progress: Progress) -> str:
        """Why the arm does not carry the goal out any more; empty: it does."""
        if self._driver.reflex:
            return f"reflex: {self._driver.reflex}"
        return "another command came, or the arm was reset" if progress.command != run.command else ""

    def _watch(self, run: _Running, progress: Progress) -> None:
        columns, feedback = self._trajectories.columns, self._action.Feedback()
        desired = progress.targets[columns], progress.speeds[columns]
        actual = progress.positions[columns], progress.velocities[columns]
        error = desired[0] - actual[0], desired[1] - actual[1]
        feedback.header.stamp, feedback.joint_names = self._stamp(), self._trajectories.joints
        for name, (positions, velocities) in (("desired", desired), ("actual", actual), ("error", error)):
            point = getattr(feedback, name)
            point.positions, point.velocities = positions.tolist(), velocities.tolist()
        run.handle.publish_feedback(feedback)
        if progress.left > 0:
            if off := run.path.violation(self._trajectories.joints, *error):
                self._driver.hold()
                self._end(run, "PATH_TOLERANCE_VIOLATED", f"path tolerance: {off}")
        elif not (off := run.goal.violation(self._trajectories.joints, *error)):
            self._end(run, "SUCCESSFUL", "goal reached")
        elif -progress.left > run.patience:
            self._end(run, "GOAL_TOLERANCE_VIOLATED", f"goal tolerance, {run.patience:g} s after the end: {off}")

    def _end(self, run: _Running, code: str, why: str) -> None:
        self._running = None
        self._tell(run.handle, run.done, code, why)

    def _tell(self, handle: GoalHandle, done: Callable[[Any], None], code: str, why: str) -> None:
        result = self._action.Result()
        result.error_code, result.error_string = getattr(self._action.Result, code), why
        if handle.is_cancel_requested:
            handle.canceled()
        elif code == "SUCCESSFUL":
            handle.succeed()
        else:
            handle.abort()
            self._warn(f"goal aborted, {code}: {why}")
        done(result)

    def _bounds(self, tolerances: Iterable[Any], speed: float = float("inf")) -> _Bounds:
        """Of a goal's JointTolerances: 0 is the default, -1 none. If one is impossible, the defaults hold for all.

        ``speed``: default of velocities.
        """
        joints = self._trajectories.joints
        default = _Bounds(np.full(len(joints), np.inf), np.full(len(joints), speed))
        bounds = _Bounds(default.positions.copy(), default.velocities.copy())
        for tolerance in tolerances:
            if tolerance.name not in joints:
                self._warn(f"tolerance for joint '{tolerance.name}', which the controller has not: defaults hold for all")
                return default
            for kept, value in ((bounds.positions, tolerance.position), (bounds.velocities, tolerance.velocity)):
                if value != -1 and not value >= 0:
                    self._warn(f"tolerance {value:g} of {tolerance.name} is neither -1, 0 nor positive: defaults hold for all")
                    return default
                if value != 0:
                    kept[joints.index(tolerance.name)] = np.inf if value == -1 else value
        return bounds


def _seconds(duration: Any) -> float:
    """Of ``builtin_interfaces/Duration``."""
    return float(duration.sec + 1e-9 * duration.nanosec)
