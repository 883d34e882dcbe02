"""Regression: the mean action, from no noise. The baseline that every one-step head has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.methods.base import Method, Models, Samples, mean_square


class Regression(Method):
    """The network's output from ``x = 0`` at ``t = 1`` is the chunk. Where actions are multimodal it is between the modes."""

    class Config(base.Config):
        source: Literal["teacher", "data"] = "teacher"  # of the actions

    DEFAULTS = {"warm_start": False}
    OF_DRAWS: ClassVar[Mapping[str, Any]] = {}

    @property
    def times(self) -> tuple[float, ...]:
        return (1.0,)

    def policy(self) -> Mapping[str, Any]:
        return {"prediction": "x0", "initial_noise": 0.0, "sampler": {"type": "consistency", "num_steps": 1, "noise": 0.0}}

    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        student, x = models.student, torch.zeros_like(batch.clean)
        x0 = student.field(x, x.new_ones(len(x)), student.encode(batch.obs, generator)).x0
        return mean_square(x0 - batch.clean, batch.keep)
