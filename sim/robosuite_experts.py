"""Scripted demonstrators for robosuite's Lift, Can and Stack.

As with the arm of our own (:mod:`sim.arm.experts`), what comes next is decided by distances and the width of the gripper, never
by a counter, so that a policy that sees one instant can imitate it; pace and heights differ from episode to episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sim.robosuite import ACTION_LIMIT

if TYPE_CHECKING:
    from sim.robosuite import Can, Lift, RobosuiteTask, Stack

NOISE_STD = np.array([0.012, 0.012, 0.008, 0.05, 0.05, 0.05])  # of the displacement, at noise = 1 [m, m, m, rad, rad, rad]
NOISE_MEMORY = 0.9  # correlation from one control step to the next: half a second
UP = np.array([0.0, 0.0, 1.0])
FLUSH = 0.012  # distance within which the gripper is around an object [m]


class Goal(NamedTuple):
    """Where the grip site should be, which way the fingers should close, and whether they should."""

    position: np.ndarray  # [3] world frame [m]
    yaw: float | None  # of the closing direction, modulo a quarter turn [rad]; None: any
    close: bool


class GraspExpert:
    """Moves the downward gripper to the goal of the moment, with an Ornstein-Uhlenbeck process on the displacements."""

    def __init__(self, task: RobosuiteTask, plan: Callable[[], Goal], rng: np.random.Generator, noise: float) -> None:
        self._task, self._plan, self._rng = task, plan, rng
        self._std = noise * NOISE_STD
        self._offset: np.ndarray = np.zeros(6)
        self._pace = rng.uniform(0.6, 1.0)

    def act(self) -> np.ndarray:
        """The action ``[7]`` for the task's present state: m, rad, gripper."""
        goal = self._plan()
        quat = self._task.read("eef_quat")
        way = (goal.position - self._task.read("eef_pos")) * 1.5  # the controller covers part of a displacement in a step
        limit = ACTION_LIMIT[0] * self._pace
        way *= min(1.0, limit / max(float(np.linalg.norm(way)), 1e-9))
        self._offset = NOISE_MEMORY * self._offset + math.sqrt(1 - NOISE_MEMORY**2) * self._rng.normal(size=6) * self._std
        move = np.concatenate([way, turn_to(quat, goal.yaw)]) + self._offset
        return np.clip(np.append(move, 1.0 if goal.close else -1.0), -ACTION_LIMIT, ACTION_LIMIT).astype(np.float32)


def turn_to(quat: np.ndarray, yaw: float | None) -> np.ndarray:
    """The rotation vector ``[3]`` (world frame [rad]) that makes the gripper point down and close along ``yaw``.

    Args:
        quat: Present orientation of the grip site, xyzw. Its y axis is the closing direction, its z axis points out of the hand.
        yaw: Wanted direction of closing modulo a quarter turn [rad]; None leaves it.
    """
    x, y, z, w = quat
    closing = np.array([2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)])
    pointing = np.array([2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)])
    turn = np.cross(pointing, [0.0, 0.0, -1.0])
    if yaw is not None:
        error = yaw - math.atan2(closing[1], closing[0])
        turn[2] += (error + math.pi / 4) % (math.pi / 2) - math.pi / 4
    return turn


def yaw_of(quat: np.ndarray) -> float:
    """Heading of a body's x axis [rad] from its orientation, xyzw."""
    x, y, z, w = quat
    return math.atan2(2 * (x * y + z * w), 1 - 2 * (y * y + z * z))


def ramp(value: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high``, smooth between."""
    s = min(max((value - low) / (high - low), 0.0), 1.0)
    return s * s * (3.0 - 2.0 * s)


class Grasp:
    """The present relation of a gripper to an object ``[name]`` that is ``width`` [m] wide."""

    def __init__(self, task: RobosuiteTask, name: str, width: float, hover: float) -> None:
        self.here, self.object = task.read("eef_pos"), task.read(f"{name}_pos")
        left, right = task.read("gripper_qpos")
        self.yaw = yaw_of(task.read(f"{name}_quat"))
        self._hover = hover
        self._aside = math.hypot(*(self.here - self.object)[:2])
        self._around = self._aside < FLUSH and abs(self.here[2] - self.object[2]) < FLUSH
        self.held = self._around and left - right < width + 0.002

    def approach(self, yaw: float | None) -> Goal:
        """Over the object, down along a funnel, and close when around it."""
        height = self._hover * ramp(self._aside, 0.01, 0.05)
        return Goal(self.object + height * UP, yaw, self._around)


def lift_expert(task: Lift, rng: np.random.Generator, noise: float) -> GraspExpert:
    """Grasp the cube and raise it."""
    hover, top = rng.uniform(0.06, 0.09), rng.uniform(0.06, 0.1)

    def plan() -> Goal:
        grasp = Grasp(task, "cube", 0.044, hover)
        if grasp.held:
            return Goal(grasp.here + top * UP, grasp.yaw, True)
        return grasp.approach(grasp.yaw)

    return GraspExpert(task, plan, rng, noise)


def stack_expert(task: Stack, rng: np.random.Generator, noise: float) -> GraspExpert:
    """Grasp the small cube, carry it over the large one, lower it and let go."""
    hover, clearance = rng.uniform(0.06, 0.09), rng.uniform(0.03, 0.05)
    stacked = 0.045  # height of the small cube's centre above the large one's [m]

    def plan() -> Goal:
        grasp = Grasp(task, "small", 0.04, hover)
        goal = task.read("large_pos") + stacked * UP
        to_go = goal - grasp.object
        aside = math.hypot(*to_go[:2])
        if aside < 0.02 and to_go[2] > -0.006:  # it touches, or as good as
            return Goal(grasp.here, grasp.yaw, False)
        if not grasp.held:
            return grasp.approach(grasp.yaw)
        # Rise before going sideways, and be over the place before going down.
        high = clearance * ramp(aside, 0.006, 0.03)
        if to_go[2] + 0.5 * high > 0:
            to_go[:2] *= 0.1
        return Goal(grasp.here + to_go + (high - 0.01) * UP, grasp.yaw, True)  # a little too low: it is pressed on

    return GraspExpert(task, plan, rng, noise)


# From the middle of the can's compartment towards the arm [m]: a downward gripper does not reach its far end.
NEAR = np.array([0.04, 0.03, 0.0])


def can_expert(task: Can, rng: np.random.Generator, noise: float) -> GraspExpert:
    """Grasp the can, carry it over the wall of the bin, and let it drop into its compartment."""
    hover, clearance = rng.uniform(0.08, 0.11), rng.uniform(0.19, 0.22)

    def plan() -> Goal:
        grasp = Grasp(task, "can", 0.052, hover)
        to_go = task.target - NEAR - grasp.object
        aside = math.hypot(*to_go[:2])
        if aside < 0.03:
            return Goal(grasp.here, None, False)
        if not grasp.held:
            return grasp.approach(None)
        to_go[2] += clearance
        if to_go[2] > 0.05:
            to_go[:2] = 0.0
        return Goal(grasp.here + to_go, None, True)

    return GraspExpert(task, plan, rng, noise)
