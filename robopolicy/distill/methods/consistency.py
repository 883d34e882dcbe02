"""Consistency distillation: what the student sees from ``t`` is what its average sees one teacher's step later.

Song et al. 2023 (arXiv 2303.01469), algorithm 2, on the linear path. The student's clean chunk ``g(x, t) = x - t f(x, t)`` is
``x`` itself at ``t = 0``, which is the boundary that the method needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.methods.base import Method, Models, Samples, mean_square, noised, pseudo_huber
from robopolicy.generative.path import broadcast_time


class Consistency(Method):
    """One call, or more with fresh noise between them (sampler ``consistency``)."""

    class Config(base.Config):
        """Attributes:
        segments: Equal steps into which the way from noise to data is cut. More: a smaller error of the teacher's step, slower.
        ode_order: Of the teacher's step: 1 Euler, 2 Heun.
        loss: ``huber``: pseudo-Huber of the chunk; ``square``.
        """

        segments: int = pydantic.Field(default=20, ge=1)
        ode_order: Literal[1, 2] = 2
        loss: Literal["huber", "square"] = "huber"

    DEFAULTS = {"train": {"precision": "fp32"}}  # it learns from differences that bfloat16 would round away
    ASKS_FLOW = True

    def policy(self) -> Mapping[str, Any]:
        return {"prediction": "flow", "sampler": {"type": "consistency", "num_steps": 1}}

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        student, average, n = models.student, models.average, self.config.segments
        index = torch.randint(1, n + 1, (len(batch.clean),), generator=generator, device=generator.device)
        t = index.to(batch.clean.device).double() / n
        u = t - 1 / n
        x, _ = noised(batch, t, generator, student.config.initial_noise)
        with torch.no_grad():
            later = models.teacher.step(x, t, u, models.teacher.encode(batch.obs), self.config.ode_order)
            target = average.field(later, u.to(x.dtype), average.encode(batch.obs)).x0
            target = torch.where(broadcast_time(u, x) < 1e-9, later, target)  # g(x, 0) = x, to the bit
        error = student.field(x, t.to(x.dtype), student.encode(batch.obs, generator)).x0 - target
        return mean_square(error, batch.keep) if self.config.loss == "square" else pseudo_huber(error)
