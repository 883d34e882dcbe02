"""Sources: who says where the arm is to go. The arbiter asks the active one every period, and sends what its filter lets through.

=============  =======================================================================================================
``idle``       Nobody: the arm holds its set point.
``policy``     Observe, ask inference for plans, execute them, interpolate.
``home``       Straight to a joint configuration, slowly (:mod:`robopolicy.deploy.home`).
=============  =======================================================================================================

All run on the control thread: nothing in them waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pydantic

from robopolicy.config import Config
from robopolicy.deploy.chunk import Chunk
from robopolicy.deploy.clock import Tick
from robopolicy.deploy.engine import Engine, rows_between
from robopolicy.deploy.executor import Executor
from robopolicy.deploy.interpolate import InterpolationConfig, Interpolator
from robopolicy.deploy.latency import percentiles
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.safety import Reason, Stamp, ahead
from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.robot import Robot, Sample, State

_FIRST_PLAN = 3.0  # [s]: nobody expects the arm to move so long after a start
_RECENT = 200  # latencies, for diagnostics

# What a robot says of an observation before an episode begins: () or why it may not.
Guard = Callable[[Mapping[str, np.ndarray]], tuple[Reason, ...]]


class Target(NamedTuple):
    """What a source wants now.

    Attributes:
        positions: Where to go ``[n]``; None: it has nothing to say now, and the arm holds.
        velocity: With which that moves ``[n]``, if known.
        age: ``now`` less the time of the observation behind it [s].
        stamps: Of the inputs behind it; None: it looks at nothing but the measured state.
        why: Why it has nothing to say.
        over: Why it has nothing to say any more: the arm is stopped.
        action: Of the policy ``[A]``, for the log.
        chunk: That the action is from.
        starved: Nothing is planned for now.
    """

    positions: np.ndarray | None = None
    velocity: np.ndarray | None = None
    age: float = 0.0
    stamps: Mapping[str, Stamp] | None = None
    why: Reason | None = None
    over: Reason | None = None
    action: np.ndarray | None = None
    chunk: int = -1
    starved: bool = False


class Source(Protocol):
    """Who commands. One is active at a time; see :class:`robopolicy.deploy.arbiter.Arbiter`.

    Attributes:
        name: What it is asked for by.
    """

    name: str

    def begin(self, now: float, state: State) -> tuple[Reason, ...]:
        """Get ready to move from ``state``. Returns why not; empty when it will."""
        ...

    def ready(self, now: float) -> bool:
        """Whether the first target is there; asked every period since :meth:`begin`. Raises what went wrong with it."""
        ...

    def target(self, tick: Tick, state: State) -> Target:
        """What it wants in this period."""
        ...

    def end(self) -> None:
        """It is not asked any more, until the next :meth:`begin`."""
        ...

    def report(self) -> Mapping[str, Any]:
        """For diagnostics; called by another thread."""
        ...


class Idle:
    """Nobody."""

    name = "idle"

    def begin(self, now: float, state: State) -> tuple[Reason, ...]:
        return ()

    def ready(self, now: float) -> bool:
        return True

    def target(self, tick: Tick, state: State) -> Target:
        return Target()

    def end(self) -> None:
        pass

    def report(self) -> Mapping[str, Any]:
        return {}


class ControlConfig(Config):
    """How control runs, and what it does when something is late.

    Attributes:
        n_obs_steps: Observations that the policy sees.
        replan: Rows of a chunk that are carried out before the next plan is asked for; fewer where plans would run out.
        starved: Nothing is planned for now. ``hold``: the last action stays the target; ``decelerate``: stop smoothly.
        overrun: A period began late by whole periods; they are always skipped, never caught up. ``skip``: that is all;
            ``decelerate``: this period brakes, too.
        max_starved: Periods in a row without a plan after which the arm is stopped for good.
        max_missed: Periods in a row that ended after the next should have begun, likewise.
        log_size: Periods that the log keeps.
        fifo: Real-time priority (1 to 99) of the control thread, where the system permits; None: as other processes. Give
            inference one, too, below it (``EngineConfig.fifo``).
        cpu: Processor for the control thread; None: any.
    """

    n_obs_steps: int = pydantic.Field(default=2, ge=1)
    replan: int = pydantic.Field(default=8, ge=1)
    starved: Literal["hold", "decelerate"] = "hold"
    overrun: Literal["skip", "decelerate"] = "skip"
    max_starved: int = pydantic.Field(default=250, ge=1)
    max_missed: int = pydantic.Field(default=25, ge=1)
    log_size: int = pydantic.Field(default=100_000, ge=1)
    fifo: int | None = pydantic.Field(default=None, ge=1, le=99)
    cpu: int | None = None


@runtime_checkable
class Seats(Protocol):
    """A robot whose ``targets`` depend on where the episode began, and that can be told to begin one where it is."""

    def seat(self, positions: np.ndarray) -> None:
        """An episode begins at these measured positions ``[n]``; nothing moves."""
        ...


class LateError(EvaluationError):
    """The first target did not come in time."""


class PolicySource:
    """A policy: observations to inference, plans to targets.

    Args:
        robot: What is observed.
        engine: Started by :meth:`prepare`.
        executor: Empty.
        limits: Of the safety filter: its rate is that of control.
        config: See :class:`ControlConfig`.
        interpolation: None: positions, and steps for columns with ``gripper`` in their name.
        guard: Judges the first observation of an episode, :class:`robopolicy.deploy.guard.StartGuard` for example.

    Attributes:
        starved: Periods without a plan since it began.

    Raises:
        ConfigError: The action has no rate; from :meth:`prepare`: plans become older than the safety limits let through.
    """

    name = "policy"

    def __init__(
        self,
        robot: Robot,
        engine: Engine,
        executor: Executor,
        limits: SafetyLimits,
        config: ControlConfig | None = None,
        interpolation: InterpolationConfig | None = None,
        guard: Guard | None = None,
    ) -> None:
        action = robot.action_feature
        if action.rate is None:
            raise ConfigError(f"action '{action.name}' has no rate; declare the policy's in the robot's features")
        self.robot, self.engine, self.executor, self.limits, self.guard = robot, engine, executor, limits, guard
        self.config = config or ControlConfig()
        self.dt, self.row = 1.0 / limits.rate, 1.0 / action.rate
        self._oldest = math.inf if limits.freshness.command is None else limits.freshness.command  # [s]
        self._fastest = limits.scale.velocity * np.array([c.velocity for c in limits.coordinates])
        engine.margin = max(engine.margin, self.dt)  # chunks are taken at the next period
        self._interpolate = Interpolator(interpolation or InterpolationConfig.of(action), action.size)
        self._history: list[dict[str, np.ndarray]] = []
        self._stamps: Mapping[str, Stamp] = {}
        self._unusable: Reason | None = None
        self._next_observation = np.inf  # [s]; until the first plan is there
        self.starved = self._starved_now = 0

    def prepare(self) -> None:
        """Start and warm up inference on what is observed now. Waits; raises what the policy raises."""
        self._see(self.robot.observe(), first=True)
        self.engine.start(self._stacked())
        limit, delay = self.limits.freshness.command, self.engine.delay
        rows = rows_between(delay, self.config.replan, self.engine.rows, self.row)
        oldest = (rows + 1) * self.row + delay
        if limit is not None and oldest > limit:
            self.engine.close()
            raise ConfigError(
                f"{rows} rows of {self.row:.3g} s, one more and inference of {delay:.3g} s make plans {oldest:.3g} s old; "
                f"freshness.command of the safety limits is {limit:g} s: raise it, or make 'replan' smaller"
            )

    def begin(self, now: float, state: State) -> tuple[Reason, ...]:
        """A new episode; its first plan is asked for, and counts from when it is there, if that is soon enough."""
        if isinstance(self.robot, Seats):
            self.robot.seat(state.positions)
        sample = self.robot.observe()
        self._see(sample, first=True)
        if self._unusable is not None:
            return (self._unusable,)
        reasons = self._too_old(now) or (self.guard(sample.values) if self.guard is not None else ())
        if reasons:
            return reasons
        self.executor.reset()
        self._interpolate.reset()
        self.engine.reset()
        if self.engine.fault is not None:  # a dead process stays dead
            return (Reason("inference", str(self.engine.fault)),)
        self._last_target: np.ndarray | None = None
        self._rows_left = self._starved_now = self.starved = 0
        self._next_observation = np.inf
        self._give_up = (now + _FIRST_PLAN, time.monotonic() + _FIRST_PLAN)
        self._ask(sample)
        return ()

    def ready(self, now: float) -> bool:
        if self._next_observation < np.inf:
            return True
        clock, machine = self._give_up  # simulations are slower than time, or faster
        if now > clock and time.monotonic() > machine:
            raise LateError(f"the first plan took longer than {_FIRST_PLAN:g} s; inference hangs, or is slow here")
        chunk = self.engine.take(waited=True)
        if chunk is not None and now - chunk.obs_time <= self._oldest:
            self.executor.add(Chunk(chunk.actions, now, chunk.dt, now, chunk.index))
            self._next_observation = now + self.row
            return True
        if self.engine.fault is not None:
            raise self.engine.fault
        if chunk is not None:  # the arm stood, but the world did not
            sample = self.robot.observe()
            self._see(sample, first=True)
            if self._unusable is not None:
                raise EvaluationError(f"the first plan came late, and now it is {self._unusable}; start again")
            self._ask(sample)
        return False

    def target(self, tick: Tick, state: State) -> Target:
        now = tick.start
        if now >= self._next_observation - 1e-9:
            self._observe(now, self._next_observation)
        if (chunk := self.engine.take()) is not None:
            self.executor.add(chunk)
        if self.engine.fault is not None:
            return Target(over=Reason("inference", repr(self.engine.fault)))
        action, age, index, starved = self._action(now)
        target = velocity = None
        if action is not None:
            target = self.robot.targets(action)
            velocity = self._velocity(target, tick.skipped + 1)
        self._last_target = target
        self.starved += starved
        self._starved_now = self._starved_now + 1 if starved else 0
        over = None
        if self._starved_now >= self.config.max_starved:
            over = Reason("watchdog", f"no plan for {self._starved_now} periods")
        if self._unusable is not None:
            target = None
        return Target(target, velocity, age, self._stamps, self._unusable, over, action, index, starved)

    def end(self) -> None:
        """Inference is left to finish what it does; the next episode takes nothing of it."""

    def report(self) -> Mapping[str, Any]:
        """Latency of inference [ms], what became of chunks, and periods without one."""
        recent = 1e3 * self.engine.latency.last(_RECENT)
        return {"inference_ms": percentiles(recent), **self.engine.counters, "starved": self.starved}

    def _observe(self, now: float, due: float) -> None:
        self._next_observation = due + self.row if now - due < self.row else now + self.row
        sample = self.robot.observe()
        self._see(sample)
        self._rows_left -= 1
        if self._unusable is not None or self.engine.busy or self.engine.fault is not None:
            return
        if self._rows_left <= 0 or self._starved_now:
            self._ask(sample)

    def _see(self, sample: Sample, first: bool = False) -> None:
        self._stamps = sample.stamps
        self._unusable = _not_finite(sample.values) or sample.unusable
        if self._unusable is None:
            now = dict(sample.values)
            self._history = [now] * self.config.n_obs_steps if first else [*self._history[1:], now]

    def _too_old(self, now: float) -> tuple[Reason, ...]:
        """Which inputs are: the arm would not stay under way. And those of which nobody knows, see :func:`ahead`."""
        fresh = self.limits.freshness
        found = dict.fromkeys(fresh.inputs, np.inf) | {name: age(now, stamp) for name, stamp in self._stamps.items()}
        limits = {name: fresh.inputs.get(name, fresh.default) for name in found}
        stale = [Reason("stale", name, old, limits[name]) for name, old in found.items() if not old <= limits[name]]
        early = [ahead(name, stamp, limits[name]) for name, stamp in self._stamps.items()]
        return (*stale, *(reason for reason in early if reason is not None))

    def _ask(self, sample: Sample) -> None:
        self.engine.post(self._stacked(), sample.time, self.executor.remaining(sample.time))
        self._rows_left = rows_between(self.engine.delay, self.config.replan, self.engine.rows, self.row)

    def _stacked(self) -> dict[str, np.ndarray]:
        return {name: np.stack([past[name] for past in self._history]) for name in self._history[-1]}

    def _action(self, now: float) -> tuple[np.ndarray | None, float, int, bool]:
        """What to do now, how old the observation behind it is, its chunk, and whether nothing was planned."""
        command = self.executor.action(now)
        rows = None if command.starved else self.executor.rows(now, 0, 2)
        if rows is not None:
            actions, first, dt = rows
            action: np.ndarray | None = self._interpolate(now, actions, first, dt, command.chunk)
        else:
            action = self._interpolate.hold(now) if self.config.starved == "hold" else None
        return action, command.age, command.chunk, command.starved

    def _velocity(self, target: np.ndarray, periods: int) -> np.ndarray | None:
        """How fast the target moves; what moves faster than it may is taken to have jumped."""
        if self._last_target is None:
            return None
        velocity = (target - self._last_target) / (periods * self.dt)
        velocity[np.abs(velocity) > self._fastest] = 0.0
        return velocity


def age(now: float, stamp: Stamp) -> float:
    """The larger of time since arrival and since the source's own stamp [s]."""
    return max(now - stamp.came, now - (stamp.came if stamp.made is None else stamp.made))


def _not_finite(values: Mapping[str, np.ndarray]) -> Reason | None:
    for name, value in values.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            return Reason("observation_not_finite", name)
    return None
