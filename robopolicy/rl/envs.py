"""``ChunkEnv``: a vector environment whose step is a whole chunk of actions, for reinforcement.

On top of :class:`robopolicy.vector.VectorEnv` it keeps the windows of observations, starts the next episode where one has ended,
sums the rewards of a chunk, and keeps apart what an episode ended with (``final_obs``) and what the next one began with: a value
bootstrapped from the latter would leak across episodes. An episode is a function of its seed and its actions, so the whole state
can be saved as just those, and be restored by playing them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import pydantic

from robopolicy.config import Config
from robopolicy.errors import TaskError
from robopolicy.evaluate.run import SEEDS, Actor, check_fit
from robopolicy.task import TaskSpec
from robopolicy.vector import VectorEnv


class RewardConfig(Config):
    """What a step is worth, and how the steps of a chunk add up.

    Attributes:
        source: ``task``: the task's own reward. ``success``: 1 for each step at which the goal is met, else 0. ``best``: by how
            much the largest reward of the episode grew, so that the sum is the max reward that evaluation reports; the first
            observation counts as 0, and rewards below that never pay. Dense rewards of tasks that end on success need
            ``success`` or ``best``: with their own an agent earns more by hovering just before the goal.
        discounting: ``chunk``: rewards of a chunk are summed and gamma counts once per chunk (DPPO, ReinFlow, DSRL). ``step``:
            ``sum_j gamma^j r_j`` and ``gamma^n`` after ``n`` executed steps (QC, RL-100).
        gamma: Discount.
        bootstrap: What follows a time-out is worth what the value network says. Right for tasks that go on, where only the
            training is cut; where reward keeps coming, values then grow to ``1 / (1 - gamma)`` chunks of it, so gamma must suit.
            False: a time-out ends the task, as evaluation sees it.
    """

    source: Literal["task", "success", "best"] = "task"
    discounting: Literal["chunk", "step"] = "chunk"
    gamma: float = pydantic.Field(default=0.99, gt=0, le=1)
    bootstrap: bool = True


class Ended(NamedTuple):
    """An episode that ended."""

    success: bool
    max_reward: float  # of the task's own reward
    total_reward: float
    length: int


class Transition(NamedTuple):
    """What came of one chunk in each of ``N`` environments."""

    obs: dict[str, np.ndarray]  # [N, n_obs_steps, *shape] to act on next; of the next episode where one has ended
    final_obs: dict[str, np.ndarray]  # the same before any reset: what the chunk led to
    reward: np.ndarray  # [N] float64
    discount: np.ndarray  # [N] of the value of final_obs: gamma, or gamma^executed
    terminated: np.ndarray  # [N] bool: the episode ended by itself, and final_obs is worth nothing
    truncated: np.ndarray  # [N] bool: it was cut off by its time limit, and final_obs is worth what it is worth
    executed: np.ndarray  # [N] int64 steps taken; fewer than n_action_steps where the episode ended within the chunk
    ended: list[Ended]


class ChunkEnv:
    """``num_envs`` copies of a task, stepped ``n_action_steps`` at a time, each starting a new episode when one has ended.

    Args:
        spec: The task.
        policy: For whom: its windows, its chunks.
        num_envs: Number of environments, N.
        num_workers: Processes that step them; results do not depend on it.
        seed: Of the run. Episode ``k`` of environment ``i`` is a function of ``(seed, i, k)`` and the actions.
        reward: What a step is worth.

    Raises:
        TaskError: Task and policy do not fit, or the task cannot be built.
    """

    def __init__(
        self, spec: TaskSpec, policy: Actor, *, num_envs: int, num_workers: int, seed: int, reward: RewardConfig
    ) -> None:
        self.num_envs, self.seed, self.config = num_envs, seed, reward
        self.n_obs_steps, self.n_action_steps = policy.n_obs_steps, policy.n_action_steps
        self._names = tuple(policy.observation_features)
        self.vector = VectorEnv(spec, num_envs, num_workers)
        try:
            check_fit(policy, self.vector)
        except BaseException:
            self.vector.close()
            raise
        self._episode = np.full(num_envs, -1, np.int64)  # how many episodes each environment has begun, less one
        self._actions: list[list[np.ndarray]] = [[] for _ in range(num_envs)]  # of the present episode, chunk by chunk
        self._history: dict[str, np.ndarray] = {}
        self._best: np.ndarray = np.zeros(num_envs)
        self._total = np.zeros(num_envs)
        self._largest = np.zeros(num_envs)
        self._length, self._success = np.zeros(num_envs, np.int64), np.zeros(num_envs, bool)

    def reset(self) -> dict[str, np.ndarray]:
        """Begin a new episode everywhere; the windows of observations ``name -> [N, n_obs_steps, *shape]``."""
        self._begin(np.ones(self.num_envs, bool))
        return self._window()

    def step(self, actions: np.ndarray) -> Transition:
        """Carry out ``actions [N, n_action_steps, A]``, in the units of the action feature."""
        transition = self._advance(np.asarray(actions), np.ones(self.num_envs, bool))
        done = transition.terminated | transition.truncated
        if done.any():
            self._begin(done)
        return transition._replace(obs=self._window())

    def state(self) -> dict[str, np.ndarray]:
        """What :meth:`restore` needs: which episode each environment is in, and its actions so far."""
        chunks = [chunk for episode in self._actions for chunk in episode]
        width = self.vector.action_feature.shape
        return {
            "episode": self._episode.copy(),
            "chunks": np.array([len(episode) for episode in self._actions], np.int64),
            "actions": np.stack(chunks) if chunks else np.zeros((0, self.n_action_steps, *width), np.float32),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Bring every environment to where it was when :meth:`state` was taken, by playing its episode again."""
        counts, actions = np.asarray(state["chunks"]), np.asarray(state["actions"])
        self._episode[:] = np.asarray(state["episode"]) - 1
        self._begin(np.ones(self.num_envs, bool))
        starts = np.cumsum(counts) - counts
        for k in range(int(counts.max(initial=0))):
            active = counts > k
            chunk = np.zeros((self.num_envs, *actions.shape[1:]), actions.dtype)
            chunk[active] = actions[starts[active] + k]
            self._advance(chunk, active)
        return self._window()

    def close(self) -> None:
        self.vector.close()

    def __enter__(self) -> ChunkEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, which: np.ndarray) -> None:
        self._episode[which] += 1
        seeds = [training_seed(self.seed, i, int(self._episode[i])) if which[i] else None for i in range(self.num_envs)]
        obs = self.vector.reset(seeds)
        if not self._history:
            self._history = {n: np.repeat(obs[n][:, None], self.n_obs_steps, axis=1) for n in self._names}
        for name, past in self._history.items():
            past[which] = obs[name][which][:, None]
        self._finite(np.flatnonzero(which))
        for i in np.flatnonzero(which):
            self._actions[i] = []
        self._best[which] = self._total[which] = 0.0
        self._largest[which] = -np.inf
        self._length[which] = 0
        self._success[which] = False

    def _advance(self, actions: np.ndarray, active: np.ndarray) -> Transition:
        step = self.vector.step(actions, active)
        taken = np.arange(actions.shape[1]) < step.length[:, None]
        for name, past in self._history.items():
            moved = np.concatenate([past, step.obs[name]], axis=1)
            # Not the chunk's last rows: beyond the end of an episode its last observation repeats.
            rows = step.length[:, None] + np.arange(self.n_obs_steps)
            self._history[name] = moved[np.arange(self.num_envs)[:, None], rows]
        self._finite(np.flatnonzero(active))
        if not np.isfinite(step.reward).all():
            raise TaskError("the reward is not finite in training; mend the task, or limit its actions")
        powers = self.config.gamma ** np.arange(actions.shape[1]) if self.config.discounting == "step" else 1.0
        reward = (self._worth(step.reward, step.success, taken) * powers).sum(1)
        discount = self.config.gamma ** (step.length if self.config.discounting == "step" else np.ones(self.num_envs))
        self._length += step.length
        self._success |= step.success.any(1)
        self._total += step.reward.sum(1)
        self._largest = np.maximum(self._largest, np.where(taken, step.reward, -np.inf).max(1))
        for i in np.flatnonzero(active):
            self._actions[i].append(actions[i].astype(np.float32))
        terminated, truncated = step.terminated & active, step.truncated & active
        ended = [
            Ended(bool(self._success[i]), float(self._largest[i]), float(self._total[i]), int(self._length[i]))
            for i in np.flatnonzero(terminated | truncated)
        ]
        window = self._window()
        return Transition(window, window, reward, discount, terminated, truncated, step.length, ended)

    def _worth(self, reward: np.ndarray, success: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """The reward ``[N, T]`` of each step, by the configured source."""
        if self.config.source == "task":
            return reward
        if self.config.source == "success":
            return (success & taken).astype(np.float64)
        best = np.maximum.accumulate(np.concatenate([self._best[:, None], np.where(taken, reward, 0.0)], axis=1), axis=1)
        self._best = best[:, -1]
        grown: np.ndarray = np.diff(best, axis=1)
        return grown

    def _window(self) -> dict[str, np.ndarray]:
        return {name: past.copy() for name, past in self._history.items()}

    def _finite(self, indices: np.ndarray) -> None:
        for name, past in self._history.items():
            if past.dtype.kind == "f" and not np.isfinite(past[indices]).all():
                raise TaskError(f"observation '{name}' is not finite in training; mend the task, or limit its actions")


def training_seed(seed: int, env: int, episode: int) -> int:
    """The environment seed of a training episode: beyond all seeds that evaluation uses, as good as never the same twice."""
    drawn = int(np.random.SeedSequence([seed, env, episode]).generate_state(1, np.uint32)[0])
    return SEEDS["training"] + drawn % (2**31 - SEEDS["training"])
