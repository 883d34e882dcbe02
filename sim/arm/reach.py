"""Reach: bring the closed gripper to a point in the air."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from robopolicy.features import Feature
from robopolicy.task import Expert
from sim.arm import model as arm
from sim.arm.experts import reach_expert
from sim.arm.task import ArmTask, Read


class Reach(ArmTask):
    """Bring ``ee`` within 1 cm of a goal point and stay there for a quarter of a second. Reward falls with the distance."""

    max_episode_steps = 60
    axes: ClassVar[tuple[str, ...]] = ("x", "y", "z")
    rest: ClassVar[dict[str, float]] = {**ArmTask.rest, "gripper": 0.0}
    hold_steps: ClassVar[int] = 5

    tolerance: ClassVar[float] = 0.01  # [m]
    goal_low: ClassVar[tuple[float, ...]] = (0.32, -0.28, 0.05)  # [m]
    goal_high: ClassVar[tuple[float, ...]] = (0.64, 0.28, 0.38)

    def _xml(self) -> str:
        ball = '<geom type="sphere" size="0.012" material="goal" contype="0" conaffinity="0"/>'
        return arm.scene(f'<body name="goal" mocap="true">{ball}</body>')

    def _features(self) -> list[tuple[Feature, Read]]:
        def point(name: str) -> Feature:
            return Feature(name, (3,), "float32", "m", tuple("xyz"), self.rate)

        return [(point("goal_pos"), lambda: self.goal), (point("ee_to_goal"), lambda: self.goal - self._ee_pos)]

    def _place(self, rng: np.random.Generator) -> None:
        self._data.mocap_pos[0] = rng.uniform(self.goal_low, self.goal_high)

    def _evaluate(self) -> tuple[float, bool]:
        distance = float(np.linalg.norm(self.goal - self._ee_pos))
        return float(np.exp(-5.0 * distance)), distance < self.tolerance

    @property
    def goal(self) -> np.ndarray:
        """The goal point ``[3]`` [m]."""
        return self._data.mocap_pos[0]

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Expert:
        """Straight to the goal, slowing down near it."""
        return reach_expert(self, rng, noise)
