"""``Workspace``: a box for the tool and a plane for every point of the arm, by the robot's forward kinematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from robopolicy.deploy.limits import WorkspaceConfig

_DAMPING = 1e-4  # of the squared singular values [m^2/rad^2]: weak, steps are small
_ITERATIONS = 6
_EXACT = 1e-6  # a projection is good when it is no farther outside [m]
_INTERVAL = 0.02  # between the points of a stop that are looked at [s]


class Kinematics(Protocol):
    """Where points of the arm are. The first is the tool; others, elbow or wrist, only keep above the table.

    Attributes:
        names: Of the points, for messages.
        levers: ``[P, n]`` how far each point can move at most per unit of each coordinate, whatever the posture [m/rad], or None
            when unknown. They spare forward kinematics where the borders are far.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def levers(self) -> np.ndarray | None: ...

    def points(self, coordinates: np.ndarray) -> np.ndarray:
        """Positions ``[P, 3]`` in the base frame [m] at ``coordinates [n]``; may be a view that the next call overwrites."""
        ...

    def jacobians(self) -> np.ndarray:
        """Derivatives ``[P, 3, n]`` of the points at the last ``points``."""
        ...


class CartesianKinematics:
    """Of robots that take positions of their tool: the first three coordinates are the point."""

    names = ("tool",)

    def __init__(self, coordinates: int) -> None:
        self._jacobian = np.eye(3, coordinates)[None]
        self.levers: np.ndarray | None = np.abs(self._jacobian).sum(1)

    def points(self, coordinates: np.ndarray) -> np.ndarray:
        return coordinates[None, :3]

    def jacobians(self) -> np.ndarray:
        return self._jacobian


class Workspace:
    """Projects commands into the box, and judges whether stops stay in it.

    A start outside, by no more than the config allows, widens the box to include it; on the way in it closes behind the arm.
    """

    def __init__(self, config: WorkspaceConfig, kinematics: Kinematics) -> None:
        count = len(kinematics.names)
        self.config, self.kinematics = config, kinematics
        self.lower, self.upper = np.full((count, 3), -np.inf), np.full((count, 3), np.inf)
        if config.table is not None:
            self.lower[:, 2] = config.table
        self.lower[0] = np.maximum(self.lower[0], config.lower)
        self.upper[0] = config.upper
        self._low, self._high = self.lower.copy(), self.upper.copy()  # widened

    def outside(self, q: np.ndarray) -> tuple[str, float]:
        """The worst point and axis, and by how much [m] it is outside of the box at ``q [n]``; 0 when inside."""
        points = self.kinematics.points(q)
        excess = np.maximum(self.lower - points, points - self.upper)
        worst = int(np.argmax(excess))
        return f"{self.kinematics.names[worst // 3]}.{'xyz'[worst % 3]}", max(
            float(excess.flat[worst]), 0.0
        )  # in this order NaN stays NaN

    def seat(self, q: np.ndarray) -> None:
        """Widen the box to include ``q``."""
        points = self.kinematics.points(q)
        self._low, self._high = np.minimum(self.lower, points), np.maximum(self.upper, points)

    def close(self, q: np.ndarray) -> None:
        """The box closes behind the arm, which is at ``q`` now."""
        if (self._low < self.lower).any() or (self._high > self.upper).any():
            points = self.kinematics.points(q)
            self._low = np.minimum(self.lower, np.maximum(self._low, points))
            self._high = np.maximum(self.upper, np.minimum(self._high, points))

    def project(self, q: np.ndarray, inside: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray | None:
        """The target ``q [n]`` brought to the border of the box (less its margin), or None when it is inside.

        Damped least squares on the points outside, which keeps what the border does not forbid; where that does not end inside,
        in a singular posture for example, the last point inside on the line from the set point ``inside``. Joint bounds are kept.
        """
        margin = self.config.margin
        lowest, highest = self.lower + margin, self.upper - margin
        points = self.kinematics.points(q)
        wanted = np.clip(points, lowest, highest)
        if np.abs(wanted - points).max() <= _EXACT:
            return None
        moved, bad = q, np.zeros(len(points), bool)
        for _ in range(_ITERATIONS):
            outside = ~(np.abs(np.clip(points, lowest, highest) - points).max(1) <= _EXACT)
            wanted[outside & ~bad] = np.clip(points, lowest, highest)[outside & ~bad]
            bad |= outside  # these come to the border; the others are free to give way
            jacobian = self.kinematics.jacobians()[bad].reshape(-1, len(q))
            error = (wanted - points)[bad].ravel()
            weights = np.linalg.solve(jacobian @ jacobian.T + _DAMPING * np.eye(len(jacobian)), error)
            moved = np.clip(moved + jacobian.T @ weights, lower, upper)
            points = self.kinematics.points(moved)
            if (
                np.abs(wanted - points)[bad].max() <= _EXACT
                and (np.abs(np.clip(points, lowest, highest) - points) <= _EXACT).all()
            ):
                return moved
        return self._last_inside(inside, q)

    def _last_inside(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        near, far = 0.0, 1.0
        for _ in range(10):
            middle = (near + far) / 2
            points = self.kinematics.points(start + middle * (end - start))
            if (points >= self._low).all() and (points <= self._high).all():
                near = middle
            else:
                far = middle
        return start + near * (end - start)

    def admits(self, start: np.ndarray, travel: np.ndarray, duration: float, at: Callable[[float], np.ndarray]) -> bool:
        """Whether a stop stays in the box: its start exactly, the rest at points 20 ms apart.

        Between two of them a point strays from the chord by at most ``a h^2 / 8``, ``a`` its acceleration: 0.5 mm at 10 m/s^2.
        """
        points = self.kinematics.points(start)
        room = np.minimum(points - self._low, self._high - points)
        if not room.min() >= -_EXACT:
            return False
        levers = self.kinematics.levers
        if levers is not None and (levers @ travel < room.min(1)).all():
            return True
        count = int(duration / _INTERVAL) + 1
        for k in range(1, count + 1):
            points = self.kinematics.points(at(duration * k / count))
            if not ((points >= self._low - _EXACT).all() and (points <= self._high + _EXACT).all()):
                return False
        return True
