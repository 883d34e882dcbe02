"""The Push-T expert: where to touch the block next, and how to get there without touching it before.

The block answers a push through a contact as a body on an ellipsoidal limit surface does (Goyal, Ruina and Papadopoulos 1991;
Lynch and Mason 1996): a force ``f`` at ``p`` from the centre of mass moves it along ``(f, p x f / c^2)``, with ``c`` the ratio of
the largest friction torque to the largest friction force. The contact whose motion points best at the remaining error is used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sim.arm import tee
from sim.arm.experts import PlanExpert

if TYPE_CHECKING:
    from sim.arm.pusht import ArmPushT

STICK_RADIUS = 0.012  # [m]
LENGTH = 0.055  # c above, for the T on a table with even pressure [m]

_CLEAR = STICK_RADIUS + 0.006  # distance from the block's outline at which the stick travels [m]
_AROUND = 0.145  # radius of the way around the block [m]
_POINTS, _NORMALS = tee.faces(margin=0.016)
_TORQUE = _POINTS[:, 0] * _NORMALS[:, 1] - _POINTS[:, 1] * _NORMALS[:, 0]
_TWISTS = np.column_stack([_NORMALS, _TORQUE / LENGTH])  # motion that a push at each contact causes; the rotation as a length
_TWISTS /= np.linalg.norm(_TWISTS, axis=1, keepdims=True)
_GAIN = 1.0 / np.sqrt(1.0 + (_TORQUE / LENGTH) ** 2)  # of the twist's length per length that the stick moves


class Pusher:
    """Chooses contacts and moves the stick, in the block's frame.

    Args:
        lead: How far the commanded stick is ahead of the real one when free [m]; sets the pace.
        patience: A contact is kept while it points at the error with at least this cosine.
    """

    def __init__(self, lead: float, patience: float) -> None:
        self._lead, self._patience = lead, patience
        self._contact: int | None = None

    def target(self, stick: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Where to command the stick ``[2]`` [m].

        Args:
            stick: Position ``[2]`` [m] of the stick.
            error: What the block must still move ``[3]``: x, y [m] and yaw times ``LENGTH`` [m].
        """
        contact = self._choose(stick, error)
        point, normal = _POINTS[contact], _NORMALS[contact]
        touch = point - STICK_RADIUS * normal
        along = float((stick - touch) @ normal)  # how far past first touch
        beside = float(np.linalg.norm(stick - touch - along * normal))
        if beside < 0.008 and -0.012 < along < 0.012:  # in place: push, slower as less is left
            left = float(_TWISTS[contact] @ error) / max(_GAIN[contact], 0.4)
            return touch + normal * (max(along, 0.0) + min(max(left, 0.003), 0.6 * self._lead))
        return self._travel(stick, touch - 0.010 * normal)

    def _choose(self, stick: np.ndarray, error: np.ndarray) -> int:
        aim = _TWISTS @ error / (np.linalg.norm(error) + 1e-9)
        if self._contact is None or aim[self._contact] < self._patience:
            trip = np.linalg.norm(_POINTS - STICK_RADIUS * _NORMALS - stick, axis=1)
            self._contact = int(np.argmax(aim - 0.5 * trip))
        return self._contact

    def _travel(self, stick: np.ndarray, stance: np.ndarray) -> np.ndarray:
        """One step towards ``stance`` past the block: straight if the way is free, else out to a circle and around on it."""
        here = float(tee.distance(stick[None])[0])
        if here < _CLEAR - 0.003:
            return stick + self._lead * _outward(stick)
        way = stance - stick
        length = float(np.linalg.norm(way))
        between = stick + np.linspace(0.0, 1.0, 16)[:, None] * way
        if tee.distance(between).min() > _CLEAR - 0.004:
            return stance if length < self._lead else stick + way * (self._lead / length)
        angle = math.atan2(stick[1], stick[0])
        turn = _wrapped(math.atan2(stance[1], stance[0]) - angle)
        ahead = angle + math.copysign(min(abs(turn), self._lead / _AROUND), turn)
        goal = _AROUND * np.array([math.cos(ahead), math.sin(ahead)])
        if np.hypot(*stick) < _AROUND - 0.02:  # first out
            goal = stick + self._lead * _outward(stick)
        return goal


def pusht_expert(task: ArmPushT, rng: np.random.Generator, noise: float) -> PlanExpert:
    """Push where it helps most, go around, push again."""
    pusher = Pusher(lead=rng.uniform(0.030, 0.040), patience=rng.uniform(0.55, 0.65))
    gx, gy, goal_yaw = task.goal

    def plan() -> np.ndarray:
        yaw = task.block_yaw
        cos, sin = math.cos(yaw), math.sin(yaw)
        to_world = np.array([[cos, -sin], [sin, cos]])
        block = task.block_pos
        error = np.append((np.array([gx, gy]) - block) @ to_world, LENGTH * _wrapped(goal_yaw - yaw))
        target = block + to_world @ pusher.target((task.ee_pos[:2] - block) @ to_world, error)
        return np.array([*target, task.rest["z"], 0.0, task.rest["gripper"]])

    return PlanExpert(task, plan, rng, noise)


def _outward(point: np.ndarray) -> np.ndarray:
    """Unit vector ``[2]`` along which the distance to the block grows fastest."""
    step = 1e-4
    around = point + step * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    d = tee.distance(around)
    gradient = np.array([d[0] - d[1], d[2] - d[3]])
    return gradient / (np.linalg.norm(gradient) + 1e-12)


def _wrapped(angle: float) -> float:
    """The angle [rad] in (-pi, pi]."""
    return math.atan2(math.sin(angle), math.cos(angle))
