"""Consistency trajectory: jumps from any time to any earlier one, made consistent along the teacher's path.

Kim et al. 2024 (arXiv 2310.02279), as Consistency Policy (arXiv 2405.07503) uses it, on the linear path, where its jump
``G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)`` is ``x + (s - t) f(x, t, s)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.methods.base import (
    JUMP,
    Method,
    Models,
    Samples,
    direction,
    jump,
    mean_square,
    noised,
    pseudo_huber,
    times,
)


class CTM(Method):
    """A flow map, asked by jumps: in one call, or in several."""

    class Config(base.Config):
        """Attributes:
        segments: Equal steps into which the way from noise to data is cut.
        ode_order: Of the teacher's step from one to the next: 1 Euler, 2 Heun.
        denoising: Weight of the flow matching loss that keeps ``f(x, t, t)`` the velocity.
        """

        segments: int = pydantic.Field(default=20, ge=1)
        ode_order: Literal[1, 2] = 2
        denoising: float = pydantic.Field(default=1.0, ge=0)

    DEFAULTS = {"train": {"precision": "fp32"}}  # it learns from differences that bfloat16 would round away
    ASKS_FLOW = True

    def policy(self) -> Mapping[str, Any]:
        return JUMP

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        """``|G_(G(x_t, t, s), s, 0) - G_(G_(x_u, u, s), s, 0)|``: ``u`` one teacher's step below ``t``, ``s <= u``, ``G_`` the
        average, through which the gradient passes without reaching its weights."""
        student, average, n, device = models.student, models.average, self.config.segments, batch.clean.device
        draw = torch.rand((2, len(batch.clean)), generator=generator, device=generator.device, dtype=torch.float64).to(device)
        index = 1 + (draw[0] * n).long()  # 1 .. n
        t, u = index / n, (index - 1) / n
        s = (draw[1] * index).long() / n  # 0 .. u
        now = torch.zeros_like(t)
        ctx = student.encode(batch.obs, generator)
        x, _ = noised(batch, t, generator, student.config.initial_noise)
        with torch.no_grad():
            fixed = average.encode(batch.obs)
            later = models.teacher.step(x, t, u, models.teacher.encode(batch.obs), self.config.ode_order)
            target = jump(average, jump(average, later, u, s, fixed), s, now, fixed)
        loss = pseudo_huber(jump(average, jump(student, x, t, s, ctx), s, now, fixed) - target)
        if self.config.denoising:
            t = times(batch, student, generator)
            x, velocity = noised(batch, t, generator, student.config.initial_noise)
            if student.config.initial_noise != 1:  # what joins other noise to its chunks is not the teacher's flow
                velocity = models.teacher.velocity(x, t, models.teacher.encode(batch.obs))
            loss = loss + self.config.denoising * mean_square(direction(student, x, t, t, ctx) - velocity, batch.keep)
        return loss
