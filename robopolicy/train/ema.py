"""Exponential moving average of weights with the warm-up schedule that diffusion policies use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from robopolicy.config import Config


class EMAConfig(Config):
    """decay(n) = min(max_decay, 1 - (1 + n / inv_gamma)^-power) after n updates: a young average forgets quickly."""

    max_decay: float = 0.9999
    power: float = 0.75
    inv_gamma: float = 1.0

    def decay(self, num_averaged: int) -> float:
        """Weight kept of the old average at update number ``num_averaged`` (0: the first)."""
        return max(0.0, min(self.max_decay, 1.0 - (1.0 + num_averaged / self.inv_gamma) ** -self.power))


def averaged(model: nn.Module, config: EMAConfig) -> AveragedModel:
    """A running average of ``model``; its ``n_averaged`` buffer is the step count, which must survive a resume.

    Losing the count restarts the warm-up at decay 0, which overwrites the average with the raw weights at the first step.
    """

    def update(averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(averages, weights, 1.0 - config.decay(int(num_averaged)))

    multi_avg_fn: Callable[..., None] = torch.no_grad()(update)
    ema = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=False)
    ema.eval()
    return ema
