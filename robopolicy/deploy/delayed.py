"""What a delay costs: evaluation in which a chunk arrives ticks after the observation that it was made from.

The planner and the executors are those that run on the arm; only the clock is counted instead of read. Inference starts with the
observation of tick ``k`` and its chunk arrives at tick ``k + delay``. Meanwhile the robot

* goes on with the old chunk (executors ``latest``, ``ensemble``): the next inference starts ``replan`` ticks after this one;
* or stands still, holding its last command (``receding``: the synchronous pause), and observes again ``replan`` rows later.

The first chunk of an episode is there when the episode begins. One tick is one control step of the task, which is one row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from robopolicy.config import Config
from robopolicy.deploy.chunk import Chunk, Previous
from robopolicy.deploy.engine import rows_between
from robopolicy.deploy.executor import Executor, make_executor
from robopolicy.deploy.exported import ExportedPlanner, ExportedPolicy
from robopolicy.deploy.planner import Planner
from robopolicy.deploy.process import planner_of
from robopolicy.errors import ConfigError, EvaluationError, nearest
from robopolicy.evaluate.record import Episode, Evaluation, Rollout, check_seeds
from robopolicy.evaluate.run import check_fit, noise_generator, record
from robopolicy.policy import Policy
from robopolicy.task import TaskSpec
from robopolicy.vector import VectorEnv

Setting = Mapping[str, object] | str

# Names for the usual pairs of planner and executor.
MODES: Mapping[str, tuple[Setting, Setting]] = {
    "pause": ("plain", "receding"),
    "latest": ("plain", "latest"),
    "ensemble": ("plain", "ensemble"),
    "rtc": ("rtc", "latest"),
    "rtc_identity": ({"type": "rtc", "jacobian": "identity"}, "latest"),
    "rtc_trained": ("rtc_trained", "latest"),
    "rti": ("rti", "latest"),
    "streaming": ("streaming", "latest"),
    "bid": ("bid", "latest"),
}

EACH_TICK = ("ensemble",)  # of these, those that blend all chunks: as published they plan as often as inference allows


def mode(setting: Setting) -> tuple[str, Setting, Setting]:
    """Name, planner and executor of one of :data:`MODES`, by name or as ``{type: rti, columns: [6]}``.

    Settings are the planner's; where that is plain, and has none, the executor's. Raises ConfigError for an unknown name.
    """
    if not isinstance(setting, str | Mapping):
        raise ConfigError(f"executor {setting}: give a name, or settings with a type, for example {{type: rti, t_start: 0.8}}")
    asked = _mapping(setting)
    name = str(asked.pop("type", None))
    if name not in MODES:
        raise ConfigError(f"unknown executor '{name}': {nearest(name, MODES)}")
    planner, executor = MODES[name]
    if not asked:
        return name, planner, executor
    if planner == "plain":
        return name, planner, {**_mapping(executor), **asked}
    return name, {**_mapping(planner), **asked}, executor


def _mapping(setting: Setting) -> dict[str, object]:
    return {"type": setting} if isinstance(setting, str) else dict(setting)


class RealTime(Config):
    """How it was carried out.

    Attributes:
        planner, executor, delay, replan: As they were asked for; ticks.
        jump_p50, jump_p95: Boundary jumps: distance from the command that the old plan had for the first tick of the new one to
            the new one's, in the action's units; percentiles over all changes of plan in all episodes. 0 when there was none.
        jerk: RMS of the third difference of the executed commands over the cube of the period [units/s^3].
        calls: Evaluations of networks, backward passes among them, per executed action.
        starved: Share of ticks without a planned action; of a synchronous robot, those in which it waits.
    """

    planner: dict[str, object]
    executor: dict[str, object]
    delay: int
    replan: int
    jump_p50: float
    jump_p95: float
    jerk: float
    calls: float
    starved: float


class Delayed(NamedTuple):
    """Episodes as any evaluation has them, and how they were carried out."""

    evaluation: Evaluation
    realtime: RealTime

    def lines(self) -> list[str]:
        """Both for a terminal."""
        r = self.realtime
        return [
            *self.evaluation.lines(),
            f"boundary jump    p50 {r.jump_p50:.3g}, p95 {r.jump_p95:.3g}; jerk {r.jerk:.3g}",
            f"delay            {r.delay} ticks, replans after {r.replan}; starved {r.starved:.1%}; {r.calls:.2f} calls an action",
        ]


@dataclass
class _Robot:
    """One episode in progress, from the control side."""

    seed: int
    executor: Executor
    generator: torch.Generator
    tick: int = 0
    chunks: int = 0
    success: bool = False
    flight: deque[tuple[int, Chunk]] = field(default_factory=deque)  # arrival tick and chunk, in order
    rewards: list[float] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)

    def finish(self) -> Rollout:
        episode = Episode(
            seed=self.seed,
            success=self.success,
            max_reward=max(self.rewards),
            total_reward=float(np.sum(self.rewards)),
            length=len(self.rewards),
        )
        return Rollout(episode, np.stack(self.actions))


def replan_interval(delay: int, least: int, rows: int) -> int:
    """Ticks from one inference to the next, of chunks of ``rows`` rows: ``least``, or more where inference takes longer.

    A chunk is carried out from row ``delay`` on, and the old plan should still say something when the next arrives: less than
    ``least`` where that is needed for it. From ``2 delay >= rows`` on it is not possible. The arm has the same rule, and its
    engine is busy meanwhile; here that is counted.
    """
    return max(delay, rows_between(delay, least, rows, 1.0))


def evaluate_delayed(
    policy: Policy | ExportedPolicy,
    spec: TaskSpec,
    seeds: Sequence[int],
    *,
    delay: int,
    planner: Setting = "plain",
    executor: Setting = "latest",
    replan: int | None = None,
    num_envs: int = 50,
    num_workers: int = 0,
    noise_seed: int = 0,
    progress: bool = True,
    name: str = "policy",
) -> Delayed:
    """Run one episode per seed as if inference took ``delay`` ticks.

    Args:
        policy: Samples the chunks; an export knows the planner ``plain`` only.
        spec: The task.
        seeds: Environment seeds, all different.
        delay: Ticks from an observation to the chunk that it led to.
        planner: A planner by name, or its settings with a ``type``.
        executor: An executor likewise; ``receding`` makes the robot wait for inference.
        replan: Ticks from one inference to the next; None: ``replan_interval(delay, n_action_steps, F)``.
        num_envs, num_workers, noise_seed, progress, name: As for :func:`robopolicy.evaluate.run.evaluate`.

    Raises:
        ConfigError: The planner or executor is unknown, or does not fit the policy.
        EvaluationError: The delay is negative, or inference would start again before it has ended.
        TaskError: Policy and task do not fit together.
    """
    check_seeds(seeds)
    plan = planner_of(policy, planner)
    assert isinstance(plan, Planner | ExportedPlanner)
    replan = replan_interval(delay, policy.n_action_steps, plan.rows) if replan is None else replan
    if delay >= plan.rows:
        raise EvaluationError(f"delay {delay}: a chunk is over when it arrives, it has {plan.rows} rows; train a longer horizon")
    if delay < 0 or replan < max(delay, 1):
        raise EvaluationError(f"delay {delay}, replan {replan}: expected 0 <= delay <= replan, and replan at least 1 tick")
    setting = _mapping(executor)
    waits = setting["type"] == "receding"
    if waits:
        setting.setdefault("rows", replan)
    make_executor(setting)  # an error in it is told before anything runs
    started = time.perf_counter()
    num_envs = min(num_envs, len(seeds))
    with (
        VectorEnv(spec, num_envs, num_workers) as env,
        tqdm(total=len(seeds), desc=f"delay {delay} {name}", unit="episode", disable=not progress) as bar,
    ):
        check_fit(policy, env)
        run = _Run(plan, env, setting, delay, replan, waits, noise_seed)
        rollouts = []
        for done in run.episodes(seeds):
            rollouts.append(done)
            bar.update()
    evaluation = record(
        policy,
        spec,
        rollouts,
        name=name,
        noise_seed=noise_seed,
        num_envs=num_envs,
        num_workers=num_workers,
        seconds=time.perf_counter() - started,
    )
    jumps = np.array(run.jumps or [0.0])
    return Delayed(
        evaluation,
        RealTime(
            planner=_mapping(planner),
            executor=setting,
            delay=delay,
            replan=replan,
            jump_p50=float(np.percentile(jumps, 50)),
            jump_p95=float(np.percentile(jumps, 95)),
            jerk=_jerk([r.actions for r in rollouts], env.rate),
            calls=run.calls / run.ticks,
            starved=run.held / run.ticks,
        ),
    )


class _Run:
    """The loop. All robots think at the same ticks, in one batch of one size: how a row is rounded may depend on the batch."""

    def __init__(
        self,
        planner: Planner | ExportedPlanner,
        env: VectorEnv,
        executor: Mapping[str, object],
        delay: int,
        replan: int,
        waits: bool,
        noise_seed: int,
    ) -> None:
        self.planner, self.env, self.delay, self.noise_seed = planner, env, delay, noise_seed
        # A robot that waits executes `replan` rows and then thinks for `delay` ticks: it begins when the others have thought.
        self.cycle, self.begin = (replan + delay, delay) if waits else (replan, 0)
        self.dt = 1.0 / env.rate
        self.executors = [make_executor(executor) for _ in range(env.num_envs)]
        self.robots: list[_Robot | None] = [None] * env.num_envs
        self.idle = torch.Generator()  # for rows that do not think now: what they draw is thrown away
        self.history: dict[str, np.ndarray] = {}
        self.jumps: list[float] = []
        self.calls, self.ticks, self.held = 0, 0, 0

    def episodes(self, seeds: Sequence[int]) -> Iterator[Rollout]:
        """One episode per seed, each as it ends."""
        queue, clock = deque(seeds), 0
        while queue or any(self.robots):
            fresh = self._begin(queue) if clock % self.cycle == self.begin % self.cycle else []
            self._deliver()
            thinking = [i for i, r in enumerate(self.robots) if r is not None and clock % self.cycle == 0 and i not in fresh]
            if fresh or thinking:
                self._think(fresh, thinking)
                self._deliver()
            yield from self._step()
            clock += 1

    def _begin(self, queue: deque[int]) -> list[int]:
        """Give idle robots their next episodes."""
        fresh = {i: queue.popleft() for i, robot in enumerate(self.robots) if robot is None and queue}
        if not fresh:
            return []
        obs, steps = self.env.reset([fresh.get(i) for i in range(self.env.num_envs)]), self.planner.policy.n_obs_steps
        if not self.history:
            self.history = {n: np.repeat(obs[n][:, None], steps, axis=1) for n in self.planner.policy.observation_features}
        for i, seed in fresh.items():
            self.executors[i].reset()
            self.robots[i] = _Robot(seed, self.executors[i], noise_generator(self.noise_seed, seed))
            for n, past in self.history.items():
                past[i] = obs[n][i]
        self.planner.reset(list(fresh))
        return list(fresh)

    def _think(self, fresh: Sequence[int], thinking: Sequence[int]) -> None:
        """One inference; the chunks of robots that begin arrive at once."""
        batch, rows, size = len(self.robots), self.planner.rows, self.env.action_feature.size
        previous = Previous(np.zeros((batch, rows, size), np.float32), np.zeros(batch, np.int64))
        for i in thinking:
            robot = self.robots[i]
            assert robot is not None
            left = robot.executor.remaining(robot.tick * self.dt)
            if left is not None:
                previous.known[i] = min(len(left.actions), rows)
                previous.actions[i, : previous.known[i]] = left.actions[:rows]
        generators = [self.idle] * batch
        for i in (*fresh, *thinking):
            robot = self.robots[i]
            assert robot is not None
            generators[i] = robot.generator
        for values in self.history.values():
            values[[robot is None for robot in self.robots]] = 0  # what an episode ended on may be no number
        actions = self.planner.plan(self.history, previous if thinking else None, self.delay, generators)
        if not np.isfinite(actions[[*fresh, *thinking]]).all():
            raise EvaluationError("the planner returned NaN or infinity; evaluate another checkpoint, or lower its guidance")
        self.calls += self.planner.calls * (len(fresh) + len(thinking))
        for i in (*fresh, *thinking):
            robot = self.robots[i]
            assert robot is not None
            arrival = robot.tick + (self.delay if i in thinking else 0)
            chunk = Chunk(actions[i], robot.tick * self.dt, self.dt, arrival * self.dt, robot.chunks)
            robot.chunks += 1
            robot.flight.append((arrival, chunk))

    def _deliver(self) -> None:
        for robot in self.robots:
            while robot is not None and robot.flight and robot.flight[0][0] <= robot.tick:
                robot.executor.add(robot.flight.popleft()[1])

    def _step(self) -> Iterator[Rollout]:
        """One tick of all robots."""
        commands = np.zeros((len(self.robots), 1, self.env.action_feature.size), self.env.action_feature.dtype)
        live = np.array([robot is not None for robot in self.robots])
        for i, robot in enumerate(self.robots):
            if robot is not None:
                commands[i, 0] = robot.executor.action(robot.tick * self.dt).action
        step = self.env.step(commands, live)
        steps = self.planner.policy.n_obs_steps
        self.history = {n: np.concatenate([past, step.obs[n]], axis=1)[:, -steps:] for n, past in self.history.items()}
        for i, robot in enumerate(self.robots):
            if robot is None:
                continue
            robot.tick += 1
            robot.success |= bool(step.success[i, 0])
            robot.rewards.append(float(step.reward[i, 0]))
            robot.actions.append(commands[i, 0].copy())
            if step.terminated[i] or step.truncated[i]:
                self.ticks += robot.tick
                self.held += robot.executor.held
                self.jumps += [switch.jump for switch in robot.executor.switches]
                self.robots[i] = None
                yield robot.finish()


def _jerk(episodes: Sequence[np.ndarray], rate: float) -> float:
    """RMS of the third difference of commands ``[T, A]`` [units/s^3]."""
    thirds = [np.diff(actions.astype(np.float64), n=3, axis=0) for actions in episodes if len(actions) > 3]
    return float(np.sqrt(np.mean(np.sum(np.concatenate(thirds) ** 2, axis=1)))) * rate**3 if thirds else 0.0
