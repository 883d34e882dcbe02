"""Push-T with the arm: push a T-shaped block on the table onto its mark, with a stick in the gripper."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from robopolicy.features import Feature
from robopolicy.task import Expert
from sim.arm import model as arm
from sim.arm import tee
from sim.arm.pushing import STICK_RADIUS, pusht_expert
from sim.arm.task import ArmTask, Read
from sim.render import mujoco


class ArmPushT(ArmTask):
    """Cover at least 95 % of the mark with the block.

    The reward is the covered fraction of the mark's area, divided by 0.95 and at most 1. With ``control="ee"`` the action is the
    position of the stick in the plane.
    """

    max_episode_steps = 400
    axes: ClassVar[tuple[str, ...]] = ("x", "y")
    rest: ClassVar[dict[str, float]] = {"x": 0.45, "y": 0.0, "z": 0.065, "yaw": 0.0, "gripper": 2 * STICK_RADIUS}

    goal: ClassVar[tuple[float, float, float]] = (0.48, 0.0, math.pi / 4)  # x [m], y [m], yaw [rad] of the mark
    covered: ClassVar[float] = 0.95

    def __init__(self, **kwargs: Any) -> None:
        self._points = tee.sample_points()
        super().__init__(**kwargs)

    def _xml(self) -> str:
        def boxes(height: float, look: str) -> str:
            size = f"{height / 2}"
            return (
                f'<geom type="box" size="{tee.WIDTH / 2} {tee.THICK / 2} {size}" pos="0 {tee.BAR_Y} 0" {look}/>'
                f'<geom type="box" size="{tee.THICK / 2} {tee.STEM / 2} {size}" pos="0 {tee.STEM_Y} 0" {look}/>'
            )

        solid = 'material="accent" density="600" friction="0.6 0.01 0.0001" contype="2" conaffinity="3"'
        x, y, yaw = self.goal
        block = f'<body name="block"><freejoint name="block"/>{boxes(tee.HEIGHT, solid)}</body>'
        ghost = 'material="goal" contype="0" conaffinity="0"'
        mark = f'<body name="mark" pos="{x} {y} 0.0004" euler="0 0 {yaw}">{boxes(0.001, ghost)}</body>'
        stick = (
            f'<geom name="stick" type="capsule" size="{STICK_RADIUS}" fromto="0 0 0.10 0 0 {arm.FLANGE_TO_EE + 0.045}" '
            'material="red" mass="0.05" contype="1" conaffinity="0"/>'
        )
        return arm.scene(block + mark, tool=stick)

    def _features(self) -> list[tuple[Feature, Read]]:
        self._block = self._data.joint("block").qpos
        self._block_rotation = self._data.body("block").xmat.reshape(3, 3)

        def plane(name: str) -> Feature:
            return Feature(name, (2,), "float32", "m", ("x", "y"), self.rate)

        def heading() -> np.ndarray:
            return np.array([math.cos(self.block_yaw), math.sin(self.block_yaw)])

        names = tuple(f"{point}_{axis}" for point in tee.KEYPOINT_NAMES for axis in "xy")
        return [
            (plane("stick_pos"), lambda: self._ee_pos[:2]),
            (plane("block_pos"), lambda: self._block[:2]),
            (Feature("block_heading", (2,), "float32", "1", ("cos_yaw", "sin_yaw"), self.rate), heading),
            (
                Feature("block_keypoints", (8,), "float32", "m", names, self.rate),
                lambda: (self._block[:2] + tee.KEYPOINTS @ self._block_rotation[:2, :2].T).ravel(),
            ),
        ]

    def _start_command(self, rng: np.random.Generator) -> np.ndarray:
        start = np.array([self.rest[axis] for axis in ("x", "y", "z", "yaw", "gripper")])
        start[:2] = rng.uniform([0.32, -0.25], [0.64, 0.25])
        return start

    def _place(self, rng: np.random.Generator) -> None:
        stick = self._servo.kinematics.pos[:2]
        while True:  # not under the stick
            x, y, yaw = rng.uniform([0.42, -0.12, -math.pi], [0.56, 0.12, math.pi])
            if math.dist(stick, (x, y)) > 0.15:
                break
        self.put_block(x, y, yaw)

    def put_block(self, x: float, y: float, yaw: float) -> None:
        """Place the block flat on the table at ``x``, ``y`` [m], turned by ``yaw`` [rad]."""
        self._block[:] = [x, y, tee.HEIGHT / 2, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]
        mujoco.mj_kinematics(self._model, self._data)

    def _evaluate(self) -> tuple[float, bool]:
        coverage = self.coverage()
        return coverage / self.covered, coverage >= self.covered

    def coverage(self) -> float:
        """Fraction of the mark's area under the block, from points on a grid of 4 mm."""
        gx, gy, goal_yaw = self.goal
        # Points of the block in the mark's frame; areas are equal, so either may be sampled.
        turn, c, s = self.block_yaw - goal_yaw, math.cos(goal_yaw), math.sin(goal_yaw)
        dx, dy = float(self._block[0]) - gx, float(self._block[1]) - gy
        cos, sin = math.cos(turn), math.sin(turn)
        x = cos * self._points[:, 0] - sin * self._points[:, 1] + (c * dx + s * dy)
        y = sin * self._points[:, 0] + cos * self._points[:, 1] + (c * dy - s * dx)
        return float(np.count_nonzero(tee.inside(x, y))) / len(self._points)

    @property
    def block_pos(self) -> np.ndarray:
        """Centre of mass ``[2]`` [m] of the block in the plane; a view."""
        return self._block[:2]

    @property
    def block_yaw(self) -> float:
        """Yaw [rad] of the block in (-pi, pi]."""
        return math.atan2(self._block_rotation[1, 0], self._block_rotation[0, 0])

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Expert:
        """Push where it helps most, go around, push again."""
        return pusht_expert(self, rng, noise)
