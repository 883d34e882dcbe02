"""`robopolicy data rollout`: demonstrations by a policy, for example one that reinforcement made better than its own teacher.

The store is one of `data demos` in every respect: what the task observes, before each action, and the action. Episodes are stored
in the order of their seeds, and an episode depends on its seed, the policy and its noise only (see
:mod:`robopolicy.evaluate.run`), so the result is the same for any number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from robopolicy.data.demos import Demonstration, Recorded, collect
from robopolicy.data.store import check_absent
from robopolicy.errors import DataError
from robopolicy.evaluate.run import SEEDS, Actor, check_fit, rollout
from robopolicy.policy import Policy, read_provenance
from robopolicy.provenance import provenance
from robopolicy.task import TaskSpec
from robopolicy.train.checkpoint import find_policy, read_document
from robopolicy.vector import ChunkStep, VectorEnv

_PATIENCE = 200  # failures in a row after which the policy is taken to be unfit for the task


def record_rollouts(
    policy: Actor,
    spec: TaskSpec,
    out: str | Path,
    episodes: int,
    *,
    origin: Mapping[str, Any] | None = None,
    success_only: bool = False,
    seed_start: int = SEEDS["rollouts"],
    noise_seed: int = 0,
    num_envs: int = 50,
    num_workers: int = 0,
    progress: bool = False,
    name: str = "policy",
) -> Recorded:
    """Record episodes of a policy into a new store.

    Observations are those BEFORE each action; actions are what was executed, within the task's limits. Episodes are whole: one
    that goes on after its success is stored to its end. Interrupted or killed, the store holds the episodes recorded so far.

    Args:
        policy: What acts.
        spec: The task; it may observe more than the policy needs, and all of it is stored.
        out: A directory that does not exist.
        episodes: How many to store.
        origin: Where the policy comes from, for the provenance; see :func:`origin_of`.
        success_only: Leave failed episodes out; seeds run on until there are ``episodes``.
        seed_start: Seed of the first episode, in the range that ``SEEDS`` keeps for roll-outs.
        noise_seed: Seeds the policy's noise together with each environment seed.
        num_envs: Episodes that advance together, and the policy's batch; no more than ``episodes``.
        num_workers: Processes that step them; 0 steps them in this one.
        progress: Show a bar on stderr.
        name: What to call the policy in messages.

    Raises:
        DataError: ``out`` exists or cannot be written, or seeds leave those reserved for roll-outs.
        EvaluationError: The policy returned NaN or a wrong shape.
        TaskError: Policy and task do not fit together, or the policy keeps failing.
    """
    if episodes < 1 or num_envs < 1 or num_workers < 0 or noise_seed < 0:
        raise DataError(
            f"rollout: {episodes} episodes, {num_envs} environments, {num_workers} workers, noise seed {noise_seed}; "
            "expected at least 1, 1, 0 and 0 respectively"
        )
    seeds = range(seed_start, SEEDS["training"])
    if seed_start < SEEDS["rollouts"] or len(seeds) < episodes:
        raise DataError(
            f"rollout: seeds {seed_start}..{seed_start + episodes} leave {SEEDS['rollouts']}..{SEEDS['training']}, which are "
            "kept for roll-outs so that no demonstration shows a test; start within them"
        )
    check_absent(Path(out))
    num_envs = min(num_envs, episodes)
    about = {
        "task": spec.name,
        "task_args": dict(spec.kwargs),
        "source": "policy",
        "policy": dict(origin or {}),
        "sampler": policy.config.sampler if isinstance(policy, Policy) else None,
        "initial_noise": policy.config.initial_noise if isinstance(policy, Policy) else None,
        "success_only": success_only,
        "noise_seed": noise_seed,
        "num_envs": num_envs,
        **provenance(),
    }
    env = _Recorder(spec, num_envs, num_workers)
    with env:
        check_fit(policy, env)
        with contextlib.closing(_in_order(policy, env, seeds, noise_seed, name, success_only)) as source:
            return collect(
                source,
                out,
                episodes,
                features={**env.observation_features, env.action_feature.name: env.action_feature},
                about=about,
                seeds=seeds,
                who=f"policy '{name}'",
                mend="train it further, or check the task's arguments",
                patience=_PATIENCE,
                keep_failures=not success_only,
                progress=progress,
            )


def origin_of(path: str | Path) -> dict[str, Any]:
    """Which checkpoint a policy is, and how it was made (method, parent, data, as far as it says so). Raises CheckpointError."""
    folder = find_policy(path)
    machine = provenance()  # versions and the like, which the checkpoint keeps itself
    return {
        "checkpoint": str(folder.resolve()),
        "sha256": read_document(folder / "policy").get("sha256"),
        "provenance": {key: value for key, value in read_provenance(folder).items() if key not in machine},
    }


def _in_order(
    policy: Actor, env: _Recorder, seeds: range, noise_seed: int, name: str, success_only: bool
) -> Generator[Demonstration, None, None]:
    """Episodes of consecutive seeds, in order. Those that wait for an earlier one to end hold at most as many steps as all
    environments take in the longest episode."""
    waiting: dict[int, Demonstration] = {}
    following = seeds.start
    for done in rollout(policy, env, seeds, noise_seed=noise_seed, name=name):
        seed, success = done.episode.seed, done.episode.success
        episode = env.take(seed)
        waiting[seed] = seed, success, episode if success or not success_only else {}
        while following in waiting:
            yield waiting.pop(following)
            following += 1


class _Recorder(VectorEnv):
    """Executes actions within the task's limits, and keeps them and what was observed before each."""

    def __init__(self, spec: TaskSpec, num_envs: int, num_workers: int) -> None:
        super().__init__(spec, num_envs, num_workers)
        task = spec.make()
        try:
            space = task.action_space
        finally:
            task.close()
        # Clipped here and not only by the task, so that what is stored is what was executed to the last bit.
        self._limits = (space.low, space.high) if isinstance(space, gymnasium.spaces.Box) else None
        self._seeds = [-1] * num_envs  # of the episode in each environment
        self._rows: dict[int, dict[str, list[np.ndarray]]] = {}  # by seed, in blocks [t, *shape]

    def reset(self, seeds: Sequence[int | None]) -> dict[str, np.ndarray]:
        obs = super().reset(seeds)
        for i, seed in enumerate(seeds):
            if seed is not None:
                self._seeds[i] = seed
                self._rows[seed] = {name: [value[i : i + 1].copy()] for name, value in obs.items()}
                self._rows[seed][self.action_feature.name] = []
        return obs

    def step(self, actions: np.ndarray, active: np.ndarray | None = None) -> ChunkStep:
        if self._limits is not None:
            actions = np.clip(actions, *self._limits)
        actions = actions.astype(self.action_feature.dtype)
        done = super().step(actions, active)
        for i in np.flatnonzero(done.length):
            rows, taken = self._rows[self._seeds[i]], done.length[i]
            for name, value in done.obs.items():
                rows[name].append(value[i, :taken].copy())  # copies, for a view would keep the other environments' rows
            rows[self.action_feature.name].append(actions[i, :taken].copy())
        return done

    def take(self, seed: int) -> dict[str, np.ndarray]:
        """The features ``[T, *shape]`` of a finished episode, which is then forgotten."""
        rows = {name: np.concatenate(blocks) for name, blocks in self._rows.pop(seed).items()}
        steps = len(rows[self.action_feature.name])
        return {name: value[:steps] for name, value in rows.items()}  # without what was observed after the last action
