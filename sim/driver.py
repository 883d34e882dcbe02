"""``Driver``: what stands between the topics of a real arm and its joints, around a :class:`sim.virtual.World`.

It keeps physics in step with a clock, carries out position targets as a robot's controller does, trips like one when they jump,
and keeps the record by which safety is judged (:mod:`sim.record`). No ROS.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robopolicy.deploy.clock import Clock
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.workspace import Kinematics
from robopolicy.errors import RobopolicyError
from sim.record import Record
from sim.virtual import Joints, World

REFLEX_SPEED = 1.6  # times the joint's rated speed: about where libfranka and UR's controllers stop the arm
REFLEX_STEP = 0.1  # between two commands [rad]
CATCH_UP = 0.8  # of the time between commands is what each gets at least, when several come at once
LOOKAHEAD = 0.03  # streamed targets are reached in so long [s]: the least that UR's `servoj` takes
MAX_LAG = 0.1  # physics that is this late gives time up instead of catching up [s]
_SMOOTHING = 0.05  # of the average time between commands


class CommandError(RobopolicyError):
    """A command that a controller would not take.

    Attributes:
        code: The error's name in FollowJointTrajectory.
    """

    def __init__(self, why: str, code: str = "INVALID_GOAL") -> None:
        super().__init__(why)
        self.code = code


class Snapshot(NamedTuple):
    """The world at one time.

    Attributes:
        time: On the driver's clock [s].
        joints: As measured.
        poses: Of the objects.
        picture: For :meth:`World.eye`.
    """

    time: float
    joints: Joints
    poses: dict[str, np.ndarray]
    picture: np.ndarray


class Progress(NamedTuple):
    """How far the arm has come with what it was told; arrays ``[n]``, of the coordinates.

    Attributes:
        command: Number of the newest command. It changes when another comes, also by a reset.
        left: Until the end of its trajectory; negative: since then [s].
        targets: Set points of the servos.
        speeds: At which the set points move along the trajectory.
        positions: As they are.
        velocities: As they are.
    """

    command: int
    left: float
    targets: np.ndarray
    speeds: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray


class Driver:
    """Set points, reflexes and time of one arm. Every method may be called from any thread.

    A command takes effect when it comes, not when physics is stepped next: physics that is late on a busy machine would otherwise
    see several commands at once, and jerk as no arm does.

    Args:
        world: Moved by nobody else; reset.
        limits: Of the arm, for reflexes and the record; their names are the world's.
        clock: Physics keeps up with it.
        rate: At which commands are expected [Hz].
        lookahead: Streamed targets are reached on a straight line in so long [s]: robots' controllers smooth what they are
            sent, UR's by 0.03 s at least.
        kinematics: Of the points that the record holds against workspace and table; None: the world's.

    Attributes:
        reflex: Why the arm has stopped by itself and takes no commands; empty while it does.
    """

    def __init__(
        self,
        world: World,
        limits: SafetyLimits,
        clock: Clock,
        *,
        rate: float = 100.0,
        lookahead: float = LOOKAHEAD,
        kinematics: Kinematics | None = None,
    ) -> None:
        if tuple(world.names) != limits.names:
            raise CommandError(f"the arm has {', '.join(world.names)}; the limits are for {', '.join(limits.names)}")
        self.world, self._clock, self._lock = world, clock, threading.RLock()
        self.record = Record(limits, kinematics or world.kinematics, world.timestep, rate)
        self._watched = np.array([i for i, c in enumerate(limits.coordinates) if c.tracking is not None])
        self._rated = np.array([c.velocity for c in limits.coordinates])
        self._period, self._lookahead = 1.0 / rate, max(1, round(lookahead / world.timestep))
        self.reflex = ""
        self._command = 0  # number of the newest
        self._last: np.ndarray | None = None  # watched targets of the last command
        self._stale: np.ndarray | None = None  # the last ones before the arm was put elsewhere
        self.reset(0)

    def reset(self, seed: int | None) -> None:
        """Put the arm where an episode begins.

        What still streams for where it was is ignored: the target it had, and everything more than a reflex's step away.
        """
        with self._lock:
            self._stale = self._stale if self._last is None else self._last
            self.world.reset(seed)
            self._set = self._goal = self.world.positions
            self._left = np.zeros(len(self._set), int)
            self._path: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
            self._ends = 0.0  # the newest trajectory, since the reset [s]
            self._command += 1
            self._last = None
            self._last_time = float("-inf")
            self._due = float("-inf")  # when the newest streamed target is reached
            self._spacing = self._period  # of commands, on average
            self.reflex = ""
            self._begun, self._steps, self._lost = self._clock.now(), 0, 0.0
            self.record.restart()

    # ---- commands ------------------------------------------------------------------------------------------------------------

    def stream(self, columns: Sequence[int] | np.ndarray, targets: np.ndarray) -> None:
        """One of a stream of position targets for some coordinates, as forward_command_controller takes them.

        Raises:
            CommandError: Wrong length, or not finite: nothing is done.
        """
        targets, columns = np.asarray(targets, np.float64), np.asarray(columns)
        with self._lock:
            self._check(targets, columns)
            self.advance()
            now, full = self._clock.now(), self._goal.copy()
            full[columns] = targets
            watched = full[self._watched]
            if self._last is None and self._before_reset(watched):
                self.record.counts["ignored"] += 1
                return
            leaves = self._last is None or self._path is not None  # a trajectory: from where the arm is
            last = self._set[self._watched] if leaves else self._last
            if self._trips(np.abs(watched - last)[None], np.array([max(now - self._last_time, self._period)]), REFLEX_STEP):
                return
            self.record.command(now, full)
            self._command += 1
            if self._last is not None:
                self._spacing += _SMOOTHING * (min(now - self._last_time, 1.0) - self._spacing)
            timestep = self.world.timestep
            self._due = max(now + self._lookahead * timestep, self._due + CATCH_UP * min(self._spacing, self._period))
            self._last, self._last_time, self._path = watched, now, None
            self._goal, self._left[columns] = full, round((self._due - now) / timestep)

    def grip(self, width: float) -> None:
        """A target of the last coordinate; its own controller takes care of it."""
        with self._lock:
            self._check(np.array([width]), np.array([-1]))
            self.advance()
            self._goal = self._goal.copy()
            self._goal[-1], self._left[-1] = width, 1

    def check_trajectory(self, columns: Sequence[int] | np.ndarray, times: np.ndarray, points: np.ndarray) -> None:
        """What :meth:`follow` takes. Raises CommandError."""
        columns, points = np.asarray(columns), np.asarray(points)
        if len(times) == 0 or points.shape != (len(times), len(columns)):
            raise self.refusal(f"a trajectory of shape {points.shape} with {len(times)} times for {len(columns)} joints")
        if (np.diff(times) <= 0).any():
            raise self.refusal("times of a trajectory must increase")
        if times[-1] <= 0:
            raise self.refusal("the trajectory's end is past", "OLD_HEADER_TIMESTAMP")
        for point in points:
            self._check(point, columns)

    def follow(self, columns: Sequence[int] | np.ndarray, times: np.ndarray, points: np.ndarray) -> int:
        """A trajectory ``[k, len(columns)]`` that is at its points ``times`` [s] from now, straight in between.

        Points that are past are left out.

        Returns:
            Its :attr:`Progress.command`.

        Raises:
            CommandError: As joint_trajectory_controller refuses it.
        """
        columns, times, points = np.asarray(columns), np.asarray(times, np.float64), np.asarray(points, np.float64)
        with self._lock:
            self.check_trajectory(columns, times, points)
            times, points = times[times > 0], points[times > 0]
            self.advance()
            self._command += 1
            now = self._clock.now()
            full = np.repeat(self._goal[None], len(points), axis=0)
            full[:, columns] = points
            path, gaps = np.vstack([self._set, full]), np.diff(times, prepend=0.0)
            gaps[0] = max(gaps[0], self._period)
            if self._trips(np.abs(np.diff(path[:, self._watched], axis=0)), gaps):
                return self._command
            self.record.counts["commands"] += 1
            for point in full:
                self.record.target(point)
            if np.abs(full[-1] - self._set).max() > 1e-7:
                self.record.commanded = now
            start = max(self._steps * self.world.timestep, 0.0)
            self._path = (np.append(0.0, times) + start, path, columns)
            self._ends = start + float(times[-1])
            self._left[columns] = 0  # what was streamed before is not reached any more
            self._last, self._last_time, self._goal = full[-1, self._watched], now + float(times[-1]), full[-1]
            return self._command

    def hold(self) -> None:
        """A trajectory ends where its set points are: at once, without deceleration, as joint_trajectory_controller holds."""
        with self._lock:
            self.advance()
            self._command += 1
            if self._path is None:
                return
            columns, self._path, self._goal = self._path[2], None, self._goal.copy()
            self._goal[columns] = self._set[columns]
            self._ends = self._steps * self.world.timestep
            self._last, self._last_time = self._goal[self._watched], self._clock.now()

    def progress(self) -> Progress:
        """As of the last step."""
        with self._lock:
            now, speeds = self._steps * self.world.timestep, np.zeros(len(self._set))
            if self._path is not None:
                times, points, columns = self._path
                i = min(int(np.searchsorted(times, now, "right")), len(times) - 1)
                speeds[columns] = (points[i] - points[i - 1])[columns] / (times[i] - times[i - 1])
            measured = self.world.positions.copy(), self.world.velocities.copy()
            return Progress(self._command, self._ends - now, self._set.copy(), speeds, *measured)

    def reset_reflex(self) -> None:
        """Take commands again, from where the arm is."""
        with self._lock:
            self.reflex, self._last, self._stale = "", None, None
            self._command += 1
            self._set = self._goal = self.world.positions
            self._left[:] = 0

    def clear_record(self) -> None:
        """Begin it anew."""
        with self._lock:
            self.record.clear()

    def _check(self, targets: np.ndarray, columns: np.ndarray) -> None:
        if targets.shape != columns.shape:
            raise self.refusal(f"{len(targets)} values for {len(columns)} joints")
        if not np.isfinite(targets).all():
            raise self.refusal("values that are not finite")

    def refusal(self, why: str, code: str = "INVALID_GOAL") -> CommandError:
        """To be raised: a command was not taken, and that is counted."""
        self.record.counts["refused"] += 1
        return CommandError(f"command refused: {why}", code)

    def _before_reset(self, watched: np.ndarray) -> bool:
        if self._stale is None:
            return False
        same = np.abs(watched - self._stale).max() < 1e-6
        return bool(same or np.abs(watched - self._set[self._watched]).max() > REFLEX_STEP)

    def _trips(self, steps: np.ndarray, gaps: np.ndarray, limit: float = np.inf) -> bool:
        """Whether the arm's own reflexes stop it, now or before.

        Args:
            steps: Of the watched joints ``[k, w]``, each in so much time ``gaps [k]`` [s].
            limit: Of a step, whatever its time [rad].
        """
        if self.reflex:
            return True
        speeds = steps / gaps[:, None] / self._rated[self._watched]
        far = steps.max() > limit
        if not far and speeds.max() <= REFLEX_SPEED:
            return False
        worst = (steps if far else speeds).argmax()
        k, i = np.unravel_index(worst, steps.shape)
        step, gap, speed, name = steps[k, i], gaps[k], speeds[k, i], self.world.names[self._watched[i]]
        self.reflex = f"{name} was told to move {step:.3g} rad in {gap:.3g} s, {speed:.2g} times its rated speed"
        self.record.counts["reflexes"] += 1
        self._goal, self._path = self._set.copy(), None
        self._left[:] = 0
        return True

    # ---- time ----------------------------------------------------------------------------------------------------------------

    def advance(self) -> int:
        """Step physics to the clock's time: how many steps it took."""
        with self._lock:
            timestep, now = self.world.timestep, self._clock.now()
            late = now - self._begun - self._steps * timestep
            if late > MAX_LAG:
                self._begun += late - timestep
                self._lost += late - timestep
            taken = 0
            while (self._steps + 1) * timestep <= now - self._begun + 1e-9:
                self._move()
                self.world.step()
                self._steps += 1
                taken += 1
                world, time = self.world, self._begun + self._steps * timestep
                self.record.step(time, world.positions, world.velocities, world.pushing)
            return taken

    def _move(self) -> None:
        """The set points of the next step."""
        if self._path is not None:
            times, points, columns = self._path
            t = (self._steps + 1) * self.world.timestep
            self._set = self._set.copy()
            self._set[columns] = [np.interp(t, times, points[:, i]) for i in columns]
            if t >= times[-1]:
                self._path = None
        moving = self._left > 0
        if moving.any():
            self._set = self._set.copy()
            self._set[moving] += (self._goal - self._set)[moving] / self._left[moving]
            self._left[moving] -= 1
        self.world.drive(self._set)

    def snapshot(self) -> Snapshot:
        """The world as of the last step."""
        with self._lock:
            time = self._begun + self._steps * self.world.timestep
            return Snapshot(time, self.world.joints(), self.world.poses(), self.world.snapshot())

    @property
    def real_time_factor(self) -> float:
        """Time simulated over time passed since the last reset."""
        simulated = self._steps * self.world.timestep
        return simulated / (simulated + self._lost) if simulated else 1.0

    def report(self) -> dict[str, Any]:
        """The record; times are the clock's, None: never."""
        with self._lock:
            now = self._clock.now()
            return self.record.asdict() | {
                "reflex": self.reflex,
                "success": self.world.success,
                "real_time_factor": self.real_time_factor,
                "lost_s": self._lost,
                "time": now,
                "timestep": self.world.timestep,
                "moved_at": self.record.moved,
                "commanded_at": self.record.commanded,
                "pushed_at": self.record.pushed,
                "positions": dict(zip(self.world.names, self.world.positions.tolist(), strict=True)),
            }
