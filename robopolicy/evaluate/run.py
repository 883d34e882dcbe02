"""Run a policy in a task on many seeds, and keep what came out: ``evaluate(policy, spec, seeds) -> Evaluation``.

An episode is a function of its environment seed and of the policy's noise. The noise of an episode comes from a generator of
its own, seeded from ``(noise_seed, environment seed)``; and the policy sees a batch of the same size throughout, also while
the last episodes finish, because matrix products may round differently for other sizes. So the same seed, ``noise_seed`` and
``num_envs`` give the same episode, whatever the other seeds, their order, and the number of workers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from robopolicy.errors import EvaluationError, TaskError
from robopolicy.evaluate.film import film_rollouts
from robopolicy.evaluate.record import Episode, Evaluation, Film, Rollout, Settings, TaskRecord, check_seeds
from robopolicy.features import ActionsError, Feature
from robopolicy.policy import Policy
from robopolicy.provenance import provenance
from robopolicy.task import TaskSpec
from robopolicy.vector import VectorEnv

# Where environment seeds start, by purpose; each range is 100,000 long and the last one has no end, so that no seed serves two.
SEEDS = {"demonstrations": 0, "validation": 100_000, "test": 200_000, "search": 300_000, "rollouts": 400_000, "training": 500_000}


class Actor(Protocol):
    """What evaluation needs of a policy; :class:`robopolicy.policy.Policy` is one."""

    @property
    def observation_features(self) -> Mapping[str, Feature]: ...
    @property
    def action_feature(self) -> Feature: ...
    @property
    def n_obs_steps(self) -> int: ...
    @property
    def n_action_steps(self) -> int: ...

    def act(self, obs: Mapping[str, np.ndarray], generator: Sequence[torch.Generator]) -> np.ndarray:
        """``obs[name]: [B, n_obs_steps, *shape]`` to actions ``[B, n_action_steps, A]``, one generator per row."""
        ...


@dataclass
class _Slot:
    """An episode in progress."""

    seed: int
    generator: torch.Generator
    success: bool = False
    steps: int = 0
    rewards: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)

    def finish(self) -> Rollout:
        rewards = np.concatenate(self.rewards).astype(np.float64)
        episode = Episode(
            seed=self.seed,
            success=self.success,
            max_reward=float(rewards.max()),
            total_reward=float(rewards.sum()),
            length=self.steps,
        )
        return Rollout(episode, np.concatenate(self.actions))


def evaluate(
    policy: Actor,
    spec: TaskSpec,
    seeds: Sequence[int],
    *,
    num_envs: int = 50,
    num_workers: int = 0,
    noise_seed: int = 0,
    film: tuple[int, int] = (0, 0),
    progress: bool = True,
    name: str = "policy",
) -> Evaluation:
    """Run one episode per seed and summarise them.

    Args:
        policy: Asked for chunks of ``n_action_steps`` actions, which are executed in full before it is asked again.
        spec: The task.
        seeds: Environment seeds, all different; those for tests start at ``SEEDS["test"]``.
        num_envs: Episodes that advance together, and the policy's batch; no more than there are seeds.
        num_workers: Processes that step them; 0 steps them in this one.
        noise_seed: Seeds the policy's noise together with each environment seed.
        film: How many successes and failures to film, as far as there are as many; they end up in ``Evaluation.films``.
        progress: Show a bar on stderr.
        name: What to call the policy in messages and records.

    Raises:
        EvaluationError: Seeds are empty, negative or repeated, or the policy returned NaN or a wrong shape.
        TaskError: Policy and task do not fit together, or the task's observations are not finite.
    """
    check_seeds(seeds)
    rollouts: list[Rollout] = []
    successes = 0
    started = time.perf_counter()
    num_envs = min(num_envs, len(seeds))
    with (
        VectorEnv(spec, num_envs, num_workers) as env,
        tqdm(total=len(seeds), desc=f"evaluate {name}", unit="episode", disable=not progress) as bar,
    ):
        check_fit(policy, env)
        for done in rollout(policy, env, seeds, noise_seed=noise_seed, name=name):
            rollouts.append(done)
            successes += done.episode.success
            bar.set_postfix_str(f"success {successes}/{len(rollouts)}", refresh=False)
            bar.update()
    seconds = time.perf_counter() - started
    films = film_rollouts(spec, rollouts, *film) if any(film) else ()
    return record(
        policy,
        spec,
        rollouts,
        name=name,
        noise_seed=noise_seed,
        num_envs=num_envs,
        num_workers=num_workers,
        seconds=seconds,
        films=films,
    )


def rollout(policy: Actor, env: VectorEnv, seeds: Sequence[int], *, noise_seed: int, name: str = "policy") -> Iterator[Rollout]:
    """Run one episode per seed in ``env`` and yield each as it ends (not in the order of ``seeds``).

    An environment whose episode ended takes the next seed. Raises as :func:`evaluate`.
    """
    queue = deque(seeds)
    slots: list[_Slot | None] = [None] * env.num_envs
    generators = [torch.Generator() for _ in slots]  # idle rows keep theirs: nobody reads what they draw
    history: dict[str, np.ndarray] = {}
    while True:
        fresh = {i: queue.popleft() for i, slot in enumerate(slots) if slot is None and queue}
        if fresh:
            obs = env.reset([fresh.get(i) for i in range(env.num_envs)])
            if not history:
                history = {n: np.repeat(obs[n][:, None], policy.n_obs_steps, axis=1) for n in policy.observation_features}
            for i, seed in fresh.items():
                generators[i] = noise_generator(noise_seed, seed)
                slots[i] = _Slot(seed, generators[i])
                for n, past in history.items():
                    past[i] = obs[n][i]
        live = {i: slot for i, slot in enumerate(slots) if slot is not None}
        if not live:
            return
        _check_observations(history, live)
        for values in history.values():
            values[[slot is None for slot in slots]] = 0  # what an episode ended on may be no number, and nobody reads the answer
        actions = _act(policy, history, generators)
        _check_actions(actions, live, policy, name)
        step = env.step(actions, np.array([slot is not None for slot in slots]))
        history = {n: np.concatenate([past, step.obs[n]], axis=1)[:, -policy.n_obs_steps :] for n, past in history.items()}
        for i, slot in live.items():
            taken = int(step.length[i])
            slot.success |= bool(step.success[i, :taken].any())
            slot.steps += taken
            slot.rewards.append(step.reward[i, :taken].copy())
            slot.actions.append(actions[i, :taken])
            if step.terminated[i] or step.truncated[i]:
                slots[i] = None
                yield slot.finish()


def noise_generator(noise_seed: int, seed: int) -> torch.Generator:
    """The generator of one episode's policy noise; independent streams for different ``(noise_seed, seed)``."""
    state = int(np.random.SeedSequence([noise_seed, seed]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)  # manual_seed takes 63 bits


def record(
    policy: Actor,
    spec: TaskSpec,
    rollouts: Sequence[Rollout],
    *,
    name: str,
    noise_seed: int,
    num_envs: int,
    num_workers: int,
    seconds: float,
    films: Sequence[Film] = (),
) -> Evaluation:
    """The :class:`Evaluation` of finished episodes, sorted by seed."""
    return Evaluation(
        policy=name,
        task=TaskRecord(name=spec.name, args=dict(spec.kwargs)),
        settings=Settings(
            noise_seed=noise_seed,
            n_obs_steps=policy.n_obs_steps,
            n_action_steps=policy.n_action_steps,
            sampler=policy.config.sampler if isinstance(policy, Policy) else None,
            initial_noise=policy.config.initial_noise if isinstance(policy, Policy) else None,
            nfe=policy.nfe if isinstance(policy, Policy) else None,
            num_envs=num_envs,
            num_workers=num_workers,
            threads=torch.get_num_threads(),
            device=str(policy.device) if isinstance(policy, Policy) else "cpu",
        ),
        provenance=provenance(),
        seconds=seconds,
        episodes=tuple(sorted((r.episode for r in rollouts), key=lambda episode: episode.seed)),
        films=tuple(films),
    )


class Declares(Protocol):
    """A task, or a robot: what it shows and takes."""

    @property
    def observation_features(self) -> Mapping[str, Feature]: ...
    @property
    def action_feature(self) -> Feature: ...


def check_fit(policy: Actor, env: Declares, what: str = "task") -> None:
    """Raises TaskError when the task (or robot) lacks a feature of the policy, or declares another shape or unit."""
    observed = env.observation_features
    for name, feature in policy.observation_features.items():
        if name not in observed:
            raise TaskError(
                f"the policy needs observation '{name}' and the {what} has {', '.join(sorted(observed))}; check --{what}-arg"
            )
        _same(feature, observed[name], f"observation '{name}'", what)
    _same(policy.action_feature, env.action_feature, "the action", what)


def _same(wanted: Feature, found: Feature, name: str, what: str) -> None:
    for aspect, theirs, ours in (("shape", found.shape, wanted.shape), ("unit", found.unit, wanted.unit)):
        if theirs != ours and theirs != "" != ours:  # an empty unit is an unknown one
            raise TaskError(f"{name} of the {what} has {aspect} {theirs}, the policy was trained on {ours}; check --{what}-arg")


def _act(policy: Actor, obs: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
    """What it answers, also where that is NaN: of which episode is known here, and the rows of none do not matter."""
    try:
        return policy.act(obs, generators)
    except ActionsError as error:
        return error.actions


def _check_observations(history: Mapping[str, np.ndarray], live: Mapping[int, _Slot]) -> None:
    for name, values in history.items():
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        for i, slot in live.items():
            if not np.isfinite(values[i]).all():
                raise TaskError(f"observation '{name}' is not finite (seed {slot.seed}, step {slot.steps}); mend the task")


def _check_actions(actions: np.ndarray, live: Mapping[int, _Slot], policy: Actor, name: str) -> None:
    expected = (len(actions), policy.n_action_steps, *policy.action_feature.shape)
    if actions.shape != expected:
        raise EvaluationError(f"policy '{name}' returned actions of shape {actions.shape}; expected {expected}")
    for i, slot in live.items():
        if not np.isfinite(actions[i]).all():
            raise EvaluationError(
                f"policy '{name}' returned NaN or infinity in the episode of seed {slot.seed} at step {slot.steps}; "
                "its training diverged (evaluate an earlier checkpoint), or it sees what is far from all that it was trained on"
            )
