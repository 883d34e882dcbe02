"""Diffusion transformer with AdaLN-zero (Peebles & Xie 2023, arXiv 2212.09748): one token per row of the chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import pydantic
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from robopolicy.nets.embedding import Activation, NetConfig, TimeEmbedding, activation, zero_


class DiT(nn.Module):
    """Transformer whose blocks are shifted, scaled and gated by time and context.

    The condition of a token is its row's time embedding plus the embedded context; with one time per chunk all tokens share it.

    Args:
        config: Sizes.
        action_dim: Width A of an action.
        horizon: Rows H of a chunk, one token each.
        ctx_dim: Width C of the context.
    """

    class Config(NetConfig):
        PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            # Parameters for two actions, 16 steps and a context of 40.
            "tiny": {"width": 96, "depth": 2, "heads": 4},  # 0.41 M
            "small": {"width": 144, "depth": 4, "heads": 4},  # 1.6 M
            "base": {"width": 256, "depth": 6, "heads": 4},  # 7.4 M
            "large": {"width": 512, "depth": 12, "heads": 8},  # 58 M
        }
        width: int = pydantic.Field(default=256, ge=8)
        depth: int = pydantic.Field(default=6, ge=1)
        heads: int = pydantic.Field(default=4, ge=1)
        expansion: int = pydantic.Field(default=4, ge=1)
        time_dim: int = pydantic.Field(default=64, ge=4, multiple_of=2)
        dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
        activation: Activation = "silu"

        @pydantic.model_validator(mode="after")
        def _heads_divide(self) -> Self:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
            return self

    def __init__(self, config: DiT.Config, *, action_dim: int, horizon: int, ctx_dim: int) -> None:
        super().__init__()
        width = config.width
        self.time = TimeEmbedding(config.time_dim, config.activation)
        self.time_in = nn.Linear(config.time_dim, width)
        self.ctx_in = nn.Sequential(nn.Linear(ctx_dim, width), activation(config.activation), nn.Linear(width, width))
        self.enter = nn.Linear(action_dim, width)
        self.position = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.act = activation(config.activation)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.modulation = zero_(nn.Linear(width, 2 * width))
        self.leave = zero_(nn.Linear(width, action_dim))

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        """Prediction ``[B, H, A]`` for ``x [B, H, A]``, ``t [B]`` or ``[B, H]``, and ``ctx [B, C]``."""
        time = self.time_in(self.time(t))
        # [B, H, width], or [B, 1, width] when all rows share their time: modulation then costs one row.
        condition = self.act((time if time.ndim == 3 else time.unsqueeze(1)) + self.ctx_in(ctx).unsqueeze(1))
        h = self.enter(x) + self.position
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.leave(_modulate(h, shift, scale))
        return out


class _Block(nn.Module):
    def __init__(self, config: DiT.Config) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.modulation = zero_(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.expansion * width),
            activation(config.activation),
            nn.Dropout(config.dropout),
            nn.Linear(config.expansion * width, width),
        )

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        h = h + gate1 * self._attend(_modulate(h, shift1, scale1))
        out: Tensor = h + gate2 * self.mlp(_modulate(h, shift2, scale2))
        return out

    def _attend(self, h: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(h), "b h (three heads d) -> three b heads h d", three=3, heads=self.heads)
        dropout = self.dropout if self.training else 0.0
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # There torch's attention, above all its backward pass, is several times slower in bfloat16 than in float32.
            with torch.autocast("cpu", enabled=False):
                mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out: Tensor = self.mix(rearrange(mixed, "b heads h d -> b h (heads d)"))
        return out


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), 1 + scale)
