"""Rotations and rigid transforms in torch: batched, float32 or float64, differentiable.

Conventions: a matrix ``R [..., 3, 3]`` maps body coordinates to the parent frame (columns are the body axes); quaternions are
``[x, y, z, w]`` with unit norm; a rotation vector is axis times angle [rad]; ``rot6d [..., 6]`` is the first two COLUMNS of
``R``, one after the other (Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", 2019).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from robopolicy.errors import DataError, nearest

Representation = Literal["rot6d", "quat_xyzw", "rotvec"]
SIZES: dict[str, int] = {"rot6d": 6, "quat_xyzw": 4, "rotvec": 3}


def quat_from_rotvec(rotvec: Tensor) -> Tensor:
    """Unit quaternion ``[..., 4]`` (xyzw, w >= 0 for angles up to pi) of ``rotvec [..., 3]`` [rad]."""
    squared = (rotvec * rotvec).sum(-1, keepdim=True)
    # sin(a/2)/a by its series near zero, where the quotient is 0/0 and its gradient infinite.
    small = squared < 1e-6
    angle = torch.where(small, torch.ones_like(squared), squared).sqrt()
    factor = torch.where(small, 0.5 - squared / 48 + squared**2 / 3840, torch.sin(angle / 2) / angle)
    w = torch.where(small, 1 - squared / 8 + squared**2 / 384, torch.cos(angle / 2))
    return torch.cat([rotvec * factor, w], dim=-1)


def rotvec_from_quat(quat: Tensor) -> Tensor:
    """Rotation vector ``[..., 3]`` [rad] of length at most pi, of ``quat [..., 4]`` (xyzw, normalised here)."""
    quat = normalize_quat(quat)
    quat = torch.where(quat[..., 3:] < 0, -quat, quat)
    vector, w = quat[..., :3], quat[..., 3:]
    squared = (vector * vector).sum(-1, keepdim=True)
    small = squared < 1e-6
    sine = torch.where(small, torch.ones_like(squared), squared).sqrt()
    # angle / sin(angle/2): series of 2 asin(s)/s near zero; atan2 is accurate everywhere else, near pi too.
    factor = torch.where(small, 2 + squared / 3 + 3 * squared**2 / 20, 2 * torch.atan2(sine, w) / sine)
    return vector * factor


def normalize_quat(quat: Tensor) -> Tensor:
    """``quat [..., 4]`` divided by its norm; a zero quaternion, which means nothing, gives NaN."""
    return quat / quat.norm(dim=-1, keepdim=True)


def matrix_from_quat(quat: Tensor) -> Tensor:
    """Rotation matrix ``[..., 3, 3]`` of ``quat [..., 4]`` (xyzw, normalised here)."""
    x, y, z, w = normalize_quat(quat).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def quat_from_matrix(matrix: Tensor) -> Tensor:
    """Unit quaternion ``[..., 4]`` (xyzw, w >= 0) of a rotation matrix ``[..., 3, 3]``.

    Of the four algebraically equal solutions the one with the largest pivot is taken, so no precision is lost near pi
    (Shepperd 1978).
    """
    m = matrix
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    # Row k is 4 q_k q for each of x, y, z, w.
    candidates = torch.stack(
        [
            torch.stack(
                [1 + xx - yy - zz, m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] - m[..., 1, 2]], -1
            ),
            torch.stack(
                [m[..., 0, 1] + m[..., 1, 0], 1 - xx + yy - zz, m[..., 1, 2] + m[..., 2, 1], m[..., 0, 2] - m[..., 2, 0]], -1
            ),
            torch.stack(
                [m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1], 1 - xx - yy + zz, m[..., 1, 0] - m[..., 0, 1]], -1
            ),
            torch.stack(
                [m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1], 1 + xx + yy + zz], -1
            ),
        ],
        dim=-2,
    )
    pivot = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    chosen = torch.gather(candidates, -2, pivot[..., None, None].expand(*pivot.shape, 1, 4)).squeeze(-2)
    quat = normalize_quat(chosen)
    return torch.where(quat[..., 3:] < 0, -quat, quat)


def rot6d_from_matrix(matrix: Tensor) -> Tensor:
    """First two columns ``[..., 6]`` of ``matrix [..., 3, 3]``."""
    return torch.cat([matrix[..., :, 0], matrix[..., :, 1]], dim=-1)


def matrix_from_rot6d(rot6d: Tensor) -> Tensor:
    """Rotation matrix ``[..., 3, 3]`` nearest in the sense of Gram and Schmidt to ``rot6d [..., 6]``, as networks put out."""
    first = torch.nn.functional.normalize(rot6d[..., :3], dim=-1)
    second = rot6d[..., 3:] - (first * rot6d[..., 3:]).sum(-1, keepdim=True) * first
    second = torch.nn.functional.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)


def matrix_from_rotvec(rotvec: Tensor) -> Tensor:
    return matrix_from_quat(quat_from_rotvec(rotvec))


def rotvec_from_matrix(matrix: Tensor) -> Tensor:
    return rotvec_from_quat(quat_from_matrix(matrix))


def to_matrix(rotation: Tensor, representation: Representation) -> Tensor:
    """Rotation matrix ``[..., 3, 3]`` from one of :data:`SIZES`. Raises DataError for another representation."""
    _check(representation)
    if representation == "rot6d":
        return matrix_from_rot6d(rotation)
    return matrix_from_quat(rotation) if representation == "quat_xyzw" else matrix_from_rotvec(rotation)


def from_matrix(matrix: Tensor, representation: Representation) -> Tensor:
    """One of :data:`SIZES` from a rotation matrix ``[..., 3, 3]``. Raises DataError for another representation."""
    _check(representation)
    if representation == "rot6d":
        return rot6d_from_matrix(matrix)
    return quat_from_matrix(matrix) if representation == "quat_xyzw" else rotvec_from_matrix(matrix)


def _check(representation: str) -> None:
    if representation not in SIZES:
        raise DataError(
            f"rotation representation '{representation}' is unknown; {nearest(representation, get_args(Representation))}"
        )


class SE3(NamedTuple):
    """A rigid transform: ``p_parent = rotation @ p_body + position``.

    Attributes:
        position: ``[..., 3]`` [m] in the parent frame.
        rotation: ``[..., 3, 3]``.
    """

    position: Tensor
    rotation: Tensor

    def inverse(self) -> SE3:
        """The transform from the parent frame to the body frame."""
        transposed = self.rotation.transpose(-1, -2)
        return SE3(-(transposed @ self.position[..., None]).squeeze(-1), transposed)

    def compose(self, other: SE3) -> SE3:
        """``self`` after ``other``: with ``self = T_ab`` and ``other = T_bc`` this is ``T_ac``."""
        position = (self.rotation @ other.position[..., None]).squeeze(-1) + self.position
        return SE3(position, self.rotation @ other.rotation)
