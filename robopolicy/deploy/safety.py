"""``SafetyFilter``: the last thing between a policy and an arm, simulated or real.

A function of what it is given: no clock, no ROS, no torch. Every call takes the time, the measured state, when each input was
made and came, and a command; it returns what may be sent and why it differs. Order and steps: docs/safety.md.

This is not a safety-rated function. It runs in an ordinary process on an ordinary computer; the hardware emergency stop stays.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.motion import Motion
from robopolicy.deploy.workspace import Kinematics, Workspace
from robopolicy.errors import ConfigError

_SKEW_WINDOW = 100  # stamps without a young one among them make a constant offset
_SHORTEST = 1 / 64  # of the ways to a target that are tried


class Mode(StrEnum):
    IDLE = "idle"  # never started: nothing is sent
    RUNNING = "running"
    HOLDING = "holding"  # something is wrong with an input: decelerating, then still; goes on by itself if it was short
    STOPPED = "stopped"  # the same, until `start`
    ESTOPPED = "estopped"  # the same, until `reset` and `start`


class Stamp(NamedTuple):
    """When an input came, and when it was made by its source's own account (None: it does not say); both on the clock of ``now``.

    A source with another clock is converted where it enters: ``made = now - (its clock now - its stamp)``.
    """

    came: float
    made: float | None = None


class Reason(NamedTuple):
    """One intervention, or one warning.

    Attributes:
        kind: What the counters count.
        what: The coordinate, point or input.
        found: In the unit of ``what``.
        limit: What it was held against.
    """

    kind: str
    what: str = ""
    found: float = math.nan
    limit: float = math.nan

    def __str__(self) -> str:
        text = f"{self.kind} {self.what}".strip()
        return text if math.isnan(self.limit) else f"{text}: {self.found:.4g}, limit {self.limit:.4g}"


def ahead(name: str, stamp: Stamp, limit: float) -> Reason | None:
    """Made so long after it came that a message as old as ``limit`` would seem new: nothing may start on such a clock."""
    early = -math.inf if stamp.made is None else stamp.made - stamp.came
    return Reason("clock_ahead", name, early, limit) if early > limit else None


def _real(value: object) -> np.ndarray:
    """As float64; what is no real number, or has no shape, as NaN."""
    try:
        found = np.asarray(value)
    except Exception:  # rows of different lengths; objects that make an array of themselves, and fail
        found = np.empty((), object)
    return found.astype(np.float64, copy=False) if found.dtype.kind in "fiu" else np.full(found.shape, np.nan)


class Result(NamedTuple):
    """What came of one call.

    Attributes:
        mode: After the call.
        commanded: The command ``[n]`` as it came (None: none came).
        executed: What may be sent ``[n]``; None while nothing may be.
        reasons: Why they differ, and warnings, in the order of the steps.
    """

    mode: Mode
    commanded: np.ndarray | None
    executed: np.ndarray | None
    reasons: tuple[Reason, ...]


class SafetyFilter:
    """Call :meth:`start` once, then the filter itself at ``limits.rate``; :meth:`stop` and :meth:`estop` at any time.

    No output ever breaks a limit in position (less margin), velocity, acceleration, jerk or workspace, whatever comes in; see
    :mod:`robopolicy.deploy.motion` for why. Not for several threads: whoever calls the filter also calls ``stop``.

    Args:
        limits: What is let through.
        kinematics: Of the robot; needed when the limits have a workspace.

    Attributes:
        counters: Ticks with each kind of reason.
        events: How often each kind began.

    Raises:
        ConfigError: The limits have a workspace and there is no kinematics.
    """

    def __init__(self, limits: SafetyLimits, kinematics: Kinematics | None = None) -> None:
        self.limits = limits
        self.names = limits.names
        coordinates, scale = limits.coordinates, limits.scale
        margin = np.array([c.margin for c in coordinates])
        self._hard_lower = np.array([c.lower for c in coordinates])
        self._hard_upper = np.array([c.upper for c in coordinates])
        self.lower, self.upper = self._hard_lower + margin, self._hard_upper - margin
        self.velocity = scale.velocity * np.array([c.velocity for c in coordinates])
        self.acceleration = scale.acceleration * np.array([c.acceleration for c in coordinates])
        self.jerk = scale.jerk * np.array([c.jerk for c in coordinates])
        self._max_step = np.array([c.max_step for c in coordinates])
        self._start = np.array([c.start for c in coordinates])
        self._tracking = np.array([math.inf if c.tracking is None else c.tracking for c in coordinates])
        self._motion = Motion(1.0 / limits.rate, self.velocity, self.acceleration, self.jerk)
        self._workspace: Workspace | None = None
        if limits.workspace is not None:
            if kinematics is None:
                raise ConfigError("safety limits have a workspace, which needs the robot's kinematics; give them or drop the box")
            self._workspace = Workspace(limits.workspace, kinematics)
        self.counters: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.mode = Mode.IDLE
        self.cause: Reason | None = None  # of the last hold or stop
        self._active: frozenset[str] = frozenset()  # kinds of the last call
        self._seated = False
        self._now: float | None = None
        self._held_since: float | None = None
        self._held = 0  # calls
        self._guard = True  # the next command is a first one
        self._leash = 1.0
        self._offsets: dict[str, deque[float]] = {}

    # ---- what people and programs ask for ------------------------------------------------------------------------------------

    def start(self, state: np.ndarray, stamp: Stamp, now: float, *, reseat: bool = False) -> tuple[Reason, ...]:
        """Begin to run from the measured positions ``state [n]`` of ``stamp``. Returns why not; empty when it runs.

        After a stop the set point that was held goes on, and a measured position too far from it is a reason to refuse:
        something moved the arm. ``reseat`` then lets the set point jump to the measured position, which stops the servos pushing.
        """
        if self.mode in (Mode.RUNNING, Mode.HOLDING):
            return (Reason("start_running", "stop first"),) if reseat else ()
        if self.mode is Mode.ESTOPPED:
            return (Reason("estopped", "reset first"),)
        state = _real(state)
        if bad := self._finite("state_not_finite", state):
            return (bad,)
        if not (age := self._age(now, stamp)) <= self.limits.freshness.state:  # the arm may be elsewhere by now
            return (Reason("stale", "state", age, self.limits.freshness.state),)
        if early := ahead("state", stamp, self.limits.freshness.state):
            return (early,)
        seat = reseat or not self._seated
        if seat and not self._motion.still():
            return (Reason("start_moving", "the set point still decelerates"),)
        refused = [
            Reason("start_outside", self.names[i], float(state[i]), float(bound[i]))
            for bound, outside in ((self._hard_lower, state < self._hard_lower), (self._hard_upper, state > self._hard_upper))
            for i in np.flatnonzero(outside)
        ]
        if seat and not refused and self._workspace is not None:
            what, excess = self._workspace.outside(state)
            if not excess <= self._workspace.config.start:
                refused.append(Reason("start_outside", what, excess, self._workspace.config.start))
        if not seat:
            error = np.abs(state - self._motion.position)
            refused += [
                Reason("start_moved", self.names[i], float(error[i]), float(self._tracking[i]))
                for i in np.flatnonzero(error > self._tracking)
            ]
        if refused:
            return tuple(refused)
        if seat:
            self._motion.seat(state, self.lower, self.upper)
            if self._workspace is not None:
                self._workspace.seat(state)
            self._seated = True
        self.mode, self.cause = Mode.RUNNING, None
        self._guard, self._leash, self._now = True, 1.0, None
        return ()

    def stop(self, why: str = "asked") -> None:
        """Decelerate, then hold until :meth:`start`."""
        if self.mode in (Mode.RUNNING, Mode.HOLDING):
            self._latch(Mode.STOPPED, Reason("stop", why))

    def estop(self, why: str = "asked") -> None:
        """Decelerate, then hold until :meth:`reset` and then :meth:`start`."""
        if self.mode is not Mode.ESTOPPED:
            self._latch(Mode.ESTOPPED, Reason("estop", why))

    def reset(self) -> bool:
        """Release the latched emergency stop; the arm stays stopped until :meth:`start`. False while it still moves."""
        if self.mode is Mode.ESTOPPED and self._motion.still():
            self.mode = Mode.STOPPED if self._seated else Mode.IDLE
        return self.mode is not Mode.ESTOPPED

    def zero_counters(self) -> None:
        self.counters.clear()
        self.events.clear()

    @property
    def set_point(self) -> np.ndarray:
        """The last executed positions ``[n]``."""
        return self._motion.position.copy()

    @property
    def still(self) -> bool:
        """Whether the set point has come to rest on a stop."""
        return self._motion.still()

    # ---- every control period ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        now: float,
        state: np.ndarray,
        command: np.ndarray | None,
        *,
        stamps: Mapping[str, Stamp],
        velocity: np.ndarray | None = None,
        command_age: float = 0.0,
        deadman: Stamp | None = None,
    ) -> Result:
        """Filter one command.

        Args:
            now: Seconds of a monotonic clock.
            state: Measured positions ``[n]``.
            command: Wanted positions ``[n]``; None when there is none.
            stamps: When each input came; ``"state"`` must be among them, cameras by their names.
            velocity: Of the command ``[n]``, if known: a target that moves is then followed without lag.
            command_age: ``now`` less the time of the observation behind the command [s].
            deadman: When the deadman was last seen pressed.
        """
        if not self._seated:
            return self._result(command, [])
        reasons: list[Reason] = []
        if fault := self._tick(now):  # before anything moves: the set point may have stood still
            reasons.append(fault)
        if self.mode in (Mode.STOPPED, Mode.ESTOPPED):
            if self.cause is not None:
                reasons.append(self.cause)
            self._motion.brake()
            return self._result(command, reasons)
        state, target = _real(state), np.empty(0) if command is None else _real(command)
        hold = (
            fault
            or (Reason("no_command") if command is None else None)
            or self._finite("state_not_finite", state)
            or self._finite("command_not_finite", target)
            or self._stale(now, stamps, command_age, reasons)
            or self._far_start(target, reasons)
            or self._not_pressed(now, deadman)
            or self._blocked(state)
        )
        if hold is None:
            self._move(target, None if velocity is None else _real(velocity), reasons)
            self.mode = Mode.RUNNING
        else:
            if hold is not fault:
                reasons.append(hold)
            self._hold(hold)
        return self._result(command, reasons)

    def _result(self, command: np.ndarray | None, reasons: list[Reason]) -> Result:
        kinds = frozenset(reason.kind for reason in reasons)
        self.counters.update(kinds)
        self.events.update(kinds - self._active)
        self._active = kinds
        return Result(self.mode, command, self._motion.position.copy() if self._seated else None, tuple(reasons))

    def _hold(self, why: Reason) -> None:
        self._motion.brake()
        self._guard = True
        if self.mode is Mode.RUNNING:
            self.mode, self.cause, self._held_since, self._held = Mode.HOLDING, why, self._now, 0
        self._held += 1
        elapsed = self._held / self.limits.rate  # a clock that stands or goes back does not make a hold shorter
        if self._now is not None and self._held_since is not None:
            elapsed = max(elapsed, self._now - self._held_since)
        if why.kind in ("tracking", "start_far") or elapsed > self.limits.auto_resume:
            self._latch(Mode.STOPPED, why)

    def _latch(self, mode: Mode, why: Reason) -> None:
        self.mode, self.cause = mode, why

    # ---- the steps, in their order -------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> Reason | None:
        """The clock runs forward and the calls are regular."""
        last = self._now
        if not math.isfinite(now) or (last is not None and now < last):
            return Reason("time", "now", now - last if last is not None else now, 0.0)
        self._now = now
        if last is not None and now - last > self.limits.freshness.gap:
            self._motion.rest()
            return Reason("gap", "now", now - last, self.limits.freshness.gap)
        return None

    def _finite(self, kind: str, value: np.ndarray) -> Reason | None:
        if value.shape != self.lower.shape:
            return Reason(kind, f"shape {value.shape}")
        finite = np.isfinite(value)
        return None if finite.all() else Reason(kind, self.names[int(np.argmin(finite))])

    def _stale(self, now: float, stamps: Mapping[str, Stamp], command_age: float, reasons: list[Reason]) -> Reason | None:
        fresh = self.limits.freshness
        for name in fresh.inputs:
            if name not in stamps:
                return Reason("stale", name, math.inf, fresh.inputs[name])
        if "state" not in stamps:
            return Reason("stale", "state", math.inf, fresh.state)
        for name, stamp in stamps.items():
            limit = fresh.state if name == "state" else fresh.inputs.get(name, fresh.default)
            age = self._age(now, stamp)
            if not age <= limit:
                return Reason("stale", name, age, limit)
            if stamp.made is not None and self._skewed(name, stamp.came - stamp.made, stamp.made - now):
                reasons.append(Reason("clock_skew", name, stamp.came - stamp.made, fresh.skew))
        if fresh.command is not None and not -fresh.skew <= command_age <= fresh.command:
            return Reason("stale", "command", command_age, fresh.command)
        return None

    def _age(self, now: float, stamp: Stamp) -> float:
        """The larger of time since arrival and since the source's stamp; infinite for mad stamps: NaN, or arrival to come."""
        arrival, making = now - stamp.came, now - (stamp.came if stamp.made is None else stamp.made)
        if not arrival >= -self.limits.freshness.skew or not math.isfinite(making):
            return math.inf
        return max(arrival, making)

    def _skewed(self, name: str, offset: float, ahead: float) -> bool:
        """Stamps from the future, or all of the last ones old on arrival."""
        offsets = self._offsets.get(name)
        if offsets is None:
            offsets = self._offsets[name] = deque(maxlen=_SKEW_WINDOW)
        offsets.append(offset)
        skew = self.limits.freshness.skew
        return ahead > skew or (len(offsets) == _SKEW_WINDOW and min(offsets) > skew)

    def _far_start(self, command: np.ndarray, reasons: list[Reason]) -> Reason | None:
        """A first target near the set point disarms the guard; a far one slows down or stops."""
        if not self._guard:
            return None
        distance = np.abs(np.clip(command, self.lower, self.upper) - self._motion.position)
        i = int(np.argmax(distance / self._start))
        if distance[i] <= self._start[i]:
            self._guard = False
            return None
        if self.limits.on_far_start == "refuse":
            return Reason("start_far", self.names[i], float(distance[i]), float(self._start[i]))
        reasons.append(Reason("ramp", self.names[i], float(distance[i]), float(self._start[i])))
        return None

    def _not_pressed(self, now: float, deadman: Stamp | None) -> Reason | None:
        limit = self.limits.freshness.deadman
        if limit is None:
            return None
        age = math.inf if deadman is None else self._age(now, deadman)
        return None if age <= limit else Reason("deadman", "", age, limit)

    def _blocked(self, state: np.ndarray) -> Reason | None:
        error = np.abs(state - self._motion.position)
        if (error <= self._tracking).all():
            return None
        worst = int(np.argmax(error / self._tracking))
        return Reason("tracking", self.names[worst], float(error[worst]), float(self._tracking[worst]))

    def _move(self, command: np.ndarray, velocity: np.ndarray | None, reasons: list[Reason]) -> None:
        here, noted = self._motion.position, len(reasons)
        target = np.clip(command, self.lower, self.upper)
        excess = np.abs(command - target)
        if excess.any():
            i = int(np.argmax(excess))
            reasons.append(Reason("position_limit", self.names[i], float(command[i]), float(target[i])))
        if self._workspace is not None and (inside := self._workspace.project(target, here, self.lower, self.upper)) is not None:
            reasons.append(Reason("workspace", *self._workspace.outside(target), 0.0))
            target = inside
        steps = np.abs(target - here) / self._max_step
        i = int(np.argmax(steps))
        if steps[i] > 1.0:
            reasons.append(Reason("max_step", self.names[i], float(abs(target[i] - here[i])), float(self._max_step[i])))
            target = here + (target - here) / steps[i]
        following = None
        unchanged = len(reasons) == noted and not self._guard
        if unchanged and velocity is not None and velocity.shape == here.shape and np.isfinite(velocity).all():
            following = np.clip(velocity, -self.velocity, self.velocity)
        if not self._step(target, following, self.limits.ramp if self._guard else 1.0):
            reasons.append(Reason("no_way"))

    def _step(self, target: np.ndarray, velocity: np.ndarray | None, speed: float) -> bool:
        """One period towards ``target``; or towards something nearer, if the way there leads outside; or along the stop."""
        motion, workspace = self._motion, self._workspace
        taken = motion.propose(target, velocity, speed, self._admits)
        if taken:
            self._leash = min(1.0, 2 * self._leash)
        else:
            self._leash = max(self._leash / 2, _SHORTEST)
            near = motion.position + self._leash * (target - motion.position)
            if workspace is not None:
                inside = workspace.project(near, motion.position, motion.lower, motion.upper)
                near = near if inside is None else inside
            if not motion.propose(near, None, speed, self._admits):
                motion.brake()
        motion.close()
        if workspace is not None:
            workspace.close(motion.position)
        return taken

    def _admits(self, start: np.ndarray, travel: np.ndarray, duration: float, at: Callable[[float], np.ndarray]) -> bool:
        return self._workspace is None or self._workspace.admits(start, travel, duration, at)
