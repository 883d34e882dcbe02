"""``ActionTransform``: how a chunk of actions is represented for the network.

``absolute`` as recorded; ``relative`` to the current reference observation; ``delta`` from one row to the next, the first row
from the reference. Poses are treated as rigid transforms, not as numbers: relative means ``T_ref^-1 T_action``, so "forward" is
the same to the network wherever the hand points, and the network always sees rotations as rot6d, which has no jumps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

import pydantic
import torch
from torch import Tensor

from robopolicy.config import Config
from robopolicy.data.rotations import SE3, SIZES, Representation, from_matrix, to_matrix
from robopolicy.errors import ConfigError, nearest
from robopolicy.features import Feature

_POSE_OUT = 9  # position 3 + rot6d 6


class PoseConfig(Config):
    """One pose inside the action vector: position (3) followed by a rotation.

    Attributes:
        start: Column of the position's first entry.
        rotation: How the action stores the rotation.
        reference: Observations that, one after the other, hold the current pose in the same frame; may be empty for ``absolute``.
        reference_rotation: How they store the rotation; default: like the action.
    """

    start: int = pydantic.Field(default=0, ge=0)
    rotation: Representation
    reference: tuple[str, ...] = ()
    reference_rotation: Representation | None = None

    @property
    def stop(self) -> int:
        return self.start + 3 + SIZES[self.rotation]


class ActionConfig(Config):
    """Action representation; without ``poses`` the action is a plain vector.

    Attributes:
        type: ``absolute``, ``relative`` (to the current reference) or ``delta`` (successive differences).
        reference: Observations that, one after the other, hold what the plain vector is relative to, entry by entry.
        columns: ``[start, stop]`` of the entries that are relative; the others pass through. Default: all.
        poses: Poses inside the vector; entries outside them pass through.
    """

    type: Literal["absolute", "relative", "delta"] = "absolute"
    reference: tuple[str, ...] = ()
    columns: tuple[int, int] | None = None
    poses: tuple[PoseConfig, ...] = ()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.poses and (self.reference or self.columns):
            raise ValueError("'poses' and 'reference'/'columns' exclude each other; give each pose its own reference")
        if self.type == "absolute" and (self.reference or self.columns):
            raise ValueError("type 'absolute' takes no reference or columns; use type 'relative' or 'delta'")
        if self.type != "absolute" and not self.poses and not self.reference:
            raise ValueError(f"type '{self.type}' needs 'reference': the observations that the action is relative to")
        if self.type != "absolute" and any(not pose.reference for pose in self.poses):
            raise ValueError(
                f"type '{self.type}' needs a 'reference' for every pose: the observations that hold the current pose"
            )
        ordered = sorted(self.poses, key=lambda pose: pose.start)
        if any(a.stop > b.start for a, b in itertools.pairwise(ordered)):
            raise ValueError("poses overlap; correct their 'start'")
        return self


class _Part(NamedTuple):
    """A run of columns of the action that is treated alike."""

    start: int
    stop: int
    kind: Literal["pose", "vector", "pass"]
    pose: PoseConfig | None = None

    @property
    def size_out(self) -> int:
        return _POSE_OUT if self.kind == "pose" else self.stop - self.start


class ActionTransform:
    """Maps chunks ``[B, H, A]`` to the network's representation ``[B, H, dim]`` and back.

    Args:
        config: The representation.
        action: The action feature, a vector.
        observations: The observation features that references are taken from.

    Raises:
        ConfigError: A reference is unknown or of the wrong size or unit, or a pose leaves the action vector.
    """

    def __init__(self, config: ActionConfig, action: Feature, observations: Mapping[str, Feature]) -> None:
        self.config = config
        self.parts = _parts(config, action)
        self.dim = sum(part.size_out for part in self.parts)
        for pose in config.poses:
            if config.type != "absolute":
                rotation = pose.reference_rotation or pose.rotation
                _check_reference(pose.reference, 3 + SIZES[rotation], f"position and {rotation}", observations)
        if config.reference:
            start, stop = config.columns or (0, action.size)
            _check_reference(config.reference, stop - start, f"columns {start}:{stop} of '{action.name}'", observations)
            _check_units(config.reference, action, observations)

    def encode(self, action: Tensor, reference: Mapping[str, Tensor]) -> Tensor:
        """Recorded actions ``[B, H, A]`` to ``[B, H, dim]``; ``reference``: the newest observations, ``name -> [B, *shape]``."""
        outputs = []
        for part in self.parts:
            value = action[..., part.start : part.stop]
            if part.kind == "vector":
                base = _concatenate(self.config.reference, reference, value)
                previous = base if self.config.type == "relative" else torch.cat([base, value[:, :-1]], dim=1)
                value = value - previous
            elif part.pose is not None:
                pose = _to_se3(value, part.pose.rotation)
                if self.config.type != "absolute":
                    base_pose = self._reference_pose(part.pose, reference, value)
                    if self.config.type == "delta":
                        base_pose = SE3(
                            torch.cat([base_pose.position, pose.position[:, :-1]], dim=1),
                            torch.cat([base_pose.rotation, pose.rotation[:, :-1]], dim=1),
                        )
                    pose = base_pose.inverse().compose(pose)
                value = _from_se3(pose, "rot6d")
            outputs.append(value)
        return torch.cat(outputs, dim=-1)

    def decode(self, encoded: Tensor, reference: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`encode`: ``[B, H, dim]`` to actions ``[B, H, A]``; rotations come out canonical (w >= 0)."""
        outputs = []
        for part, value in zip(self.parts, encoded.split([p.size_out for p in self.parts], dim=-1), strict=True):
            if part.kind == "vector":
                base = _concatenate(self.config.reference, reference, value)
                value = base + (value if self.config.type == "relative" else value.cumsum(dim=1))
            elif part.pose is not None:
                pose = _to_se3(value, "rot6d")
                if self.config.type != "absolute":
                    base_pose = self._reference_pose(part.pose, reference, value)
                    pose = base_pose.compose(pose) if self.config.type == "relative" else _chain(base_pose, pose)
                value = _from_se3(pose, part.pose.rotation)
            outputs.append(value)
        return torch.cat(outputs, dim=-1)

    def _reference_pose(self, pose: PoseConfig, reference: Mapping[str, Tensor], like: Tensor) -> SE3:
        return _to_se3(_concatenate(pose.reference, reference, like), pose.reference_rotation or pose.rotation)


def _parts(config: ActionConfig, action: Feature) -> list[_Part]:
    width = action.size
    if config.poses:
        special = [_Part(pose.start, pose.stop, "pose", pose) for pose in sorted(config.poses, key=lambda p: p.start)]
    elif config.type != "absolute":
        start, stop = config.columns or (0, width)
        special = [_Part(start, stop, "vector")]
    else:
        special = []
    parts: list[_Part] = []
    at = 0
    for part in special:
        if not 0 <= part.start < part.stop <= width:
            raise ConfigError(
                f"policy.action: columns {part.start}:{part.stop} leave the action '{action.name}', which has {width} entries; "
                "correct 'start', 'rotation' or 'columns'"
            )
        if part.start > at:
            parts.append(_Part(at, part.start, "pass"))
        parts.append(part)
        at = part.stop
    if at < width:
        parts.append(_Part(at, width, "pass"))
    return parts


def _check_reference(names: tuple[str, ...], size: int, what: str, observations: Mapping[str, Feature]) -> None:
    for name in names:
        if name not in observations:
            raise ConfigError(f"policy.action: reference '{name}' is not observed; {nearest(name, observations)}")
    found = sum(observations[name].size for name in names)
    if found != size:
        raise ConfigError(f"policy.action: reference {', '.join(names)} has {found} entries; expected {size} ({what})")


def _check_units(names: tuple[str, ...], action: Feature, observations: Mapping[str, Feature]) -> None:
    for name in names:
        unit = observations[name].unit
        if unit and action.unit and "," not in unit + action.unit and unit != action.unit:
            raise ConfigError(
                f"policy.action: action '{action.name}' is in {action.unit}, its reference '{name}' in {unit}; "
                "a difference of the two means nothing, choose another reference"
            )


def _concatenate(names: tuple[str, ...], reference: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The references as ``[B, 1, D]`` in the dtype of the action."""
    return torch.cat([reference[name].flatten(1) for name in names], dim=-1).to(like.dtype).unsqueeze(1)


def _to_se3(value: Tensor, rotation: Representation) -> SE3:
    return SE3(value[..., :3], to_matrix(value[..., 3:], rotation))


def _from_se3(pose: SE3, rotation: Representation) -> Tensor:
    return torch.cat([pose.position, from_matrix(pose.rotation, rotation)], dim=-1)


def _chain(base: SE3, steps: SE3) -> SE3:
    """Poses ``[B, H]`` reached by applying the steps ``[B, H]`` one after the other from ``base [B, 1]``."""
    poses = []
    current = SE3(base.position[:, 0], base.rotation[:, 0])
    for row in range(steps.position.shape[1]):
        current = current.compose(SE3(steps.position[:, row], steps.rotation[:, row]))
        poses.append(current)
    return SE3(torch.stack([p.position for p in poses], dim=1), torch.stack([p.rotation for p in poses], dim=1))
