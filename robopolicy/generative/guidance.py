"""Guidance: fields that are pushed. By another field (classifier-free), or by the gradient of a cost of the clean chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Field
from robopolicy.generative.path import Path, Pred, broadcast_time

_MAX_GAIN = 10.0  # of a gradient through the network: near t = 1 errors of its Jacobian would be multiplied by 1 / alpha


class Guidance:
    """``uncond + scale (cond - uncond)``, classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    ``scale`` 1 is ``cond`` to the bit and 0 ``uncond`` to the bit, each without asking the other. Above 1 the variance shrinks
    and actions leave the range of the data: let the sampler clip, which it does after this.

    Args:
        cond, uncond: Fields on one path: a policy that heard the condition, and one (or the same) that did not.
        scale: How far to go from the one to the other.
    """

    def __init__(self, cond: Field, uncond: Field, scale: float) -> None:
        self.cond, self.uncond, self.scale = cond, uncond, scale

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        if self.scale in (0, 1):
            return (self.cond if self.scale else self.uncond)(x, t, ctx)
        cond, uncond = self.cond(x, t, ctx), self.uncond(x, t, ctx)
        return Pred(
            uncond.x0 + self.scale * (cond.x0 - uncond.x0),
            uncond.eps + self.scale * (cond.eps - uncond.eps),
        )


class Guided:
    """A field pushed down the gradient of a cost of the clean chunk that it sees: samples of about ``p(x) exp(-scale cost(x))``.

    The score becomes ``score - scale g`` with ``g = d cost(x0(x)) / dx``, hence ``eps += sigma scale g`` and
    ``x0 -= sigma^2 / alpha scale g``. It fades by itself where the noise does.

    Args:
        field: The field to push.
        cost: ``x0 [B, H, A]`` (normalised) to costs ``[B]``, differentiable.
        scale: Strength.
        path: Path of the field.
        jacobian: ``true`` differentiates through the field; ``identity`` takes the Jacobian of unit Gaussian data instead,
            ``alpha / (alpha^2 + sigma^2)``, which needs no backward pass and leaves every entry to itself.
        max_shift: Largest root mean square over a chunk by which ``x0`` is moved in one call; without it the strength would
            depend on the units of the cost.

    Raises:
        ConfigError: ``max_shift`` is not positive; or, when asked, ``field`` cannot be differentiated.
    """

    def __init__(
        self,
        field: Field,
        cost: Callable[[Tensor], Tensor],
        scale: float,
        path: Path,
        jacobian: Literal["true", "identity"] = "true",
        max_shift: float = 0.5,
    ) -> None:
        if max_shift <= 0:
            raise ConfigError(f"guidance: max_shift {max_shift} must be positive; it is a distance in normalised units")
        self.field, self.cost, self.scale, self.path = field, cost, scale, path
        self.jacobian, self.max_shift = jacobian, max_shift

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        alpha, sigma = (broadcast_time(value, x) for value in self.path.coefficients(t))
        with torch.inference_mode(False), torch.enable_grad():  # evaluation runs without gradients
            x, t, ctx = x.detach().clone(), t.clone(), ctx.clone()  # made in inference mode they take no gradient, copies do
            if self.jacobian == "true":
                state = x.requires_grad_()
                pred = self.field(state, t, ctx)
                if not pred.x0.requires_grad:
                    raise ConfigError(
                        "a cost guides through the gradient of what is seen, and here that is guided through a gradient already "
                        "(planner rtc); use planner plain, rti, bid or rtc with jacobian identity"
                    )
                (gradient,) = torch.autograd.grad(self.cost(pred.x0).sum(), state)
                gain = (sigma**2 / alpha.clamp_min(1e-12)).clamp_max(_MAX_GAIN)
            else:
                pred = self.field(x, t, ctx)
                x0 = pred.x0.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.cost(x0).sum(), x0)
                gain = sigma**2 / (alpha**2 + sigma**2)
        shift = -self.scale * gain * gradient
        size = shift.square().mean((1, 2), keepdim=True).sqrt()
        shift = shift * (self.max_shift / size.clamp_min(1e-12)).clamp_max(1.0)
        x0 = pred.x0.detach() + shift
        return Pred(x0, pred.eps.detach() - alpha / sigma.clamp_min(1e-12) * shift)  # the pair still explains x
