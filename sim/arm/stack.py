"""Stack: put one cube on another."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from robopolicy.features import Feature
from robopolicy.task import Expert
from sim.arm import model as arm
from sim.arm.experts import stack_expert
from sim.arm.task import ArmTask, Read, quarter_turn_yaw, rot6d


class Stack(ArmTask):
    """Put the red cube on the green one, let go, and leave it standing for half a second. Reward: approach, carry, place."""

    max_episode_steps = 200
    axes: ClassVar[tuple[str, ...]] = ("x", "y", "z", "yaw", "gripper")
    hold_steps: ClassVar[int] = 10

    half: ClassVar[float] = 0.02  # half the red cube's edge [m]
    base_half: ClassVar[float] = 0.025  # half the green cube's edge [m]
    low: ClassVar[tuple[float, ...]] = (0.37, -0.18)  # where cubes start [m]
    high: ClassVar[tuple[float, ...]] = (0.57, 0.18)
    gap: ClassVar[float] = 0.10  # at least, between their centres [m]

    def _xml(self) -> str:
        return arm.scene(arm.cube("cube", self.half, "red") + arm.cube("base_cube", self.base_half, "green", mass=0.15))

    def _features(self) -> list[tuple[Feature, Read]]:
        data = self._data
        self.cube_pos, self.base_pos = data.joint("cube").qpos[:3], data.joint("base_cube").qpos[:3]
        self._cube_rotation, self._base_rotation = (data.body(name).xmat.reshape(3, 3) for name in ("cube", "base_cube"))
        self._cube_velocity = data.joint("cube").qvel

        def point(name: str) -> Feature:
            return Feature(name, (3,), "float32", "m", tuple("xyz"), self.rate)

        def one(name: str, size: int, unit: str) -> Feature:
            return Feature(name, (size,), "float32", unit, (), self.rate)

        return [
            (point("cube_pos"), lambda: self.cube_pos),
            (one("cube_rot6d", 6, "rot6d"), lambda: rot6d(self._cube_rotation)),
            (one("cube_yaw", 1, "rad"), lambda: np.array([self.cube_yaw])),
            (point("base_cube_pos"), lambda: self.base_pos),
            (one("base_cube_rot6d", 6, "rot6d"), lambda: rot6d(self._base_rotation)),
            (one("base_cube_yaw", 1, "rad"), lambda: np.array([self.base_yaw])),
            (point("ee_to_cube"), lambda: self.cube_pos - self._ee_pos),
            (point("cube_to_base_cube"), lambda: self.base_pos - self.cube_pos),
        ]

    def _place(self, rng: np.random.Generator) -> None:
        first = rng.uniform(self.low, self.high)
        second = rng.uniform(self.low, self.high)
        while math.dist(first, second) < self.gap:
            second = rng.uniform(self.low, self.high)
        for name, half, (x, y) in (("cube", self.half, first), ("base_cube", self.base_half, second)):
            yaw = rng.uniform(-math.pi / 4, math.pi / 4)
            self._data.joint(name).qpos[:] = [x, y, half, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]

    def _evaluate(self) -> tuple[float, bool]:
        cube, base = self.cube_pos, self.base_pos
        distance = float(np.linalg.norm(cube - self._ee_pos))
        aside = math.hypot(cube[0] - base[0], cube[1] - base[1])
        above = float(cube[2] - base[2])
        resting = self.half + self.base_half
        held = distance < 0.035 and self.gripper_width < 2 * self.half + 0.004
        on_top = abs(above - resting) < 0.005 and aside < self.base_half
        free = self.gripper_width > 2 * self.half + 0.012
        still = float(np.abs(self._cube_velocity[:3]).max()) < 0.02
        lifted = min(max((float(cube[2]) - self.half) / resting, 0.0), 1.0)
        progress = 0.2 * math.exp(-8.0 * distance) + 0.2 * held + 0.2 * lifted + 0.3 * lifted * math.exp(-8.0 * aside)
        return max(progress, 0.9 * on_top), on_top and free and still

    @property
    def cube_yaw(self) -> float:
        """Yaw [rad] of the red cube in [-pi/4, pi/4)."""
        return quarter_turn_yaw(self._cube_rotation)

    @property
    def base_yaw(self) -> float:
        """Yaw [rad] of the green cube in [-pi/4, pi/4)."""
        return quarter_turn_yaw(self._base_rotation)

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Expert:
        """Pick the red cube, carry it over the green one, set it down, let go, rise."""
        return stack_expert(self, rng, noise)
