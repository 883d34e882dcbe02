"""Fields: anything that sees a clean chunk and a noise in a noisy chunk. A network is one; expressions of networks are others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from robopolicy.errors import ConfigError
from robopolicy.generative.path import Kind, Path, Pred, broadcast_time


class Denoiser(Protocol):
    """A network: ``(x [B, H, A], time [B] or [B, H], ctx [B, C]) -> [B, H, A]``; :meth:`Path.net_input` makes its inputs."""

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Tensor: ...


class Field(Protocol):
    """``(x [B, H, A], t [B] or [B, H], ctx) -> Pred``: the state is on the path that the field belongs to."""

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred: ...


class Leaf:
    """A network as a field.

    Args:
        net: The network.
        path: The path on which it was trained.
        kind: What it predicts.
    """

    def __init__(self, net: Denoiser, path: Path, kind: Kind) -> None:
        self.net = net
        self.path = path
        self.kind: Kind = kind

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        x_in, t_in = self.path.net_input(x, t)
        y = self.net(x_in, t_in, ctx)
        return self.path.predict(x, t, y.to(x.dtype), self.kind)


class Convex:
    """Weighted mean of what several fields see in the same state, on the same path (GPC, arXiv 2510.01068, convex form).

    Fields of weight 0 are not evaluated, so weights (1, 0) give the first field to the bit.

    Args:
        fields: Fields on one path.
        weights: Non-negative numbers that sum to 1, one per field.

    Raises:
        ConfigError: The weights are no such numbers.
    """

    def __init__(self, fields: Sequence[Field], weights: Sequence[float]) -> None:
        if len(fields) != len(weights) or any(weight < 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
            raise ConfigError(f"weights {list(weights)} for {len(fields)} fields; give one each, none negative, with sum 1")
        self.terms = [(weight, field) for weight, field in zip(weights, fields, strict=True) if weight > 0]

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        if len(self.terms) == 1:
            return self.terms[0][1](x, t, ctx)
        seen = [(weight, field(x, t, ctx)) for weight, field in self.terms]
        x0 = torch.stack([weight * pred.x0 for weight, pred in seen]).sum(0)
        return Pred(x0, torch.stack([weight * pred.eps for weight, pred in seen]).sum(0))


class Switched:
    """One field for late times (``t <= boundary``), another for early ones: fine-tuning may leave the first steps as they were.

    Args:
        late: Asked at ``t <= boundary``.
        early: Asked above.
        boundary: A time of the sampler's grid; times within 1e-6 of it count as equal.
    """

    def __init__(self, late: Field, early: Field, boundary: float) -> None:
        self.late, self.early, self.boundary = late, early, boundary

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        is_early = t > self.boundary + 1e-6
        if not is_early.any():
            return self.late(x, t, ctx)
        if is_early.all():
            return self.early(x, t, ctx)
        late, early, pick = self.late(x, t, ctx), self.early(x, t, ctx), broadcast_time(is_early, x).bool()
        return Pred(torch.where(pick, early.x0, late.x0), torch.where(pick, early.eps, late.eps))
