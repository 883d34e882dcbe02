"""The parts of a policy as modules of tensors in, tensors out: what :mod:`robopolicy.deploy.export` turns into graphs.

Graphs have a fixed batch and are made by tracing. With every shape fixed, the arithmetic on times of a fused graph consists of
constants, which the runtimes fold away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robopolicy.deploy.manifest import Backend, observed
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Field, Switched
from robopolicy.generative.sampler import Jump
from robopolicy.nets import unet1d
from robopolicy.policy import Policy

M = TypeVar("M", bound=nn.Module)


class Part(nn.Module):
    """A part of the policy with named inputs and outputs; called with tensors in the order of ``inputs``."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy


class Encode(Part):
    """Observations ``[B, n_obs_steps, *shape]`` in their units to the context ``[B, C]``."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.names = tuple(policy.observation_features)
        self.inputs, self.outputs = tuple(map(observed, self.names)), ("ctx",)

    def forward(self, *obs: Tensor) -> Tensor:
        return self.policy.encode(dict(zip(self.names, obs, strict=True)))


class See(Part):
    """``x [B, H, D], t [B], ctx [B, C]`` (and ``to [B]`` where steps are jumps) to ``x0`` and ``eps``, each ``[B, H, D]``."""

    outputs = ("x0", "eps")

    def __init__(self, policy: Policy, field: Field) -> None:
        super().__init__(policy)
        self.field = field
        self.inputs = ("x", "t", "ctx", *(("to",) if jumps(policy) else ()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        pred = self.field(*inputs)
        return pred.x0, pred.eps


class Decode(Part):
    """A normalised chunk ``[B, H, D]``, and the observations that actions are relative to, to actions ``[B, rows, A]``."""

    outputs = ("actions",)

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.names = references(policy)
        self.inputs = ("chunk", *map(observed, self.names))

    def forward(self, chunk: Tensor, *obs: Tensor) -> Tensor:
        known = dict(zip(self.names, obs, strict=True))
        # References are all that is read of the observations; the others are only asked for their newest row.
        filler = {n: chunk.new_zeros(1, 1) for n in self.policy.observation_features if n not in known}
        return self.policy.actions(chunk, {**filler, **known})[:, self.policy.n_obs_steps - 1 :]


class Whole(Part):
    """Noise ``[B, H, D]`` and observations to actions ``[B, rows, A]``, every step of the sampler unrolled."""

    outputs = ("actions",)

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.names = tuple(policy.observation_features)
        self.inputs = ("noise", *map(observed, self.names))

    def forward(self, noise: Tensor, *obs: Tensor) -> Tensor:
        policy, named = self.policy, dict(zip(self.names, obs, strict=True))
        chunk = policy.walk(policy.start(noise), policy.encode(named)).x0
        return policy.actions(chunk, named)[:, policy.n_obs_steps - 1 :]


def jumps(policy: Policy) -> bool:
    """Whether the field is told where each step goes."""
    return policy.config.target_time and isinstance(policy.sampler, Jump)


def references(policy: Policy) -> tuple[str, ...]:
    """Observations that actions are relative to, in the order in which they are declared."""
    config = policy.config.action
    if config.type == "absolute":
        return ()
    named = {*config.reference, *(name for pose in config.poses for name in pose.reference)}
    return tuple(name for name in policy.observation_features if name in named)


def fields(policy: Policy) -> Mapping[str, Field]:
    """The field as graphs can hold it: a network that takes over above some time is a graph of its own."""
    leaf = policy.leaf
    if isinstance(leaf, Switched):
        return {"field": leaf.late, "field_early": leaf.early}
    return {"field": cast("Field", policy.field)}


def exportable(policy: Policy, backend: Backend) -> Policy:
    """A copy on the CPU whose layers are written in operators that the runtime has.

    Raises:
        ConfigError: A part cannot be written as a graph.
    """
    copied = copy.deepcopy(policy).cpu().eval().requires_grad_(False)
    if backend == "openvino":
        _replace(copied, nn.Mish, lambda _: _Mish())
    _replace(copied, unet1d._ConvBlock, _ConvBlock)
    _replace(copied, unet1d.Conv, _Conv)
    nested = [m for m in copied.modules() if isinstance(m, Policy) and m is not copied]
    if any(part.config.frozen_above is not None for part in nested):
        raise ConfigError(
            "a part of this composition switches networks within the walk (frozen_above), which one graph cannot; "
            "distil the composition and export the student"
        )
    return copied


def _replace(root: nn.Module, kind: type[M], by: Callable[[M], nn.Module]) -> None:
    """Replace every module of this kind below ``root``."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, by(child))


class _Conv(nn.Module):
    """:class:`robopolicy.nets.unet1d.Conv` as the runtimes' own convolution: they lay out its weights once, when they load it."""

    def __init__(self, conv: unet1d.Conv) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.columns(x.transpose(1, 2)).transpose(1, 2)

    def columns(self, x: Tensor) -> Tensor:
        """The same on ``[B, C, L]``."""
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding)


class _ConvBlock(nn.Module):
    """:class:`robopolicy.nets.unet1d._ConvBlock` on ``[B, C, L]`` within: as the runtimes have convolution and normalisation."""

    def __init__(self, block: unet1d._ConvBlock) -> None:
        super().__init__()
        self.conv, self.norm, self.act = _Conv(block.conv), block.norm, block.act

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        h = F.group_norm(self.conv.columns(x.transpose(1, 2)), norm.num_groups, norm.weight, norm.bias, norm.eps)
        out: Tensor = self.act(h.transpose(1, 2))
        return out


class _Mish(nn.Module):
    """Mish, ``x tanh(softplus(x))``, as a quotient: OpenVINO 2026.4 refuses its own on processors with AMX, and recognises it."""

    def forward(self, x: Tensor) -> Tensor:
        e = torch.exp(x.clamp(max=20))  # beyond, the quotient is 1 in float32
        n = e * (e + 2)
        return x * (n / (n + 2))
