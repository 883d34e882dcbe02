"""MeanFlow: the mean velocity between two times, from the velocity and its own derivative along the way.

Geng et al. 2025 (arXiv 2505.13447), in which too ``t = 1`` is noise. With ``u`` the mean velocity from ``t`` to ``r <= t`` and
``v`` the velocity, ``u = v - (t - r) du/dt``; the derivative along the path is a Jacobian-vector product with ``(v, 1, 0)``. It
needs no teacher (``source: data``); with one, ``v`` is the teacher's field, less noisy than that of a single demonstration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.methods.base import JUMP, Method, Models, Samples, direction, noised, times
from robopolicy.generative.path import broadcast_time
from robopolicy.policy import Policy


class MeanFlow(Method):
    """A flow map, asked by jumps: in one call, or in several."""

    class Config(base.Config):
        """Attributes:
        source: Of velocities and clean chunks: the ``teacher``, or the ``data`` (from scratch).
        instantaneous: Share of a batch in which the two times are equal: plain flow matching.
        power, floor: Each chunk's squared error ``e`` is weighed by ``1 / (e + floor)^power``.
        """

        source: Literal["teacher", "data"] = "teacher"
        instantaneous: float = pydantic.Field(default=0.5, ge=0, le=1)
        power: float = pydantic.Field(default=1.0, ge=0)
        floor: float = pydantic.Field(default=0.01, gt=0)

    DEFAULTS = {"train": {"precision": "fp32"}}  # derivatives in time are too fine for bfloat16
    ASKS_FLOW = True

    def policy(self) -> Mapping[str, Any]:
        return JUMP

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        student = models.student
        both = torch.stack([times(batch, student, generator), times(batch, student, generator)])
        t, r = both.max(0).values, both.min(0).values
        r = torch.where(torch.arange(len(t), device=t.device) < self.config.instantaneous * len(t), t, r)
        x, velocity = noised(batch, t, generator, 1.0 if self.from_data else student.config.initial_noise)
        if not self.from_data:
            velocity = models.teacher.velocity(x, t, models.teacher.encode(batch.obs))
        ctx = student.encode(batch.obs, generator)
        mean, slope = mean_velocity(student, x, t, r, velocity, ctx)
        target = velocity - broadcast_time(t - r, x) * slope.detach()
        error = (mean - target).square()
        if batch.keep is not None:
            error = error * batch.keep
        squared = error.flatten(1).sum(1)
        return (squared / (squared.detach() + self.config.floor) ** self.config.power).mean()


def mean_velocity(policy: Policy, x: Tensor, t: Tensor, r: Tensor, velocity: Tensor, ctx: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x, t, r)`` and its derivative along the path, by ``t`` with ``dx/dt = velocity`` and ``r`` fixed."""

    def mean(x: Tensor, t: Tensor) -> Tensor:
        return direction(policy, x, t, r, ctx)

    value, slope, *_ = torch.func.jvp(mean, (x, t), (velocity, torch.ones_like(t)))
    return value, slope
