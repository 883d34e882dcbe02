"""A toy task for the tests of VectorEnv, in a module of its own so that workers import little."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from robopolicy.errors import TaskError
from robopolicy.features import Feature
from robopolicy.task import Observation, Task


class Walk(Task):
    """Adds actions up, with noise; ends when x leaves [-5, 5], is cut off after 20 steps, and fails as tests ask it to."""

    observation_features = {"x": Feature("x", (2,)), "image": Feature("image", (4, 4, 3), dtype="uint8")}
    action_feature = Feature("action", (2,), rate=10.0)
    rate = 10.0
    max_episode_steps = 20
    observation_space = gymnasium.spaces.Dict()
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, fail: str = "", width: int = 2) -> None:
        self._fail, self._width = fail, width
        if fail == "build":
            raise TaskError("walk: the floor is missing; put one in")

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._x, self._steps = self.np_random.normal(size=2), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._fail == "step" and self._steps == 3:
            raise ZeroDivisionError("the step\nafter the last")
        if self._fail == "mendable" and self._steps == 3:
            raise TaskError("walk: tripped; tie the shoes")
        if self._fail == "die" and self._steps == 3:
            os._exit(7)
        if self._fail == "hang" and self._steps == 3:
            time.sleep(600)
        self._x = self._x + action + self.np_random.normal(size=2) * 0.1
        self._steps += 1
        far = bool(np.abs(self._x).max() > 5)
        return self._observe(), float(self._x[0]), far, self._steps == self.max_episode_steps, {"is_success": far}

    def render(self) -> np.ndarray:
        return np.full((2, 2, 3), self._steps, np.uint8)

    def _observe(self) -> Observation:
        return {"x": np.resize(self._x, self._width).astype(np.float32), "image": np.full((4, 4, 3), self._steps, np.uint8)}


class ModuleSpy(Walk):
    """Observes whether torch is loaded and how many threads numerical libraries may use."""

    def _observe(self) -> Observation:
        x = np.array(["torch" in sys.modules, os.environ["OMP_NUM_THREADS"]], np.float32)
        return {"x": x, "image": np.zeros((4, 4, 3), np.uint8)}
