"""Shortcut: a jump is to equal two jumps of half its length; the shortest ones are flow matching.

Frans et al. 2025 (arXiv 2410.12557), where noise is at 0: here ``t = 1`` is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.methods.base import JUMP, Method, Models, Samples, direction, mean_square, noised, times
from robopolicy.generative.path import broadcast_time
from robopolicy.policy import Policy


class Shortcut(Method):
    """A flow map, asked by jumps: in one call, or in a power of two of them."""

    class Config(base.Config):
        """Attributes:
        source: Of velocities and clean chunks: the ``teacher``, or the ``data`` (from scratch).
        levels: Jumps have lengths ``1, 1/2, 1/4, ... 2^-(levels - 1)``; a half jump below the last is a step along the velocity.
        bootstrapped: Share of a batch that learns jumps; the rest learns velocities.
        """

        source: Literal["teacher", "data"] = "teacher"
        levels: int = pydantic.Field(default=7, ge=1, le=20)
        bootstrapped: float = pydantic.Field(default=0.25, gt=0, lt=1)

    DEFAULTS = {"train": {"precision": "fp32"}}
    ASKS_FLOW = True

    def policy(self) -> Mapping[str, Any]:
        return JUMP

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        student, size = models.student, len(batch.clean)
        count = min(max(1, round(self.config.bootstrapped * size)), size)  # the first rows of the batch learn jumps
        t, length = self._jumps(count, generator)
        t = torch.cat([t.to(batch.clean.device), times(batch, student, generator)[count:]])
        length = torch.cat([length.to(t.device), torch.zeros_like(t[count:])])
        x, velocity = noised(batch, t, generator, 1.0 if self.from_data else student.config.initial_noise)
        if not self.from_data:
            velocity = models.teacher.velocity(x, t, models.teacher.encode(batch.obs))
        with torch.no_grad():
            ctx = models.average.encode(batch.obs)[:count]
            goal = two_halves(models.average, x[:count], t[:count], length[:count], ctx, 2.0**-self.config.levels)
        target = torch.cat([goal, velocity[count:]])
        return mean_square(direction(student, x, t, t - length, student.encode(batch.obs, generator)) - target, batch.keep)

    def _jumps(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Starts and lengths: a start is a multiple of its length, so that jumps of one length tile the way."""
        draw = torch.rand((2, count), generator=generator, device=generator.device, dtype=torch.float64)
        length = 2.0 ** -(draw[0] * self.config.levels).floor()
        return length * (1 + (draw[1] / length).floor()), length


def two_halves(policy: Policy, x: Tensor, t: Tensor, length: Tensor, ctx: Tensor, shortest: float) -> Tensor:
    """The mean direction of two jumps of half the ``length [B]`` each; those of ``shortest`` go along the velocity."""
    half = length / 2
    gap = torch.where(half > 1.5 * shortest, half, 0.0)
    first = direction(policy, x, t, t - gap, ctx)
    middle = x - broadcast_time(half, x) * first
    second = direction(policy, middle, t - half, t - half - gap, ctx)
    return (first + second) / 2
