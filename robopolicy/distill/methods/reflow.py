"""Reflow: flow matching once more, on the teacher's own pairs of noise and chunk, which makes the paths straight.

Liu et al. 2023 (arXiv 2209.03003). Pairs are drawn as the teacher joins them, not at random, so that straight lines between them
cross less, and few Euler steps suffice. At ``t = 1`` its loss is that of ``same_noise``.

However noise and chunk are joined, the flow between them ends in the distribution of the chunks: a teacher whose chunks are draws
(rules ``and`` and ``or``) is learnt, too, with fresh noise beside each chunk every time (pairs that follow from nothing would be
learnt by heart). The lines then cross, and that takes steps: one would give the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.config import component
from robopolicy.distill.methods.base import Method, Models, Samples, mean_square, times
from robopolicy.distill.teacher import Teacher
from robopolicy.errors import ConfigError
from robopolicy.generative.path import LinearFlow, broadcast_time
from robopolicy.generative.sampler import SAMPLERS, randn
from robopolicy.policy import PolicyConfig


class Reflow(Method):
    """A plain flow policy, right at every ``t``: it may also be asked in several steps."""

    class Config(base.Config):
        pass

    OF_DRAWS = {"sampler": {"type": "euler", "num_steps": 10}}

    def check(self, teacher: Teacher, student: PolicyConfig) -> None:
        super().check(teacher, student)
        cls, config = component("sampler", student.sampler, SAMPLERS)
        if teacher.draws and len(cls(config).times(LinearFlow())) == 2:
            raise ConfigError(
                "policy.sampler: of a teacher whose chunks are draws (rule and/or) a student of one step is the mean; leave "
                "policy.sampler.num_steps at 10, then distil that student by --method same_noise for one call"
            )

    def policy(self) -> Mapping[str, Any]:
        return {"prediction": "flow", "sampler": {"type": "euler", "num_steps": 1}}

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        student = models.student
        t = times(batch, student, generator)
        noise = batch.noise
        if models.teacher.draws:
            noise = randn(noise.shape, generator, device=noise.device, dtype=noise.dtype)
        start = student.path.prior(student.config.initial_noise * noise)
        time = broadcast_time(t, start)
        x = (1 - time) * batch.clean + time * start
        x_in, t_in = student.path.net_input(x, t)
        velocity = student.denoise(x_in, t_in, student.encode(batch.obs, generator)).to(x.dtype)
        return mean_square(velocity - (start - batch.clean), batch.keep)
