"""Episodes on a robot, ``robopolicy eval CKPT --robot NAME``: the arm's control path with its safety filter, not task steps.

A robot is named by a short name that some installed package registered under the entry point group ``robopolicy.robots``, or by
the dotted path of what makes it, ``package.module:make``, called as ``make(task name, clock, **arguments)``. One that follows any
clock, as the simulated arm does, is run on a fake one: faster than time, and the same figures each time.

A real arm says ``resets = False``: its ``reset`` moves nothing. Before each episode it is brought to its ``home``, slowly and
through the safety filter; then, at a terminal, who puts the objects back is waited for. Its emergency stop, its deadman and
second masters are heard all the while (:class:`robopolicy.robot.RealRobot`).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from robopolicy.config import import_class
from robopolicy.deploy.clock import Clock, FakeClock, SystemClock
from robopolicy.deploy.control import ControlConfig, ControlLoop, refusal
from robopolicy.deploy.engine import Engine, InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.exported import ExportedPolicy
from robopolicy.deploy.guard import StartGuard
from robopolicy.deploy.home import HomeSource
from robopolicy.deploy.interpolate import InterpolationConfig
from robopolicy.deploy.limits import SafetyLimits, load_limits
from robopolicy.deploy.process import planner_of
from robopolicy.deploy.safety import Mode, Reason, SafetyFilter
from robopolicy.errors import ConfigError, EvaluationError, RobopolicyError
from robopolicy.evaluate.record import Episode, Evaluation, Rollout, check_seeds
from robopolicy.evaluate.run import Actor, check_fit, noise_generator, record
from robopolicy.policy import Policy
from robopolicy.robot import RealRobot, Robot
from robopolicy.task import TaskSpec, find_task

ENTRY_POINTS = "robopolicy.robots"
_LIMITS = "arm"  # of robots that bring none of their own: our arm's
_GRACE = 1e-6  # [s]
_POLL = 0.05  # [s] between looks for stops while a person is waited for
_ROBOTS_OWN = ("rival", "permit")  # begin the causes of stops that are no doing of the policy's


class OnRobot(NamedTuple):
    """What came of it.

    Attributes:
        evaluation: One row per episode. Rewards are 1 for a success and 0 otherwise: robots give none.
        report: Of the last episodes' control loop, see :meth:`ControlLoop.report`.
        stops: Why the safety filter ended episodes and ways home, and how many.
        asked: Episodes that were asked for.
    """

    evaluation: Evaluation
    report: dict[str, Any]
    stops: Counter[str]
    asked: int

    def lines(self) -> list[str]:
        """For a terminal."""
        lines, done = self.evaluation.lines()[:1], len(self.evaluation.episodes)
        if done < self.asked:
            lines.append(f"episodes         {done} of {self.asked}")
        for name, unit in (
            ("lateness_ms", "ms late"),
            ("age_ms", "ms old when carried out"),
            ("inference_ms", "ms of inference"),
        ):
            if (found := self.report.get(name)) and "p50" in found:
                lines.append(f"{name.removesuffix('_ms'):<16} {found['p50']:.1f} (p99 {found['p99']:.1f}) {unit}")
        interventions = ", ".join(f"{count} {kind}" for kind, count in sorted(self.report.get("interventions", {}).items()))
        stops = ", ".join(f"{count} by {cause}" for cause, count in self.stops.most_common())
        return [*lines, f"interventions    {interventions or 'none'}", f"stops            {stops or 'none'}"]


class UnfinishedError(EvaluationError):
    """It ended before the last episode.

    Attributes:
        done: What came of those before.
    """

    def __init__(self, why: str, done: OnRobot) -> None:
        super().__init__(f"{len(done.evaluation.episodes)} of {done.asked} episodes were run, then: {why}")
        self.done = done


def find_robot(name: str) -> Callable[..., Robot]:
    """What makes the robot of this name. Raises ConfigError with the nearest valid one."""
    registry = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    factory: Callable[..., Robot] = import_class("robot", name, registry)
    return factory


def evaluate_on_robot(
    policy: Actor,
    spec: TaskSpec,
    seeds: Sequence[int],
    *,
    robot: str,
    robot_args: Mapping[str, Any] | None = None,
    limits: str | None = None,
    planner: Any = "plain",
    executor: Any = "latest",
    replan: int | None = None,
    delay: float | None = None,
    seconds: float | None = None,
    noise_seed: int = 0,
    progress: bool = True,
    name: str = "policy",
) -> OnRobot:
    """One episode per seed on a robot, one after the other.

    Args:
        policy: A checkpoint's, or an export's.
        spec: The task that it was trained for; the robot is set in it if it is one of simulation.
        seeds: Of the episodes; real robots begin at home, whatever the seed.
        robot: See :func:`find_robot`.
        robot_args: Of the robot, beside those of the task.
        limits: Of the safety filter, a preset or a file; None: the robot's own.
        planner, executor: See :mod:`robopolicy.deploy.planner` and :mod:`robopolicy.deploy.executor`.
        replan: Rows of a chunk that are carried out before the next is asked for; None: the policy's ``n_action_steps``.
        delay: From observation to chunk on a fake clock [s]; None: none. On the machine's clock it is what it is.
        seconds: Of an episode; None: the task's ``max_episode_steps``.
        noise_seed: Seeds the policy's noise together with each episode's seed.

    Raises:
        EvaluationError: Policy and robot do not fit, the robot cannot say what a success is, or an episode cannot begin: the
            filter refuses, the arm has no home or does not get there, or it sees what no demonstration began with.
        UnfinishedError: This, an error of the robot or an interrupt came after the first episode; it has what was done.
    """
    check_seeds(seeds)
    seconds = _seconds(spec) if seconds is None else seconds
    factory = find_robot(robot)
    fake = bool(getattr(factory, "follows_clock", False))
    if delay is not None and not fake:
        raise EvaluationError(f"robot '{robot}' runs on the machine's clock, inference takes what it takes; leave --delay out")
    clock: Clock = FakeClock() if fake else SystemClock()
    try:
        made: Any = factory(spec.name, clock, **{**spec.kwargs, **(robot_args or {})})
    except TypeError as error:
        raise ConfigError(f"robot '{robot}': {error}; check --robot-arg and --task-arg") from error
    rollouts: list[Rollout] = []
    stops, started, generator = Counter[str](), time.perf_counter(), torch.Generator()
    ended: BaseException | None = None
    try:
        check_fit(policy, made, "robot")
        if getattr(made, "success", None) is None:
            raise EvaluationError(f"robot '{robot}' cannot say when an episode succeeded; its profile needs a 'success' topic")
        real = _real(made, robot, fake)
        loop = _loop(policy, made, clock, generator, limits, planner, executor, replan, delay)
        guard = None if fake else StartGuard.of(policy)  # type: ignore[arg-type]  # no other has a loop
        begin = _Begin(loop, made, real, guard, stops)
        try:
            _hear(made, loop, robot)
            # Warming inference up takes the machine for a second, and the robot's messages wait: not in an episode.
            if real is not None:
                loop.prepare()
            elif not fake:
                loop.reset(seeds[0])
            for seed in tqdm(seeds, desc=f"evaluate {name}", unit="episode", disable=not progress):
                generator.set_state(noise_generator(noise_seed, seed).get_state())
                try:
                    begin(seed)
                    rollouts.append(_episode(loop, made, seed, seconds, stops))
                except (RobopolicyError, KeyboardInterrupt) as error:
                    if not rollouts:
                        raise
                    ended = error
                    break
            report = loop.report()
        finally:
            loop.close()
    finally:
        made.close()
    evaluation = record(
        policy,
        spec,
        rollouts,
        name=name,
        noise_seed=noise_seed,
        num_envs=1,
        num_workers=0,
        seconds=time.perf_counter() - started,
    )
    done = OnRobot(evaluation, report, stops, len(seeds))
    if ended is not None:
        raise UnfinishedError(str(ended) or "interrupted", done) from ended
    return done


def _loop(
    policy: Actor,
    robot: Any,
    clock: Clock,
    generator: torch.Generator,
    limits: str | None,
    planner: Any,
    executor: Any,
    replan: int | None,
    delay: float | None,
) -> ControlLoop:
    own: SafetyLimits | None = getattr(robot, "limits", None)
    bounds = load_limits(limits) if limits is not None else (own or load_limits(_LIMITS))
    if limits is not None and own is not None:
        bounds = bounds.model_copy(update={"rate": own.rate})
    assert isinstance(policy, Policy | ExportedPolicy)
    plans = planner_of(policy, planner)
    period = 1.0 / (robot.action_feature.rate or bounds.rate)
    engine: Engine
    if isinstance(clock, FakeClock):
        engine = InlineEngine(plans, period, clock, generator, delay=delay or 0.0)
    else:
        engine = Engine(plans, period, clock, generator)
    config = ControlConfig(n_obs_steps=policy.n_obs_steps, replan=replan or policy.n_action_steps)
    between = InterpolationConfig.of_policy(robot.action_feature, policy)
    safety = SafetyFilter(bounds, robot.kinematics)
    home = [] if getattr(robot, "resets", True) else [HomeSource(robot.home, bounds)]
    return ControlLoop(robot, engine, make_executor(executor), safety, clock, config, between, home)


class _Begin:
    """Brings arm and scene to where an episode begins.

    Args:
        loop: Of the episodes.
        robot: Commanded by the loop.
        real: The same, if it is an arm that is where it was left.
        guard: Judges what is seen first. None: nothing can be harmed, and where no demonstration began is part of the figure.
        stops: What ended ways home is counted here.
    """

    def __init__(
        self, loop: ControlLoop, robot: Any, real: RealRobot | None, guard: StartGuard | None, stops: Counter[str]
    ) -> None:
        self._loop, self._robot, self._real, self._guard, self._stops = loop, robot, real, guard, stops
        self._agreed = False  # a person has said that the arm may go home

    def __call__(self, seed: int) -> None:
        """Raises RobopolicyError where the episode must not begin: then the arm stands. A person at a terminal is asked again."""
        while True:
            try:
                return self._begin(seed)
            except RobopolicyError as error:
                if isinstance(error, _NobodyError) or not self._attended or self._loop.safety.mode is Mode.ESTOPPED:
                    raise
                print(f"\n{error}", file=sys.stderr)
                self._agreed = False

    @property
    def _attended(self) -> bool:
        return self._real is not None and sys.stdin.isatty()

    def _begin(self, seed: int) -> None:
        loop = self._loop
        self._heed()
        if self._real is not None:
            self._go_home(self._real, seed)
            if self._attended:
                self._ask(f"The arm is at home. Put the objects of seed {seed} in place, stand clear, press Enter: it will move.")
        if refused := loop.reset(seed):
            raise self._refused(seed, "the safety filter refuses", refused)
        self._heed()
        if loop.safety.mode is not Mode.RUNNING:
            raise EvaluationError(f"the episode of seed {seed} cannot begin: {loop.arbiter.status.cause}")
        if loop.arbiter.status.deadman is False:
            raise self._refused(seed, "it is not held", (Reason("deadman"),))
        if self._guard is not None and (refused := self._guard(self._robot.observe().values)):
            raise self._refused(seed, "the policy was never trained from here", refused)

    def _go_home(self, robot: RealRobot, seed: int) -> None:
        """To where the arm is at rest, at home."""
        loop = self._loop
        loop.arbiter.stand("between episodes")  # before anything is waited for: who commands no more would stop it at once
        if self._attended and not self._agreed:
            self._ask("The arm goes home, and its gripper, too: it lets go of what it holds. Stand clear, and press Enter.")
            self._agreed = True
        if hindrances := robot.hindrances():
            raise EvaluationError(hindrances[0])
        if refused := loop.go("home"):
            raise self._refused(seed, "the arm may not go home", refused)
        if (cause := loop.arbiter.status.cause) != "home reached":
            self._stops[cause.partition(":")[0]] += 1
            raise EvaluationError(f"the episode of seed {seed} cannot begin, the arm did not get home: {cause}")

    def _ask(self, what: str) -> None:
        """Wait for a person to press Enter, from now on. Stops are heard meanwhile.

        Raises:
            EvaluationError: Nobody is there, or the emergency stop was pressed.
        """
        import select
        import termios  # a real arm is on no Windows

        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # one that was typed ahead is no answer
        print(f"\n{what} ", end="", file=sys.stderr, flush=True)
        while not select.select([sys.stdin], [], [], _POLL)[0]:
            self._heed()
        if not sys.stdin.readline():
            raise _NobodyError("the terminal was closed (Ctrl-D): nobody says that the arm may move, and it stays where it is")

    def _heed(self) -> None:
        """What was asked for while nothing moved. Raises EvaluationError once the emergency stop was pressed: it stays so."""
        loop = self._loop
        loop.arbiter.heed(loop.clock.now())
        if loop.safety.mode is Mode.ESTOPPED:
            raise EvaluationError(f"{loop.arbiter.status.cause}; release it, and evaluate the other seeds")

    def _refused(self, seed: int, who: str, why: tuple[Reason, ...]) -> EvaluationError:
        return EvaluationError(f"the episode of seed {seed} cannot begin, {who}: {refusal(self._robot, why[0])}")


class _NobodyError(EvaluationError):
    """There is nobody to ask again."""


def _real(robot: Any, name: str, fake: bool) -> RealRobot | None:
    """The robot, if it is an arm that is where it was left. Raises EvaluationError where it does not say, or lacks something."""
    resets = getattr(robot, "resets", True if fake else None)
    if resets is None:
        raise EvaluationError(
            f"robot '{name}' does not say whether its reset brings arm and objects to where an episode begins; give it "
            "'resets = True', or False and what RealRobot in robopolicy/robot.py asks for: it is brought home then"
        )
    if resets:
        return None
    if missing := [needed for needed in ("home", "limits", "hindrances", "hear") if not hasattr(robot, needed)]:
        raise EvaluationError(
            f"robot '{name}' does not begin episodes by itself (resets is False) and has no {' and no '.join(missing)}; "
            "RealRobot in robopolicy/robot.py says what they are"
        )
    if robot.home is None:
        raise EvaluationError(
            f"robot '{name}' does not begin episodes by itself and has no home to begin them from; give its profile a "
            "'home', or a 'reset' service if it is simulated"
        )
    found: RealRobot = robot
    return found


def _hear(robot: Any, loop: ControlLoop, name: str) -> None:
    """Who stops the arm is heard from now on, if the robot can."""
    if hasattr(robot, "hear"):
        robot.hear(loop.arbiter.request)
    elif loop.safety.limits.freshness.deadman is not None:
        raise EvaluationError(
            f"the safety limits ask for a deadman, which robot '{name}' does not hear: nothing would ever move; give --limits "
            "without freshness.deadman"
        )


def _episode(loop: ControlLoop, robot: Any, seed: int, seconds: float, stops: Counter[str]) -> Rollout:
    """Raises EvaluationError where a second master or the end of a permit ended it, which say nothing of the policy.

    A person's stop is a failure.
    """
    begun = loop.clock.now()
    loop.run(seconds, until=lambda: robot.success)
    success = bool(robot.success)
    if loop.safety.mode in (Mode.STOPPED, Mode.ESTOPPED):
        cause = loop.arbiter.status.cause
        stops[cause.partition(":")[0]] += 1
        if cause.startswith(_ROBOTS_OWN):
            raise EvaluationError(f"the episode of seed {seed} was stopped and does not count, {cause}")
    rows = max(1, round((loop.clock.now() - begun + _GRACE) / loop.row))
    episode = Episode(seed=seed, success=success, max_reward=float(success), total_reward=float(success), length=rows)
    return Rollout(episode, np.zeros((0, robot.action_feature.size), np.float32))


def _seconds(spec: TaskSpec) -> float:
    task = find_task(spec.name)
    steps, rate = spec.kwargs.get("max_episode_steps", getattr(task, "max_episode_steps", None)), getattr(task, "rate", None)
    if steps is None or rate is None:
        raise EvaluationError(f"task '{spec.name}' does not say how long an episode is before it is built; give --seconds")
    return float(steps) / float(rate)
