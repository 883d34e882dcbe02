"""``ValueNet``: what a state is worth, for policy gradients."""

from __future__ import annotations

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from robopolicy import config as base
from robopolicy.nets.embedding import Activation, activation, zero_


class ValueNet(nn.Module):
    """Residual MLP on the policy's context: ``[B, C] -> [B]``; 0 everywhere before training.

    Args:
        config: Sizes.
        ctx_dim: Width C of the context.
    """

    class Config(base.Config):
        width: int = pydantic.Field(default=256, ge=1)
        depth: int = pydantic.Field(default=2, ge=0)  # residual blocks between the first and the last layer
        activation: Activation = "mish"

    def __init__(self, config: ValueNet.Config, ctx_dim: int) -> None:
        super().__init__()
        self.enter = nn.Linear(ctx_dim, config.width)
        self.act = activation(config.activation)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.leave = zero_(nn.Linear(config.width, 1))

    def forward(self, ctx: Tensor) -> Tensor:
        h = self.enter(ctx)
        for block in self.blocks:
            h = h + block(self.act(F.layer_norm(h, h.shape[-1:])))
        out: Tensor = self.leave(self.act(h))
        return out.squeeze(-1)
