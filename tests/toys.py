"""Toy tasks for the tests of reinforcement, in a module of their own so that workers import little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from robopolicy.features import Feature
from robopolicy.task import Observation, Task

Step = tuple[Observation, float, bool, bool, dict[str, Any]]


class Bandit(Task):
    """One action decides: reward 1 within .12 of (.6, .1). Imitation of two modes at (+-.6, 0) seldom gets there."""

    observation_features = {"x": Feature("x", (1,))}
    action_feature = Feature("action", (2,))
    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(-1, 1, (1,), np.float32)})
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    rate = 1.0
    max_episode_steps = 1

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        return {"x": np.zeros(1, np.float32)}, {}

    def step(self, action: np.ndarray) -> Step:
        good = bool(np.linalg.norm(action - np.array([0.6, 0.1])) < 0.12)
        return {"x": np.zeros(1, np.float32)}, float(good), True, False, {"is_success": good}


class Dot(Task):
    """A dot is to be moved to the middle by displacements, in a wind. Observes its position, and itself as a picture."""

    observation_features = {"x": Feature("x", (2,)), "image": Feature("image", (16, 16, 3), dtype="uint8")}
    action_feature = Feature("action", (2,), rate=10.0)
    observation_space = gymnasium.spaces.Dict()
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    rate = 10.0

    def __init__(self, max_episode_steps: int = 9) -> None:
        self.max_episode_steps = max_episode_steps

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-1, 1, 2), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Step:
        self.x = self.x + 0.3 * np.clip(action, -1, 1) + 0.02 * self.np_random.normal(size=2)
        self.steps += 1
        distance = float(np.linalg.norm(self.x))
        success = distance < 0.25
        return self._observe(), 1 - distance, success, self.steps >= self.max_episode_steps, {"is_success": success}

    def render(self) -> np.ndarray:
        frame = np.zeros((16, 16, 3), np.uint8)
        row, column = np.clip((8 + 5 * self.x).astype(int), 1, 14)
        frame[row - 1 : row + 2, column - 1 : column + 2] = 255
        return frame

    def _observe(self) -> Observation:
        return {"x": self.x.astype(np.float32), "image": self.render()}


class Script(Task):
    """Rewards and endings as told. Observes which episode it is in and how many steps it has taken."""

    observation_features = {"x": Feature("x", (2,))}
    action_feature = Feature("action", (1,))
    observation_space = gymnasium.spaces.Dict()
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    rate = 1.0

    def __init__(
        self,
        rewards: Sequence[float] = (),
        terminates: int = 0,
        max_episode_steps: int = 100,
        success: Sequence[int] = (),
        nan: int = 0,
    ) -> None:
        self.rewards, self.terminates, self.success, self.nan = rewards, terminates, success, nan
        self.max_episode_steps = max_episode_steps

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.tag, self.steps = float(self.np_random.integers(1, 1000)), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Step:
        reward = self.rewards[self.steps] if self.steps < len(self.rewards) else 0.0
        self.steps += 1
        return (
            self._observe(),
            reward,
            self.steps == self.terminates,
            self.steps == self.max_episode_steps,
            {"is_success": self.steps in self.success},
        )

    def _observe(self) -> Observation:
        return {"x": np.array([self.tag, np.nan if self.nan and self.steps == self.nan else self.steps], np.float32)}
