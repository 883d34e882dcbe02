"""Real-time chunking: a new chunk that goes on where the old one is being carried out, as fields around a policy's field.

:class:`Inpainted` pulls any policy's samples towards the old chunk by the gradient of a weighted distance (RTC, arXiv
2506.07339). :class:`Pinned` writes the rows that are settled into the state at time 0, for policies trained with
``loss.prefix`` (training-time RTC, arXiv 2512.05964). Both work on every path.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Field
from robopolicy.generative.path import Path, Pred, broadcast_time

Schedule = Literal["exponential", "linear", "ones"]


def soft_mask(rows: int, settled: Tensor, known: Tensor, schedule: Schedule = "exponential") -> Tensor:
    """How much each row shall be as it was, ``[B, rows]`` in [0, 1].

    Args:
        rows: Rows from "now" on.
        settled: Rows that will have been executed when the new chunk arrives ``[B]``: weight 1.
        known: Rows that the old chunk reaches ``[B]``: weight 0 from there on.
        schedule: Between: ``linear`` falls evenly, ``exponential`` is ``c (e^c - 1) / (e - 1)`` of that, ``ones`` does not fall.
    """
    index = torch.arange(rows, device=known.device)
    settled, known = torch.minimum(settled, known)[:, None], known[:, None]
    c = ((known - index) / (known - settled + 1)).clamp(0, 1)
    soft = c if schedule == "linear" else c * torch.expm1(c) / torch.expm1(torch.ones(()))
    soft = torch.ones_like(c) if schedule == "ones" else soft
    return torch.where(index < settled, 1.0, soft) * (index < known)


def residual_gradient(field: Field, x: Tensor, t: Tensor, ctx: Tensor, chunk: Tensor, weights: Tensor) -> tuple[Pred, Tensor]:
    """What ``field`` sees in ``x``, and ``J^T W (chunk - x0)`` with the true Jacobian ``J = d x0 / d x``, by one backward pass.

    Works inside ``torch.no_grad`` and ``torch.inference_mode``, where nothing else of it would be differentiable.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()  # a tensor made in inference mode takes no gradient, its copy does
        pred = field(leaf, t.clone(), ctx.clone())
        if not pred.x0.requires_grad:
            raise ConfigError(
                "real-time chunking guides through the gradient of what is seen, and here that is guided through a gradient "
                "already; use jacobian identity"
            )
        residual = weights * (chunk - pred.x0.detach())
        (gradient,) = torch.autograd.grad(pred.x0, leaf, residual)
    return Pred(pred.x0.detach(), pred.eps.detach()), gradient


class Inpainted:
    """A field whose samples are drawn towards a chunk: RTC's guidance in general form.

    With ``g = J^T W (chunk - x0)`` and ``r2 = sigma^2 / (alpha^2 + sigma^2)`` the score gains ``g / r2``: ``eps -= sigma g / r2``
    and ``x0 += sigma^2 / alpha g / r2``, so that the pair still explains ``x``. The factor ``sigma / (alpha r2)`` of both is
    infinite at either end and held below ``limit``; on the linear path this is the published rule to the letter.

    Args:
        field: What is drawn.
        path: Its path.
        chunk: Normalised, ``[B, H, A]``; any finite number where the weight is 0.
        weights: ``[B, H]`` in [0, 1], see :func:`soft_mask`.
        limit: beta, the largest factor; 5 as published.
        jacobian: ``true``, or ``identity``: as if ``x0`` moved with ``x``, which spares the backward pass and may leave the data.
    """

    def __init__(
        self,
        field: Field,
        path: Path,
        chunk: Tensor,
        weights: Tensor,
        limit: float = 5.0,
        jacobian: Literal["true", "identity"] = "true",
    ) -> None:
        self.field, self.path, self.chunk, self.weights = field, path, chunk, weights[:, :, None]
        self.limit, self.jacobian = limit, jacobian

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /, to: Tensor | None = None) -> Pred:
        if not self.weights.any():
            return self.field(x, t, ctx) if to is None else _onward(self.field, to)(x, t, ctx)
        field = self.field if to is None else _onward(self.field, to)
        alpha, sigma = (broadcast_time(value, x) for value in self.path.coefficients(t))
        if self.jacobian == "true":
            seen, gradient = residual_gradient(field, x, t, ctx, self.chunk, self.weights)
        else:
            seen = field(x, t, ctx)
            # On the linear path d x0 / d x = 1; another path's state is that one scaled by alpha + sigma.
            gradient = self.weights * (self.chunk - seen.x0) / (alpha + sigma)
        factor = _factor(alpha, sigma, self.limit)
        return Pred(seen.x0 + sigma * factor * gradient, seen.eps - alpha * factor * gradient)


def identity_pull(path: Path, t: float, limit: float) -> float:
    """How far the identity Jacobian moves a row of weight 1 at ``t``, as a share of its way to the chunk: above 1, past it."""
    alpha, sigma = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return float(sigma * _factor(alpha, sigma, limit) / (alpha + sigma))


def _factor(alpha: Tensor, sigma: Tensor, limit: float) -> Tensor:
    return ((alpha**2 + sigma**2) / (alpha * sigma).clamp_min(1e-12)).clamp_max(limit)


class Pinned:
    """A field that is shown some rows of a chunk clean, at time 0, and answers with them there.

    The sampler walks all rows at one time; rows that are pinned end where they were told whatever it does.

    Args:
        field: A field that was trained with ``loss.prefix``.
        path: Its path.
        chunk: Normalised, ``[B, H, A]``.
        pinned: Which rows, bool ``[B, H]``.
    """

    def __init__(self, field: Field, path: Path, chunk: Tensor, pinned: Tensor) -> None:
        self.field, self.path, self.chunk, self.pinned = field, path, chunk, pinned

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /, to: Tensor | None = None) -> Pred:
        pin, rows = self.pinned[:, :, None], _as_rows(t)
        field = self.field if to is None else _onward(self.field, torch.where(self.pinned, 0.0, _as_rows(to)))
        seen = field(torch.where(pin, self.chunk, x), torch.where(self.pinned, 0.0, rows), ctx)
        alpha, sigma = (broadcast_time(value, x) for value in self.path.coefficients(t))
        noise = (x - alpha * self.chunk) / sigma.clamp_min(1e-12)
        return Pred(torch.where(pin, self.chunk, seen.x0), torch.where(pin, noise, seen.eps))


def _as_rows(t: Tensor) -> Tensor:
    return t[:, None] if t.ndim == 1 else t


def _onward(field: Field, to: Tensor) -> Field:
    """A flow map's field that is asked for the way to ``to``."""

    def ask(x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        pred: Pred = field(x, t, ctx, to)  # type: ignore[call-arg]
        return pred

    return ask
