"""Residual MLP over the flattened chunk, modulated by time and context (AdaLN). The fast one for state policies on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robopolicy.nets.embedding import Activation, NetConfig, TimeEmbedding, activation, per_row, zero_

# Numbers that each row of the chunk gets to say how noisy it is, when rows have times of their own.
_ROW_TIME = 8


class MLP(nn.Module):
    """``depth`` residual blocks ``h += W2 act(W1 (LN(h) (1 + s) + b))``, with ``s, b`` from the time and the context.

    The chunk enters flattened, each row beside eight numbers computed from its own time, so rows may have different times; the
    modulation sees the mean of the rows' time embeddings. With one time per chunk both are what that time gives.
    The context also enters directly, beside the chunk.

    Args:
        config: Sizes.
        action_dim: Width A of an action.
        horizon: Rows H of a chunk.
        ctx_dim: Width C of the context.
    """

    class Config(NetConfig):
        PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            # Parameters for two actions, 16 steps and a context of 40.
            "tiny": {"width": 128, "depth": 3, "time_dim": 32},  # 0.38 M
            "small": {"width": 256, "depth": 4, "time_dim": 64},  # 1.8 M
            "base": {"width": 512, "depth": 4, "time_dim": 64},  # 7.0 M
            "large": {"width": 1024, "depth": 6, "time_dim": 128},  # 40 M
        }
        width: int = pydantic.Field(default=512, ge=8)
        depth: int = pydantic.Field(default=4, ge=1)
        expansion: int = pydantic.Field(default=2, ge=1)
        time_dim: int = pydantic.Field(default=64, ge=4, multiple_of=2)
        dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
        activation: Activation = "silu"

    def __init__(self, config: MLP.Config, *, action_dim: int, horizon: int, ctx_dim: int) -> None:
        super().__init__()
        width, self.horizon, self.action_dim = config.width, horizon, action_dim
        self.time = TimeEmbedding(config.time_dim, config.activation)
        self.row_time = nn.Linear(config.time_dim, _ROW_TIME)
        self.enter = nn.Linear(horizon * (action_dim + _ROW_TIME) + ctx_dim, width)
        self.condition = nn.Sequential(nn.Linear(config.time_dim + ctx_dim, width), activation(config.activation))
        # One matrix for the modulation of all blocks and of the output: one large product instead of many small ones.
        self.modulation = zero_(nn.Linear(width, 2 * width * (config.depth + 1)))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.leave = zero_(nn.Linear(width, horizon * action_dim))

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        """Prediction ``[B, H, A]`` for ``x [B, H, A]``, ``t [B]`` or ``[B, H]``, and ``ctx [B, C]``."""
        time = self.time(t)
        rows = per_row(self.row_time(time), self.horizon)
        h = self.enter(torch.cat([x.flatten(1), rows.flatten(1), ctx], dim=1))
        condition = self.condition(torch.cat([time if time.ndim == 2 else time.mean(1), ctx], dim=1))
        scale_shift = self.modulation(condition).chunk(2 * (len(self.blocks) + 1), dim=1)
        for i, block in enumerate(self.blocks):
            h = h + block(_modulate(h, scale_shift[2 * i], scale_shift[2 * i + 1]))
        out: Tensor = self.leave(_modulate(h, scale_shift[-2], scale_shift[-1]))
        return out.unflatten(1, (self.horizon, self.action_dim))


class _Block(nn.Module):
    def __init__(self, config: MLP.Config) -> None:
        super().__init__()
        hidden = config.expansion * config.width
        self.widen = nn.Linear(config.width, hidden)
        self.act = activation(config.activation)
        self.dropout = nn.Dropout(config.dropout)
        self.narrow = nn.Linear(hidden, config.width)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.dropout(self.act(self.widen(h))))
        return out


def _modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), 1 + scale)
