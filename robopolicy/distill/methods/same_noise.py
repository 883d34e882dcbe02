"""Same noise: one call from the noise is to end where the teacher's many calls end that start from the same noise.

A deterministic sampler is a function of its noise, so squared error averages no modes: the student keeps them all. It copies the
teacher, and can be no better. RL-100's ``action_same_noise`` (arXiv 2510.14830).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.methods.base import Method, Models, Samples, mean_square


class SameNoise(Method):
    """A plain flow policy that is taught the velocity at ``t = 1`` only, and that this velocity leads to the end."""

    class Config(base.Config):
        pass

    @property
    def times(self) -> tuple[float, ...]:
        return (1.0,)

    def policy(self) -> Mapping[str, Any]:
        return {"prediction": "flow", "sampler": {"type": "euler", "num_steps": 1}}

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        student = models.student
        x = student.path.prior(student.config.initial_noise * batch.noise)
        x0 = student.field(x, x.new_ones(len(x)), student.encode(batch.obs, generator)).x0
        return mean_square(x0 - batch.clean, batch.keep)
