"""Fields: anything that sees a clean chunk and a noise in a noisy chunk. A network is one; expressions of networks are others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from robopolicy.errors import ConfigError
from robopolicy.generative.path import Kind, Path, Pred, broadcast_time


class Denoiser(Protocol):
    """A network: ``(x [B, H, A], time [B] or [B, H], ctx [B, C]) -> [B, H, A]``; :meth:`Path.net_input` makes its inputs."""

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Tensor: ...


class Field(Protocol):
    """``(x [B, H, A], t [B] or [B, H], ctx) -> Pred``: the state is on the path that the field belongs to."""

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred: ...


Weights = Sequence[float] | Tensor  # one per field, or [fields, H]


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


class OnPath:
    """A field of one path, asked for states of another (the same noise level is the same ``sigma / alpha``).

    The state is scaled to the other path and the time is the one at which that path is as noisy; the pair ``(x0, eps)`` needs no
    conversion. Where the other path never gets as noisy (or as clean), its noisiest (cleanest) time stands in.

    Args:
        field: A field on ``own``.
        own: The path that it belongs to.
        on: The path of the states that it will be asked for.
    """

    def __init__(self, field: Field, own: Path, on: Path) -> None:
        self.field, self.own, self.on = field, own, on

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        alpha, sigma = self.on.coefficients(t)
        own_t = self.own.t_of(sigma / alpha)
        own_alpha, own_sigma = self.own.coefficients(own_t)
        return self.field(x * broadcast_time((own_alpha + own_sigma) / (alpha + sigma), x), own_t, ctx)


class OnRows:
    """A field that knows some rows of a longer chunk, and one part of a longer context. Of the other rows it says 0.

    Args:
        field: The field.
        ctx: Its part of the context.
        rows: Its rows of the chunk.
    """

    def __init__(self, field: Field, ctx: slice, rows: slice) -> None:
        self.field, self.ctx, self.rows = field, ctx, rows

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        inner, horizon = x[:, self.rows], x.shape[1]
        pred = self.field(inner, t if t.ndim == 1 else t[:, self.rows], ctx[:, self.ctx])
        if inner.shape[1] == horizon:
            return pred
        around = (0, 0, self.rows.start, horizon - self.rows.stop)
        return Pred(F.pad(pred.x0, around), F.pad(pred.eps, around))


class Convex:
    """Weighted mean of what several fields see in the same state, on the same path (GPC, arXiv 2510.01068, convex form).

    Fields of weight 0 are not evaluated, so weights (1, 0) give the first field to the bit.

    Args:
        fields: Fields on one path.
        weights: Non-negative numbers that sum to 1, one per field; or one for each field and row of the chunk, ``[fields, H]``.

    Raises:
        ConfigError: The weights are no such numbers.
    """

    def __init__(self, fields: Sequence[Field], weights: Weights) -> None:
        rows = _weights(fields, weights)
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(0), torch.ones(1, dtype=rows.dtype), rtol=0, atol=1e-6):
            raise ConfigError(f"weights {_said(weights)} for {len(fields)} fields; give one each, none negative, with sum 1")
        self.terms = [(weight, field) for weight, field in zip(rows, fields, strict=True) if bool((weight > 0).any())]

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        if len(self.terms) == 1:
            return self.terms[0][1](x, t, ctx)
        return _weighted([(_like(weight, x), field(x, t, ctx)) for weight, field in self.terms])


class Product:
    """Product of experts ``p_1^w_1 p_2^w_2 ... / p^(W - 1)`` with ``W = sum w`` and a prior ``p = N(0, prior_std^2)``.

    The score is the weighted sum of the scores, less that of the prior ``W - 1`` times: every expert knows the prior already, and
    it shall count once. For experts who see independent things, with weights 1, this is Bayes' rule. Like every sum of scores of
    noisy densities it is not the score of the noisy product; only without noise is it.

    Args:
        fields: Fields on one path.
        weights: None negative, sum not 0: one per field, or one for each field and row, ``[fields, H]``.
        path: Their path.
        prior_std: In normalised units. None: no prior. Walks then need a bounded ``x0`` (``sampler.clip``): early on, where all
            experts say hardly more than the prior, the bare product is much too sure.

    Raises:
        ConfigError: The weights are no such numbers.
    """

    def __init__(self, fields: Sequence[Field], weights: Weights, path: Path, prior_std: float | None = 1.0) -> None:
        rows = _weights(fields, weights)
        if bool((rows < 0).any()) or bool((rows.sum(0) <= 0).any()):
            raise ConfigError(f"weights {_said(weights)} for {len(fields)} fields; give one each, none negative, not all 0")
        self.path, self.prior_std, self.excess = path, prior_std, rows.sum(0) - 1
        self.terms = [(weight, field) for weight, field in zip(rows, fields, strict=True) if bool((weight > 0).any())]

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        seen = _weighted([(_like(weight, x), field(x, t, ctx)) for weight, field in self.terms])
        alpha, sigma = self.path.coefficients(t)
        if self.prior_std is None:
            prior = Pred(x / broadcast_time(alpha.clamp_min(1e-12), x), torch.zeros_like(x))
        else:
            scale = 1 / (alpha**2 * self.prior_std**2 + sigma**2)
            prior = Pred(x * broadcast_time(alpha * self.prior_std**2 * scale, x), x * broadcast_time(sigma * scale, x))
        excess = _like(self.excess, x)
        return Pred(seen.x0 - excess * prior.x0, seen.eps - excess * prior.eps)


def _weights(fields: Sequence[Field], weights: Weights) -> Tensor:
    """``[fields, H]``, or ``[fields, 1]`` for weights that are the same in all rows, float64."""
    value = torch.as_tensor(weights, dtype=torch.float64)
    value = value[:, None] if value.ndim == 1 else value
    if not fields or value.ndim != 2 or len(value) != len(fields) or not bool(torch.isfinite(value).all()):
        raise ConfigError(f"weights {_said(weights)} for {len(fields)} fields; give one finite number each")
    return value


def _said(weights: Weights) -> list[float]:
    return weights.tolist() if isinstance(weights, Tensor) else list(weights)


def _like(weight: Tensor, x: Tensor) -> Tensor:
    """A weight per row ``[H]`` or ``[1]``, for arithmetic with ``x [B, H, A]``."""
    return weight.to(x.device, x.dtype)[:, None]


def _weighted(seen: Sequence[tuple[Tensor, Pred]]) -> Pred:
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
