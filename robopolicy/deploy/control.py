"""The control loop: one robot, one policy, episode after episode; for simulation, evaluation and measurements.

::

    state -> [observe -> post] -> take -> executor -> interpolate -> robot.targets -> safety filter -> robot.command

A thin user of :class:`robopolicy.deploy.arbiter.Arbiter` and :class:`robopolicy.deploy.sources.PolicySource`, which are what runs
on the arm. The loop never waits for inference, and writes its log when it has ended. What it measures: docs/deploy.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from robopolicy.deploy.arbiter import MODES, Arbiter
from robopolicy.deploy.clock import Clock, Tick, Ticker, quiet
from robopolicy.deploy.engine import Engine
from robopolicy.deploy.executor import Executor
from robopolicy.deploy.interpolate import InterpolationConfig
from robopolicy.deploy.latency import percentiles
from robopolicy.deploy.requests import mend
from robopolicy.deploy.safety import Mode, Reason, SafetyFilter
from robopolicy.deploy.sources import ControlConfig, PolicySource, Source
from robopolicy.errors import EvaluationError
from robopolicy.robot import Robot

__all__ = ["ControlConfig", "ControlLoop", "summarise"]

_PATIENCE = 5.0  # [s] for messages to be fresh again before an episode: a busy computer may have held them up


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
        others: Who else may command, between episodes: see :meth:`go`.

    Attributes:
        source, arbiter: What it is made of.

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
        others: Iterable[Source] = (),
    ) -> None:
        self.robot, self.engine, self.executor, self.safety, self.clock = robot, engine, executor, safety, clock
        self.config = config or ControlConfig()
        self.source = PolicySource(robot, engine, executor, safety.limits, self.config, interpolation)
        self.arbiter = Arbiter(robot, safety, clock, [self.source, *others], self.config)
        self.log, self.notes = self.arbiter.log, self.arbiter.notes
        self.dt, self.row = self.arbiter.dt, self.source.row
        self._warm = self._begun = False
        self._jumps: list[float] = []  # of the episodes before this one
        self._between: list[int] = []  # what the log has under these numbers are no episodes

    @property
    def skipped(self) -> int:
        """Periods skipped since the last reset."""
        return self.arbiter.skipped

    @property
    def missed(self) -> int:
        """Periods ended late since the last reset."""
        return self.arbiter.missed

    @property
    def starved(self) -> int:
        """Periods without a plan since the last reset."""
        return self.source.starved

    def reset(self, seed: int | None = None) -> tuple[Reason, ...]:
        """Begin an episode: robot, engine, executor and safety filter. Returns why the filter refused; empty when it runs."""
        self.arbiter.stand("reset")
        self.robot.reset(seed)
        self.prepare()
        self.engine.reset()
        self._begun = False  # the first plan is made when the arm is about to move
        self.arbiter.skipped = self.arbiter.missed = 0
        state = self.robot.state()
        return self.safety.start(state.positions, state.stamp, self.clock.now(), reseat=True)

    def prepare(self) -> None:
        """Warm inference up on what is observed now, once; :meth:`reset` does. Nothing moves."""
        if not self._warm:
            self.source.prepare()
            self._warm = True

    def go(self, source: str) -> tuple[Reason, ...]:
        """Between episodes: let one of the ``others`` command from where the arm is measured until it is over and it stands.

        Returns why it may not; then nothing moves. What ended it is ``arbiter.status.cause``.
        """
        arbiter, end, moved = self.arbiter, self.clock.now() + _PATIENCE, False
        arbiter.stand(f"{source} is to begin")
        with quiet(self.config.fifo, self.config.cpu, self.notes):
            arbiter.heed(self.clock.now())
            while refused := arbiter.begin(source, self.robot.state(), reseat=moved):
                if not moved and all(reason.kind == "start_moved" for reason in refused):
                    moved = True  # by a person, or it was blocked: only then may the set point jump
                    continue
                if any(reason.kind != "stale" for reason in refused) or self.clock.now() >= end:
                    return refused
                self.clock.sleep_until(self.clock.now() + self.dt)
                arbiter.heed(self.clock.now())
            self._between.append(arbiter.episode)
            ticker = Ticker(self.clock, self.dt)
            try:
                while arbiter.commanded or not self.safety.still:
                    arbiter.step(ticker.wait())
            except BaseException as error:  # an interrupt, too
                arbiter.end(repr(error))
                raise
        arbiter.fault = None  # the cause names it
        return ()

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> None:
        """Run for so long, or until ``until()`` or the safety filter has stopped the arm for good and it stands.

        May be called again to go on. Raises what inference raises while the first plan is waited for, and what anything in a
        period raises; before that it stops the arm smoothly.
        """
        with quiet(self.config.fifo, self.config.cpu, self.notes):
            try:
                self._run(seconds, until)
            except BaseException as error:  # an interrupt, too
                self.arbiter.end(repr(error))
                raise

    def _run(self, seconds: float, until: Callable[[], bool] | None) -> None:
        if not self._begun:
            self._begin()
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

    def _begin(self) -> None:
        """Wait for the first plan, standing. Its rows count from when the arm starts to move."""
        self._keep_jumps()
        end = self.clock.now() + _PATIENCE
        while refused := self.arbiter.begin("policy", self.robot.state()):
            late = all(reason.kind == "stale" for reason in refused)
            if not late or self.safety.mode is not Mode.RUNNING or self.clock.now() >= end:
                break
            self.clock.sleep_until(self.clock.now() + self.dt)
        if refused and self.safety.mode is Mode.RUNNING:
            raise EvaluationError(f"the policy cannot begin: {refusal(self.robot, refused[0])}")
        while not refused and not self.source.ready(self.clock.now()):
            self.clock.sleep_until(self.clock.now() + self.dt)
        self._begun = True

    def _keep_jumps(self) -> None:
        """The executor forgets them with the episode; the log does not."""
        self._jumps += [switch.jump for switch in self.executor.switches]
        self.executor.switches.clear()

    def step(self, tick: Tick) -> None:
        """What is done every period. Raises what robot, policy or planner raised; the arm then decelerates."""
        self.arbiter.step(tick)
        fault, self.arbiter.fault = self.arbiter.fault, None
        if fault is not None:
            raise fault

    def close(self) -> None:
        """Stop the arm smoothly, then the engine."""
        try:
            self.arbiter.end("closed")
        finally:
            self.engine.close()
            self._warm = False

    def report(self) -> dict[str, Any]:
        """What was measured in the episodes since the log began; times in ms. Definitions in docs/deploy.md.

        Interventions are those between episodes, too.
        """
        self._keep_jumps()
        rows = self.log.rows()
        return summarise(rows[~np.isin(rows["episode"], self._between)], self.dt, self.safety) | {
            "inference_ms": self.engine.latency.summary(1e3),
            "engine": dict(self.engine.counters),
            "boundary_jump": percentiles(np.array(self._jumps)),
            "interventions": dict(self.safety.events),
            "notes": [*self.notes, *self.engine.notes],
        }


def refusal(robot: Robot, why: Reason) -> str:
    """Why something may not begin, with what the robot knows of it and what to do."""
    explained = getattr(robot, "explained", str)  # of one that knows why nothing new comes
    return f"{explained(str(why))}{mend(str(why))}"


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
        "modes": {str(mode): float((rows["mode"] == code).mean()) for mode, code in MODES.items()},
        "jerk_rms": dict(zip(safety.names, np.sqrt(np.nanmean(jerk**2, axis=0)).tolist(), strict=True)) if len(jerk) else {},
    }
