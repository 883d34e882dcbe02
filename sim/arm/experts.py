"""Scripted demonstrators: smooth feedback laws that read the task's true state.

Every expert is a function of what the observation also tells: distances and the gripper's width decide what comes next, not a
counter. A policy that sees one instant can therefore imitate it, and whatever knocks the arm off its way, noise included, is
answered by a correction that ends up in the demonstrations. Pace and heights differ from episode to episode, as with people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sim.arm.lift import Lift
    from sim.arm.reach import Reach
    from sim.arm.stack import Stack
    from sim.arm.task import ArmTask

Plan = Callable[[], np.ndarray]  # the wanted command [x, y, z, yaw, gripper], from the state as it is now

_NOISE_STD = np.array([0.005, 0.005, 0.004, 0.03, 0.0])  # of the command, at noise = 1 [m, m, m, rad, m]
_NOISE_MEMORY = 0.9  # correlation from one control step to the next: half a second


class PlanExpert:
    """Follows a plan, with correlated Gaussian noise on the commands (an Ornstein-Uhlenbeck process of stationary std)."""

    def __init__(self, task: ArmTask, plan: Plan, rng: np.random.Generator, noise: float) -> None:
        self._task, self._plan, self._rng = task, plan, rng
        self._std = noise * _NOISE_STD
        self._offset = np.zeros(5)

    def act(self) -> np.ndarray:
        """The action ``[A]`` for the task's present state."""
        fresh = self._rng.normal(size=5) * self._std
        self._offset = _NOISE_MEMORY * self._offset + np.sqrt(1 - _NOISE_MEMORY**2) * fresh
        return self._task.command_to_action(self._plan() + self._offset)


def towards(here: np.ndarray, goal: np.ndarray, lead: float) -> np.ndarray:
    """The point at most ``lead`` [m] ahead of ``here`` on the way to ``goal``: the lead sets the pace of the arm behind it."""
    way = goal - here
    distance = float(np.sqrt(way @ way))
    return goal if distance <= lead else here + way * (lead / distance)


def ramp(value: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high``, smooth between."""
    s = min(max((value - low) / (high - low), 0.0), 1.0)
    return s * s * (3.0 - 2.0 * s)


def reach_expert(task: Reach, rng: np.random.Generator, noise: float) -> PlanExpert:
    """Straight to the goal."""
    lead = rng.uniform(0.025, 0.04)

    def plan() -> np.ndarray:
        return np.append(towards(task.ee_pos, task.goal, lead), [0.0, 0.0])

    return PlanExpert(task, plan, rng, noise)


def lift_expert(task: Lift, rng: np.random.Generator, noise: float) -> PlanExpert:
    """Over the cube, down along a funnel, close, and up once the fingers hold."""
    lead = rng.uniform(0.020, 0.026)
    hover = rng.uniform(0.06, 0.09)
    top = rng.uniform(0.17, 0.20)

    def plan() -> np.ndarray:
        here, cube = task.ee_pos, task.cube_pos
        return pick(here, cube, task.cube_yaw, task.gripper_width, lead, hover, top)

    return PlanExpert(task, plan, rng, noise)


def stack_expert(task: Stack, rng: np.random.Generator, noise: float) -> PlanExpert:
    """Pick the cube, carry it high over the other, descend along a funnel, open, and rise when open."""
    lead = rng.uniform(0.022, 0.030)
    hover = rng.uniform(0.06, 0.09)
    clear = rng.uniform(0.05, 0.07)

    def plan() -> np.ndarray:
        here, cube, base = task.ee_pos, task.cube_pos, task.base_pos
        resting = base[2] + task.base_half + task.half
        aside = float(np.hypot(*(cube[:2] - base[:2])))
        apart = float(np.hypot(*(here[:2] - cube[:2])))
        width = task.gripper_width
        if aside < 0.02 and abs(cube[2] - resting) < 0.004:  # it stands: let go, then up
            up = resting + clear if width > 0.055 else here[2]
            return np.array([*towards(here, np.array([here[0], here[1], up]), lead), task.base_yaw, OPEN])
        held = apart < 0.016 and abs(here[2] - cube[2]) < 0.02 and width < 0.0425
        if not held:
            return pick(here, cube, task.cube_yaw, width, lead, hover, resting + clear)
        # Up at once where it stands, across only as high as it must be, down only when over the place.
        low = resting - 0.002 + clear * ramp(aside, 0.006, 0.03)
        over = ramp(float(cube[2]), resting - 0.01, resting + 0.5 * clear) if aside > 0.03 else 1.0
        goal = np.array([*(here[:2] + over * (base[:2] - cube[:2])), here[2] + low - cube[2]])
        return np.array([*towards(here, goal, lead), task.cube_yaw if aside > 0.05 else task.base_yaw, 0.0])

    return PlanExpert(task, plan, rng, noise)


OPEN = 0.08  # commanded width of the open gripper [m]


def pick(here: np.ndarray, cube: np.ndarray, yaw: float, width: float, lead: float, hover: float, top: float) -> np.ndarray:
    """The command that picks up a 4 cm cube: descend as the gripper comes over it, close at the bottom, rise when closed."""
    aside = float(np.hypot(here[0] - cube[0], here[1] - cube[1]))
    above = float(here[2] - cube[2])
    around = aside < 0.012 and above < 0.006  # the cube is between the pads
    if aside < 0.016 and above < 0.02 and width < 0.0425:  # and they hold it
        return np.array([*towards(here, np.array([here[0], here[1], top]), lead), yaw, 0.0])
    height = cube[2] - 0.004 + hover * ramp(aside, 0.006, 0.04)
    goal = np.array([cube[0], cube[1], height])
    return np.array([*towards(here, goal, lead), yaw, 0.0 if around else OPEN])
