"""Run a policy in a task on many seeds, and keep what came out: ``evaluate(policy, spec, seeds) -> Evaluation``.

An episode is a function of its environment seed and of the policy's noise. The noise of an episode comes from a generator of its
own, seeded from ``(noise_seed, environment seed)``; the policy always sees a batch of ``num_envs`` rows, also while the last episodes
finish, because matrix products may round differently for other batch sizes. So the same seeds, ``noise_seed`` and ``num_envs`` give the
same episodes, whatever the order of seeds and the number of workers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from robopolicy.errors import EvaluationError, TaskError
from robopolicy.evaluate.record import Episode, Evaluation, describe_machine
from robopolicy.features import Feature
from robopolicy.task import Task, TaskSpec
from robopolicy.vector import VectorEnv

if TYPE_CHECKING:
    from robopolicy.evaluate.film import Film

# Where environment seeds start, by purpose; each range is 100,000 long, so that none is ever used for two.
SEEDS = SimpleNamespace(demonstrations=0, validation=100_000, test=200_000, search=300_000)


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


class Rollout(NamedTuple):
    """One finished episode and the actions ``[length, A]`` that made it; replaying them reproduces it."""

    episode: Episode
    actions: np.ndarray


@dataclass
class _Slot:
    """An episode in progress."""

    seed: int
    generator: torch.Generator
    success: bool = False
    rewards: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)

    def finish(self) -> Rollout:
        rewards = np.concatenate(self.rewards).astype(np.float64)
        episode = Episode(
            seed=self.seed,
            success=self.success,
            max_reward=float(rewards.max()),
            total_reward=float(rewards.sum()),
            length=len(rewards),
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
        policy: The policy; it is asked for chunks of ``n_action_steps`` actions, executed in full (receding horizon).
        spec: The task.
        seeds: Environment seeds, all different; test seeds start at ``SEEDS.test``.
        num_envs: Episodes that advance together, and the batch of the policy; no more than there are seeds.
        num_workers: Processes that step them; 0 steps them in this one.
        noise_seed: Seeds the policy's noise together with each environment seed.
        film: How many successes and failures to film, where there are as many; in ``Evaluation.films``.
        progress: Show a bar on stderr.
        name: What to call the policy in messages and records.

    Raises:
        EvaluationError: Seeds are empty or repeated, or the policy returned NaN or a wrong shape.
        TaskError: Policy and task do not fit together, or the task produced observations that are not finite.
    """
    check_seeds(seeds)
    rollouts: list[Rollout] = []
    started = time.perf_counter()
    with VectorEnv(spec, min(num_envs, len(seeds)), num_workers) as env:
        with tqdm(total=len(seeds), desc=f"evaluate {name}", unit="episode", disable=not progress) as bar:
            for done in rollout(policy, env, seeds, noise_seed=noise_seed, name=name):
                rollouts.append(done)
                successes = sum(r.episode.success for r in rollouts)
                bar.set_postfix_str(f"success {successes}/{len(rollouts)}", refresh=False)
                bar.update()
    evaluation = record(policy, spec, rollouts, num_envs=num_envs, num_workers=num_workers, noise_seed=noise_seed, name=name)
    evaluation = evaluation.model_copy(update={"seconds": time.perf_counter() - started})
    if film != (0, 0):
        films = film_rollouts(spec, rollouts, *film, progress=progress)
        evaluation = evaluation.model_copy(update={"films": tuple(films)})
    return evaluation
