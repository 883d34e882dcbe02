"""From the policy's rate to the control rate: cubic for positions, along the rotation group for orientations, steps for grippers.

A segment begins where the last output was, with its velocity, and ends in a row with the slope of the rows around it (Catmull and
Rom). A new row, or a new chunk, begins a new segment: the output is continuous and so is its velocity, whatever the plans do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pydantic
from scipy.spatial.transform import Rotation

from robopolicy.config import Config
from robopolicy.features import Feature

if TYPE_CHECKING:  # torch stays out of control
    from robopolicy.data.actions import ActionConfig
    from robopolicy.deploy.manifest import Manifest

_SHORTEST = 0.25  # of a row: what is due sooner is passed over for the row after it


class RotationColumns(Config):
    """A rotation within the action: where it starts, and how it is written."""

    start: int = pydantic.Field(ge=0)
    representation: Literal["rot6d", "quat_xyzw", "rotvec"]


class InterpolationConfig(Config):
    """How the columns of an action are filled in between rows.

    Attributes:
        steps: Columns that change at once when their row is due: grippers and other discrete ones.
        rotations: Rotations; all other columns are positions.
        ahead: 0: a row's position is reached at the end of its period, as simulated tasks do it, and as actions that are targets
            of the next step mean it. 1: it is reached when the row is due.
    """

    steps: tuple[int, ...] = ()
    rotations: tuple[RotationColumns, ...] = ()
    ahead: int = pydantic.Field(default=0, ge=0, le=1)

    @classmethod
    def of_policy(cls, action: Feature, policy: object, **changes: Any) -> Self:
        """What the names of a robot's action and the poses in its policy's say: of a checkpoint, or of an export alike."""
        manifest: Manifest | None = getattr(policy, "manifest", None)  # of an export
        transform: ActionConfig | None = getattr(getattr(policy, "config", None), "action", None)
        return cls.of(action, transform if manifest is None else manifest, **changes)

    @classmethod
    def of(cls, action: Feature, config: ActionConfig | Manifest | None = None, **changes: Any) -> Self:
        """What the names and poses of an action say: entries with ``gripper`` in their name are steps."""
        steps = tuple(i for i, name in enumerate(action.names) if "gripper" in name)
        poses = () if config is None else config.poses
        rotations = tuple(RotationColumns(start=pose.start + 3, representation=pose.rotation) for pose in poses)
        return cls(**{"steps": steps, "rotations": rotations, **changes})


class Interpolator:
    """The action between rows. One per episode: :meth:`reset` begins another."""

    def __init__(self, config: InterpolationConfig, size: int) -> None:
        self.config = config
        taken = {i for r in config.rotations for i in range(r.start, r.start + _SIZES[r.representation])} | set(config.steps)
        self._vector = np.array([i for i in range(size) if i not in taken], int)
        self._steps = np.array(config.steps, int)
        self.reset()

    def reset(self) -> None:
        self._segment: tuple[float, int] | None = None  # row and chunk that it leads to
        self._value: np.ndarray | None = None
        self._rate: np.ndarray = np.zeros(len(self._vector))
        self._spins: list[np.ndarray] = [
            np.zeros(3) for _ in self.config.rotations
        ]  # angular velocities, in the frame of the body

    def __call__(self, now: float, rows: np.ndarray, first: float, dt: float, chunk: int) -> np.ndarray:
        """The action ``[A]`` at ``now``.

        Args:
            now: Clock time; does not fall.
            rows: Planned actions ``[n, A]``: the row that is due now and up to two after it.
            first: When the first of them was due [s].
            dt: From one row to the next [s].
            chunk: Which chunk they are from.
        """
        if self._value is None:
            self._value = rows[0].astype(np.float64)
        elif self._segment is not None:
            self._value = self._at(now, beyond=dt / 2)  # a row begins at the first tick after it is due
        self._value[self._steps] = rows[0, self._steps]
        if self._segment != (first, chunk):
            self._begin(now, rows, first, dt)
            self._segment = (first, chunk)
        return self._value.copy()

    def hold(self, now: float) -> np.ndarray | None:
        """The action ``[A]`` while nothing is planned: to the end of what was, and no further. None before the first."""
        if self._value is not None and self._segment is not None:
            self._value = self._at(now, beyond=0.0)
        return None if self._value is None else self._value.copy()

    def _begin(self, now: float, rows: np.ndarray, first: float, dt: float) -> None:
        goal, end = min(self.config.ahead, len(rows) - 1), first + dt
        if end - now < _SHORTEST * dt and goal + 1 < len(rows):
            goal, end = goal + 1, end + dt
        length = max(end - now, _SHORTEST * dt)
        value = self._value
        assert value is not None
        behind, last = rows[goal - 1] if goal > 0 else value, goal + 1 >= len(rows)
        span = 2 * dt if goal > 0 else length + dt  # from what is behind to the row after the goal
        self._begun, self._length = now, length
        start, stop = value[self._vector], rows[goal, self._vector].astype(np.float64)
        # Nothing is planned behind the last row: it is approached to stand there.
        slope: np.ndarray = np.zeros_like(stop) if last else (rows[goal + 1, self._vector] - behind[self._vector]) / span
        self._cubic = _hermite(start, self._rate, stop, slope, length)
        self._turns = []
        for columns, spin in zip(self.config.rotations, self._spins, strict=True):
            here, there = _read(value, columns), _read(rows[goal], columns)
            way = (here.inv() * there).as_rotvec()
            after: np.ndarray = np.zeros(3)
            if not last:
                after = (_read(behind, columns).inv() * _read(rows[goal + 1], columns)).as_rotvec() / span
            self._turns.append((here, _hermite(np.zeros(3), spin, way, after, length)))

    def _at(self, now: float, beyond: float) -> np.ndarray:
        """The action at ``now``; behind the end of the segment straight on for at most ``beyond`` seconds, and then still."""
        assert self._value is not None
        value = self._value.copy()
        x = min(now - self._begun, self._length)
        over = now - self._begun - x
        done, over = over > beyond, min(over, beyond)
        place, rate = _cubic(self._cubic, x)
        value[self._vector] = place + over * rate
        self._rate = np.zeros_like(rate) if done else rate
        for i, (columns, (start, cubic)) in enumerate(zip(self.config.rotations, self._turns, strict=True)):
            turned = start * Rotation.from_rotvec(_cubic(cubic, x)[0])
            step = 1e-4 * self._length
            back = start * Rotation.from_rotvec(_cubic(cubic, x - step)[0])
            spin = (back.inv() * turned).as_rotvec() / step  # the rate of the rotation vector is not that of the rotation
            self._spins[i] = np.zeros(3) if done else spin
            _write(value, columns, turned * Rotation.from_rotvec(over * spin))
        return value


def _cubic(coefficients: tuple[np.ndarray, ...], x: float) -> tuple[np.ndarray, np.ndarray]:
    """Value and slope."""
    c0, c1, c2, c3 = coefficients
    return c0 + x * (c1 + x * (c2 + x * c3)), c1 + x * (2 * c2 + 3 * x * c3)


def _hermite(p0: np.ndarray, v0: np.ndarray, p1: np.ndarray, v1: np.ndarray, length: float) -> tuple[np.ndarray, ...]:
    """Coefficients of the cubic from ``p0`` to ``p1`` in ``length`` seconds with these velocities at its ends."""
    mean = (p1 - p0) / length
    return p0, v0, (3 * mean - 2 * v0 - v1) / length, (v0 + v1 - 2 * mean) / length**2


_SIZES = {"rot6d": 6, "quat_xyzw": 4, "rotvec": 3}


def _read(action: Sequence[float] | np.ndarray, columns: RotationColumns) -> Rotation:
    value = np.asarray(action, np.float64)[columns.start : columns.start + _SIZES[columns.representation]]
    if columns.representation == "quat_xyzw":
        return Rotation.from_quat(value)
    if columns.representation == "rotvec":
        return Rotation.from_rotvec(value)
    first = value[:3] / np.linalg.norm(value[:3])
    second = value[3:] - (first @ value[3:]) * first
    second /= np.linalg.norm(second)
    return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=1))


def _write(action: np.ndarray, columns: RotationColumns, rotation: Rotation) -> None:
    if columns.representation == "quat_xyzw":
        value = rotation.as_quat(canonical=True)
    elif columns.representation == "rotvec":
        value = rotation.as_rotvec()
    else:
        value = rotation.as_matrix()[:, :2].T.ravel()
    action[columns.start : columns.start + len(value)] = value
