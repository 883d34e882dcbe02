"""What all denoising networks share: activations, the embedding of time, and configurations with presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from robopolicy.config import Config
from robopolicy.errors import nearest

Activation = Literal["silu", "mish", "gelu"]

_ACTIVATIONS: Mapping[Activation, type[nn.Module]] = {"silu": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU}


def activation(name: Activation) -> nn.Module:
    """A new module of the named activation."""
    return _ACTIVATIONS[name]()


class NetConfig(Config):
    """A configuration that may start from a preset: ``{preset: small, dropout: 0.1}`` is the preset with one value changed."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        expanded = dict(value)
        if "preset" in value:
            name = str(expanded.pop("preset"))
            if name not in cls.PRESETS:
                raise ValueError(f"unknown preset '{name}': {nearest(name, cls.PRESETS)}")
            expanded = {**cls.PRESETS[name], **expanded}
        # Behind a "before" validator strict types no longer take lists, as JSON has them, for tuples.
        return {key: tuple(v) if isinstance(v, list) else v for key, v in expanded.items()}


def sinusoidal(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of ``t`` at ``dim / 2`` frequencies from 1 to 1e-4 in equal ratios: ``[...] -> [..., dim]``.

    Vaswani et al. 2017, arXiv 1706.03762. Computed in float32 whatever autocast does: of arguments up to 100, bfloat16 keeps
    eight bits.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float().unsqueeze(-1) * torch.exp(steps * (-math.log(10_000.0) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding and a two-layer MLP: ``[B] -> [B, dim]`` or ``[B, H] -> [B, H, dim]``.

    Args:
        dim: Width, even and at least 4.
        act: Activation between the layers.
    """

    def __init__(self, dim: int, act: Activation) -> None:
        super().__init__()
        self.dim = dim
        self.widen = nn.Linear(dim, 4 * dim)
        self.act = activation(act)
        self.narrow = nn.Linear(4 * dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.act(self.widen(sinusoidal(t, self.dim).to(self.widen.weight.dtype))))
        return out


def per_row(embedded: Tensor, rows: int) -> Tensor:
    """Time embedding as one row per step of the chunk: ``[B, E]`` or ``[B, H, E]`` to ``[B, H, E]``, without a copy."""
    return embedded if embedded.ndim == 3 else embedded.unsqueeze(1).expand(-1, rows, -1)


def zero_(layer: nn.Linear) -> nn.Linear:
    """Zero weights and bias, so that what the layer adds or modulates is nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
