"""``DHKinematics``: where the tool of a serial arm is, from its maker's Denavit-Hartenberg table. numpy only.

Both conventions are one chain of turns about z with constant transforms between them::

    standard:  T_i = Rz(q_i) [Rz(theta) Tz(d) Tx(a) Rx(alpha)]        modified:  T_i = [Rx(alpha) Tx(a)] Rz(q_i) [Rz(theta) Tz(d)]
"""

from __future__ import annotations

import math

import numpy as np

from hardware.ros2.profile import Chain
from robopolicy.errors import ConfigError


def _turn(axis: str, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    matrix = np.eye(4)
    i, j = {"x": (1, 2), "z": (0, 1)}[axis]
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def _shift(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix


class DHKinematics:
    """A chain as :class:`robopolicy.deploy.workspace.Kinematics`; the tool is the first point.

    Args:
        chain: The table.
        coordinates: Of the robot; the chain's joints are the first of them, the others, grippers, move nothing.

    Attributes:
        joints: How many coordinates it takes.

    Raises:
        ConfigError: There are fewer coordinates than joints, or a point is in a frame that does not exist.
    """

    def __init__(self, chain: Chain, coordinates: int | None = None) -> None:
        count = self.joints = len(chain.rows)
        self._n = count if coordinates is None else coordinates
        if self._n < count:
            raise ConfigError(f"kinematics has {count} rows for {self._n} coordinates; give one row a joint")
        standard = chain.convention == "standard"
        before = [np.eye(4) if standard else _turn("x", alpha) @ _shift(x=a) for a, alpha, _, _ in chain.rows]
        after = [
            _turn("z", theta) @ _shift(z=d) @ (_shift(x=a) @ _turn("x", alpha) if standard else np.eye(4))
            for a, alpha, d, theta in chain.rows
        ]
        x, y, z, yaw = chain.base
        self._first = _shift(x, y, z) @ _turn("z", yaw) @ before[0]
        # Behind each joint's turn, up to the next joint's axis; behind the last, its frame.
        self._links = np.stack([link @ following for link, following in zip(after, [*before[1:], np.eye(4)], strict=True)])
        points = {"tool": (count, *chain.tool), **chain.points}
        if bad := [name for name, (frame, *_) in points.items() if not 1 <= frame <= count]:
            raise ConfigError(f"point '{bad[0]}' is in frame {points[bad[0]][0]}; frames are 1 to {count}")
        self.names = tuple(points)
        self._joints = np.array([frame - 1 for frame, *_ in points.values()])  # the last one that moves each point
        self._locals = np.stack([after[frame - 1] @ [*xyz, 1.0] for frame, *xyz in points.values()])
        self._frames = np.zeros((count + 1, 4, 4))  # on each joint's axis before its turn, and the last
        self._turned = np.zeros((count, 4, 4))  # behind each joint's turn
        self._points = np.zeros((len(points), 3))
        self._jacobians = np.zeros((len(points), 3, self._n))
        self.levers: np.ndarray | None = self._bounds()

    def _bounds(self) -> np.ndarray:
        """From each joint's axis to each point at most, were the arm stretched: across the axis first, any way after that."""
        levers = np.zeros((len(self.names), self._n))
        across = np.hypot(self._links[:, 0, 3], self._links[:, 1, 3])
        along = np.linalg.norm(self._links[:, :3, 3], axis=1)
        for p, (last, local) in enumerate(zip(self._joints, self._locals, strict=True)):
            for i in range(last):
                levers[p, i] = across[i] + along[i + 1 : last].sum() + np.linalg.norm(local[:3])
            levers[p, last] = np.hypot(local[0], local[1])
        return levers

    def points(self, coordinates: np.ndarray) -> np.ndarray:
        """Positions ``[P, 3]`` [m] at ``coordinates [n]``, the tool's first; a view that the next call overwrites."""
        self._forward(coordinates)
        for p, (joint, local) in enumerate(zip(self._joints, self._locals, strict=True)):
            self._points[p] = (self._turned[joint] @ local)[:3]
        return self._points

    def jacobians(self) -> np.ndarray:
        """Derivatives ``[P, 3, n]`` at the last ``points``: axis times lever."""
        axes, origins = self._frames[:-1, :3, 2], self._frames[:-1, :3, 3]
        for p, joint in enumerate(self._joints):
            moved = slice(0, joint + 1)
            self._jacobians[p, :, moved] = np.cross(axes[moved], self._points[p] - origins[moved]).T
        return self._jacobians

    def pose(self, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position ``[3]`` [m] of the tool and rotation ``[3, 3]`` of the last frame; copies."""
        position = self.points(coordinates)[0].copy()
        return position, self._frames[-1, :3, :3].copy()

    def _forward(self, coordinates: np.ndarray) -> None:
        q = coordinates[: len(self._links)]
        cos, sin = np.cos(q), np.sin(q)
        frame = self._first
        for i, link in enumerate(self._links):
            self._frames[i] = frame
            turned = self._turned[i]
            turned[:] = frame
            turned[:, 0] = frame[:, 0] * cos[i] + frame[:, 1] * sin[i]
            turned[:, 1] = frame[:, 1] * cos[i] - frame[:, 0] * sin[i]
            frame = turned @ link
        self._frames[-1] = frame
