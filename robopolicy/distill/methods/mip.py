"""Minimal iterative policy: regression, and a second look at the first answer. "Much Ado About Noising" (ICLR 2026), paper form.

Its ``t*`` is .9 of the way to the data: here the second call is at ``t = 1 - t* = .1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.methods.base import Method, Models, Samples, mean_square
from robopolicy.generative.sampler import randn


class MIP(Method):
    """Two calls: from nothing at ``t = 1``, then from the answer, scaled by ``1 - second``, at ``t = second``."""

    class Config(base.Config):
        source: Literal["teacher", "data"] = "teacher"  # of the actions
        second: float = pydantic.Field(default=0.1, gt=0, lt=1)  # time of the second call

    DEFAULTS = {"warm_start": False}
    OF_DRAWS: ClassVar[Mapping[str, Any]] = {}

    @property
    def times(self) -> tuple[float, ...]:
        return (1.0, self.config.second)

    def policy(self) -> Mapping[str, Any]:
        sampler = {"type": "consistency", "num_steps": 2, "noise": 0.0, "times": [1.0, self.config.second]}
        return {"prediction": "x0", "initial_noise": 0.0, "sampler": sampler}

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        """``|p(0, 1) - a|^2 / t*^2 + |p(t* a + (1 - t*) z, second) - a|^2 / (1 - t*)^2``: ``z`` is noise, ``t* = 1 - second``."""
        student, clean, second = models.student, batch.clean, self.config.second
        ctx = student.encode(batch.obs, generator)
        noisy = (1 - second) * clean + second * randn(clean.shape, generator, device=clean.device, dtype=clean.dtype)
        x = torch.cat([torch.zeros_like(clean), noisy])
        t = torch.cat([clean.new_ones(len(clean)), clean.new_full((len(clean),), second)])
        first, again = student.field(x, t, torch.cat([ctx, ctx])).x0.chunk(2)
        return mean_square(first - clean, batch.keep) / (1 - second) ** 2 + mean_square(again - clean, batch.keep) / second**2
