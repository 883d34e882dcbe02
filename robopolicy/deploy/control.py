"""The control loop: observe, ask for plans, execute, interpolate, filter, command; at a fixed rate, whatever inference does.

::

    state -> [observe -> post] -> take -> executor -> interpolate -> robot.targets -> safety filter -> robot.command

The loop never waits for inference, and writes its log when it has ended. What it measures is defined in docs/deploy.md.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pydantic

from robopolicy.config import Config
from robopolicy.deploy.chunk import Chunk
from robopolicy.deploy.clock import Clock, Tick, Ticker, permitted, set_fifo
from robopolicy.deploy.engine import Engine, rows_between
from robopolicy.deploy.executor import Executor
from robopolicy.deploy.interpolate import InterpolationConfig, Interpolator
from robopolicy.deploy.latency import Log, percentiles
from robopolicy.deploy.safety import Mode, Reason, SafetyFilter, Stamp
from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.robot import Robot, Sample

_MODES = {mode: float(index) for index, mode in enumerate(Mode)}
_FIRST_PLAN = 30.0  # [s] of the machine's time: inference that has not answered by then hangs
_SWITCH_INTERVAL = 2e-4  # [s]: inference gives the interpreter up this often; Python's own 5 ms is more than a period


class ControlConfig(Config):
    """How the loop runs, and what it does when something is late.

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


class ControlLoop:
    """One robot, one policy.

    Args:
        robot: Commanded by nobody else.
        engine: Started by :meth:`reset`.
        executor: Empty.
        safety: The last thing before the robot; its ``limits.rate`` is the rate of the loop.
        clock: The one that robot and engine have, too.
        config: See :class:`ControlConfig`.
        interpolation: None: positions, and steps for columns with ``gripper`` in their name.

    Attributes:
        skipped, missed, starved: Periods skipped, ended late, and without a plan, since the last reset.
        notes: What the system did not permit.

    Raises:
        ConfigError: Robot and safety limits name different coordinates, or the action has no rate; from :meth:`reset`: plans
            become older than the safety limits let through.
    """

    def __init__(
        self,
        robot: Robot,
        engine: Engine,
        executor: Executor,
        safety: SafetyFilter,
        clock: Clock,
        config: ControlConfig | None = None,
        interpolation: InterpolationConfig | None = None,
    ) -> None:
        if tuple(robot.names) != safety.names:
            raise ConfigError(
                f"the robot takes {', '.join(robot.names)}, the safety limits are for {', '.join(safety.names)}; "
                "name the same coordinates in the same order"
            )
        if robot.action_feature.rate is None:
            raise ConfigError(f"action '{robot.action_feature.name}' has no rate; declare the policy's in the robot's features")
        self.robot, self.engine, self.executor, self.safety, self.clock = robot, engine, executor, safety, clock
        self.config = config or ControlConfig()
        self.dt, self.row = 1.0 / safety.limits.rate, 1.0 / robot.action_feature.rate
        engine.margin = max(engine.margin, self.dt)  # chunks are taken at the next period
        size = robot.action_feature.size
        self._interpolate = Interpolator(interpolation or InterpolationConfig.of(robot.action_feature), size)
        n = len(robot.names)
        scalars = ("episode", "number", "deadline", "start", "finish", "skipped", "mode", "age", "chunk", "starved", "obs_time")
        self.log = Log(self.config.log_size, dict.fromkeys(scalars, 0) | {"action": size, "target": n, "executed": n, "state": n})
        self.notes: list[str] = []
        self._history: list[dict[str, np.ndarray]] = []
        self._started = False

    # ---- an episode ----------------------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[Reason, ...]:
        """Begin an episode: robot, engine, executor and safety filter. Returns why the filter refused; empty when it runs."""
        self._stand("reset")
        self.robot.reset(seed)
        self.executor.reset()
        self._interpolate.reset()
        self._see(self.robot.observe(), first=True)
        if not self._started:
            self.engine.start(self._stacked())
            try:
                self._check_freshness()
            except ConfigError:
                self.engine.close()
                raise
            self._started = True
        self.engine.reset()
        self._last_target: np.ndarray | None = None
        self._next_observation: float | None = None  # the first plan is made when the arm is about to move
        self._rows_left = 0
        self._starved_now = self._missed_now = self.skipped = self.missed = self.starved = 0
        state = self.robot.state()
        return self.safety.start(state.positions, state.stamp, self.clock.now(), reseat=True)

    def _check_freshness(self) -> None:
        """A plan must not become too old before the next can be there."""
        limit, delay = self.safety.limits.freshness.command, self.engine.delay
        rows = rows_between(delay, self.config.replan, self.engine.rows, self.row)
        oldest = (rows + 1) * self.row + delay
        if limit is not None and oldest > limit:
            raise ConfigError(
                f"{rows} rows of {self.row:.3g} s, one more and inference of {delay:.3g} s make plans {oldest:.3g} s old; "
                f"freshness.command of the safety limits is {limit:g} s: raise it, or make 'replan' smaller"
            )

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> None:
        """Run for so long, or until ``until()`` or the safety filter has stopped the arm for good and it stands.

        May be called again to go on. Raises what inference raises while the first plan is waited for, and what anything in a
        period raises; before that it stops the arm smoothly.
        """
        with quiet(self.config, self.notes):
            try:
                self._run(seconds, until)
            except BaseException as error:  # an interrupt, too
                self._end(repr(error))
                raise

    def _run(self, seconds: float, until: Callable[[], bool] | None) -> None:
        if self._next_observation is None:
            self._next_observation = self._first_plan() + self.row
        ticker, periods = Ticker(self.clock, self.dt), round(seconds / self.dt)
        last = -1
        while last + 1 < periods:
            tick = ticker.wait()
            self.step(tick)
            last = tick.number
            if until is not None and until():
                break
            if self.safety.mode in (Mode.STOPPED, Mode.ESTOPPED) and self.safety.still:
                break

    def _first_plan(self) -> float:
        """Wait for it, standing. Its rows count from when the arm starts to move, which is returned."""
        sample = self.robot.observe()
        self._see(sample, first=True)
        self._ask(sample)
        end = time.monotonic() + _FIRST_PLAN
        while (chunk := self.engine.take(waited=True)) is None:
            if self.engine.fault is not None:
                raise self.engine.fault
            if time.monotonic() > end:
                raise EvaluationError(f"no plan came within {_FIRST_PLAN:g} s; inference hangs")
            self.clock.sleep_until(self.clock.now() + self.dt)
        now = self.clock.now()
        self.executor.add(Chunk(chunk.actions, now, chunk.dt, now, chunk.index))
        return now

    def close(self) -> None:
        """Stop the arm smoothly, then the engine."""
        try:
            self._end("closed")
        finally:
            self.engine.close()
            self._started = False

    def _end(self, why: str) -> None:
        try:
            self._stand(why)
        finally:  # also of a robot that takes no commands any more
            self.robot.stop()

    def _stand(self, why: str) -> None:
        """Bring the set point to rest. Needs no measurements: the robot may have none to give."""
        self.safety.stop(why)
        ticker = Ticker(self.clock, self.dt)
        while not self.safety.still:
            self._send(self.safety(ticker.wait().start, self.safety.set_point, None, stamps={}).executed)

    # ---- one period ----------------------------------------------------------------------------------------------------------

    def step(self, tick: Tick) -> None:
        """What is done every period."""
        now = tick.start
        self.skipped += tick.skipped
        state = self.robot.state()
        if self._next_observation is not None and now >= self._next_observation - 1e-9:
            self._observe(now, self._next_observation)
        if (chunk := self.engine.take()) is not None:
            self.executor.add(chunk)
        action, age, index, starved = self._action(now)
        target = velocity = None
        if action is not None:
            target = self.robot.targets(action)
            velocity = self._velocity(target, tick.skipped + 1)
        self._last_target = target
        braking = tick.skipped > 0 and self.config.overrun == "decelerate"
        result = self.safety(
            now,
            state.positions,
            None if braking else target,
            stamps={"state": state.stamp, **self._stamps},
            velocity=velocity,
            command_age=age,
        )
        self._send(result.executed)
        self._watch(starved)
        finish = self.clock.now()
        self._account(tick, finish)
        row = self.log.next()
        row["episode"], row["number"] = self.engine.episode, tick.number
        row["deadline"], row["start"], row["finish"] = tick.deadline, now, finish
        row["skipped"], row["mode"], row["age"], row["chunk"] = tick.skipped, _MODES[result.mode], age, index
        row["starved"], row["obs_time"] = starved, now - age
        row["action"] = np.nan if action is None else action
        row["target"] = np.nan if target is None else target
        row["executed"] = np.nan if result.executed is None else result.executed
        row["state"] = state.positions

    def _observe(self, now: float, due: float) -> None:
        self._next_observation = due + self.row if now - due < self.row else now + self.row
        sample = self.robot.observe()
        self._see(sample)
        self._rows_left -= 1
        if (self._rows_left <= 0 or self._starved_now) and not self.engine.busy and self.engine.fault is None:
            self._ask(sample)

    def _see(self, sample: Sample, first: bool = False) -> None:
        now = dict(sample.values)
        self._history = [now] * self.config.n_obs_steps if first else [*self._history[1:], now]
        self._stamps: Mapping[str, Stamp] = sample.stamps

    def _ask(self, sample: Sample) -> None:
        previous = self.executor.remaining(sample.time)
        self.engine.post(self._stacked(), sample.time, previous)
        self._rows_left = rows_between(self.engine.delay, self.config.replan, self.engine.rows, self.row)

    def _stacked(self) -> dict[str, np.ndarray]:
        return {name: np.stack([past[name] for past in self._history]) for name in self._history[-1]}

    def _action(self, now: float) -> tuple[np.ndarray | None, float, float, bool]:
        """What to do now, how old the observation behind it is, its chunk, and whether nothing was planned."""
        if self.engine.fault is not None:
            return None, 0.0, -1.0, True
        command = self.executor.action(now)
        rows = None if command.starved else self.executor.rows(now, 0, 2)
        if rows is not None:
            actions, first, dt = rows
            action: np.ndarray | None = self._interpolate(now, actions, first, dt, command.chunk)
        else:
            action = self._interpolate.hold(now) if self.config.starved == "hold" else None
        return action, command.age, float(command.chunk), command.starved

    def _velocity(self, target: np.ndarray, periods: int) -> np.ndarray | None:
        """How fast the target moves; what moves faster than it may is taken to have jumped."""
        if self._last_target is None:
            return None
        velocity = (target - self._last_target) / (periods * self.dt)
        velocity[np.abs(velocity) > self.safety.velocity] = 0.0
        return velocity

    def _send(self, executed: np.ndarray | None) -> None:
        if executed is not None:
            self.robot.command(executed)

    def _watch(self, starved: bool) -> None:
        self.starved += starved
        self._starved_now = self._starved_now + 1 if starved else 0
        if self._starved_now >= self.config.max_starved:
            fault = self.engine.fault
            self.safety.stop(f"watchdog: no plan for {self._starved_now} periods" + (f" ({fault!r})" if fault else ""))

    def _account(self, tick: Tick, finish: float) -> None:
        missed = tick.skipped > 0 or finish > tick.deadline + self.dt
        self.missed += missed
        self._missed_now = self._missed_now + 1 if missed else 0
        if self._missed_now >= self.config.max_missed:
            self.safety.stop(f"watchdog: {self._missed_now} periods in a row were missed")

    # ---- afterwards ----------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was measured since the log began; times in ms. Definitions in docs/deploy.md."""
        return summarise(self.log.rows(), self.dt, self.safety) | {
            "inference_ms": self.engine.latency.summary(1e3),
            "engine": dict(self.engine.counters),
            "boundary_jump": percentiles(np.array([switch.jump for switch in self.executor.switches])),
            "interventions": dict(self.safety.events),
            "notes": [*self.notes, *self.engine.notes],
        }


def summarise(rows: np.ndarray, dt: float, safety: SafetyFilter) -> dict[str, Any]:
    """Timing, age and smoothness of logged periods (see :class:`ControlLoop`)."""
    if len(rows) < 4:
        return {"ticks": len(rows)}
    late, took = rows["start"] - rows["deadline"], rows["finish"] - rows["start"]
    skipped = int(rows["skipped"].sum())
    missed = skipped + int((rows["finish"] > rows["deadline"] + dt).sum())
    follows = (np.diff(rows["episode"]) == 0) & (np.diff(rows["number"]) > 0)  # the period before, in the same run
    smooth = follows & (np.diff(rows["number"]) == 1)
    jerk = np.diff(rows["executed"], 3, axis=0)[smooth[2:] & smooth[1:-1] & smooth[:-2]] / dt**3
    return {
        "ticks": len(rows),
        "missed": missed / (len(rows) + skipped),
        "skipped": skipped,
        "lateness_ms": percentiles(1e3 * late),
        "jitter_ms": percentiles(1e3 * np.abs(np.diff(rows["start"])[follows] - dt)),
        "work_ms": percentiles(1e3 * took),
        "age_ms": percentiles(1e3 * rows["age"][rows["starved"] == 0]),
        "starved": float(rows["starved"].mean()),
        "modes": {str(mode): float((rows["mode"] == code).mean()) for mode, code in _MODES.items()},
        "jerk_rms": dict(zip(safety.names, np.sqrt(np.nanmean(jerk**2, axis=0)).tolist(), strict=True)) if len(jerk) else {},
    }


@contextmanager
def quiet(config: ControlConfig, notes: list[str]) -> Iterator[None]:
    """As few interruptions as can be had: no garbage collection, short turns for other threads, and what the config asks for."""
    collecting, interval = gc.isenabled(), sys.getswitchinterval()
    scheduled = hasattr(os, "sched_setscheduler")  # Linux
    if scheduled:
        affinity, policy = os.sched_getaffinity(0), (os.sched_getscheduler(0), os.sched_getparam(0))
    elif config.cpu is not None or config.fifo is not None:
        notes.append("priority and processor of control cannot be set on this system")
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        if scheduled and config.cpu is not None:
            permitted(lambda: os.sched_setaffinity(0, {config.cpu or 0}), f"cpu {config.cpu}", notes)
        if scheduled and config.fifo is not None:
            permitted(lambda: set_fifo(config.fifo or 1), f"SCHED_FIFO {config.fifo} for control", notes)
        yield
    finally:
        if scheduled:
            os.sched_setscheduler(0, *policy)
            os.sched_setaffinity(0, affinity)
        sys.setswitchinterval(interval)
        gc.unfreeze()
        if collecting:
            gc.enable()
