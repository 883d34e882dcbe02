"""Lift: pick up a cube."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from robopolicy.features import Feature
from robopolicy.task import Expert
from sim.arm import model as arm
from sim.arm.experts import lift_expert
from sim.arm.task import ArmTask, Read, quarter_turn_yaw, rot6d


class Lift(ArmTask):
    """Raise a 4 cm cube by at least 6 cm and hold it for half a second. Reward: approach, grasp, height."""

    max_episode_steps = 100
    axes: ClassVar[tuple[str, ...]] = ("x", "y", "z", "yaw", "gripper")
    hold_steps: ClassVar[int] = 10

    half: ClassVar[float] = 0.02  # half the cube's edge [m]
    height: ClassVar[float] = 0.06  # to raise it by [m]
    cube_low: ClassVar[tuple[float, ...]] = (0.37, -0.16, -math.pi / 4)  # x [m], y [m], yaw [rad]
    cube_high: ClassVar[tuple[float, ...]] = (0.57, 0.16, math.pi / 4)

    def _xml(self) -> str:
        return arm.scene(arm.cube("cube", self.half, "red"))

    def _features(self) -> list[tuple[Feature, Read]]:
        joint = self._data.joint("cube").qpos
        self.cube_pos = joint[:3]
        self._cube_rotation = self._data.body("cube").xmat.reshape(3, 3)

        def point(name: str) -> Feature:
            return Feature(name, (3,), "float32", "m", tuple("xyz"), self.rate)

        return [
            (point("cube_pos"), lambda: self.cube_pos),
            (Feature("cube_rot6d", (6,), "float32", "rot6d", (), self.rate), lambda: rot6d(self._cube_rotation)),
            (Feature("cube_yaw", (1,), "float32", "rad", (), self.rate), lambda: np.array([self.cube_yaw])),
            (point("ee_to_cube"), lambda: self.cube_pos - self._ee_pos),
        ]

    def _start_command(self, rng: np.random.Generator) -> np.ndarray:
        # Anywhere above the cubes, with any opening: demonstrations then show what to do after closing too early, or too high.
        return rng.uniform([0.37, -0.16, 0.07, 0.0, 0.01], [0.57, 0.16, 0.25, 0.0, arm.GRIPPER_MAX_WIDTH])

    def _place(self, rng: np.random.Generator) -> None:
        x, y, yaw = rng.uniform(self.cube_low, self.cube_high)
        self._data.joint("cube").qpos[:] = [x, y, self.half, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]

    def _evaluate(self) -> tuple[float, bool]:
        distance = float(np.linalg.norm(self.cube_pos - self._ee_pos))
        raised = float(self.cube_pos[2]) - self.half
        held = distance < 0.035 and self.gripper_width < 3 * self.half  # the diagonal between the pads counts too
        progress = 0.3 * math.exp(-8.0 * distance) + 0.2 * held + 0.5 * held * min(max(raised / self.height, 0.0), 1.0)
        return progress, raised >= self.height and held

    @property
    def cube_yaw(self) -> float:
        """Yaw [rad] of the cube in [-pi/4, pi/4): it looks the same after every quarter turn."""
        return quarter_turn_yaw(self._cube_rotation)

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Expert:
        """Over the cube, down, close, up."""
        return lift_expert(self, rng, noise)
