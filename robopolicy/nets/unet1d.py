"""Conditional 1-D U-Net over the steps of a chunk: the denoiser of Diffusion Policy (Chi et al. 2023, arXiv 2303.04137).

Activations are ``[B, L, C]`` throughout (channels last), so chunks enter and leave without a copy and modulation per row is plain
broadcasting. Weights keep the usual ``[out, in, kernel]`` layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robopolicy.errors import ConfigError
from robopolicy.nets.embedding import Activation, NetConfig, TimeEmbedding, activation


class UNet1d(nn.Module):
    """Residual blocks modulated by FiLM (scale and bias) with time and context, at lengths H, H/2, H/4, ...

    With ``preset: published`` this is the published network: its function, and for two actions and a context of 40 its 65.8 M
    parameters.

    Rows with times of their own: a level of length L is modulated by the time embeddings averaged over the H/L rows that
    each of its positions stands for. With equal times that is the modulation of one time per chunk.

    Args:
        config: Sizes.
        action_dim: Width A of an action.
        horizon: Rows H of a chunk, a multiple of ``2 ** (levels - 1)``.
        ctx_dim: Width C of the context.

    Raises:
        ConfigError: The horizon cannot be halved often enough.
    """

    class Config(NetConfig):
        PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            # Parameters for two actions and a context of 40.
            "tiny": {"down_dims": (16, 32, 64), "time_dim": 32},  # 0.32 M
            "small": {"down_dims": (32, 64, 128), "time_dim": 64},  # 1.2 M
            "base": {"down_dims": (64, 128, 256), "time_dim": 128},  # 4.6 M
            "large": {"down_dims": (128, 256, 512), "time_dim": 256},  # 17.9 M
            "published": {
                "down_dims": (256, 512, 1024),
                "time_dim": 256,
                "kernel_size": 5,
                "groups": 8,
                "activation": "mish",
            },  # 65.8 M
        }
        down_dims: tuple[int, ...] = pydantic.Field(default=(64, 128, 256), min_length=1)
        time_dim: int = pydantic.Field(default=128, ge=4, multiple_of=2)
        kernel_size: int = pydantic.Field(default=5, ge=1)
        groups: int = pydantic.Field(default=8, ge=1)
        activation: Activation = "silu"

        @pydantic.model_validator(mode="after")
        def _fits(self) -> Self:
            if self.kernel_size % 2 == 0:
                raise ValueError(f"kernel_size {self.kernel_size} is even; lengths are kept only by odd kernels")
            if odd := [dim for dim in self.down_dims if dim < 1 or dim % self.groups]:
                raise ValueError(f"down_dims {odd} are not positive multiples of groups {self.groups}")
            return self

    def __init__(self, config: UNet1d.Config, *, action_dim: int, horizon: int, ctx_dim: int) -> None:
        super().__init__()
        dims = config.down_dims
        if horizon % 2 ** (len(dims) - 1):
            raise ConfigError(
                f"net 'unet1d': horizon {horizon} is not a multiple of {2 ** (len(dims) - 1)}; "
                f"{len(dims)} levels halve it {len(dims) - 1} times. Change the horizon or give fewer down_dims"
            )
        cond_dim = config.time_dim + ctx_dim

        def block(inputs: int, outputs: int) -> _ResidualBlock:
            return _ResidualBlock(config, inputs, outputs, cond_dim)

        self.time = TimeEmbedding(config.time_dim, config.activation)
        self.act = activation(config.activation)
        inputs = (action_dim, *dims[:-1])
        self.down = nn.ModuleList(_Pair(block(i, o), block(o, o)) for i, o in zip(inputs, dims, strict=True))
        self.shorten = nn.ModuleList(Conv(dim, dim, 3, stride=2, padding=1) for dim in dims[:-1])
        self.middle = _Pair(block(dims[-1], dims[-1]), block(dims[-1], dims[-1]))
        up = list(zip(reversed(dims[1:]), reversed(dims[:-1]), strict=True))
        self.up = nn.ModuleList(_Pair(block(2 * i, o), block(o, o)) for i, o in up)
        self.lengthen = nn.ModuleList(ConvUp(o, o, 4, stride=2, padding=1) for _, o in up)
        self.last = _ConvBlock(config, dims[0], dims[0])
        self.leave = Conv(dims[0], action_dim, 1)

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        """Prediction ``[B, H, A]`` for ``x [B, H, A]``, ``t [B]`` or ``[B, H]``, and ``ctx [B, C]``."""
        conditions = self._conditions(self.time(t), ctx)
        h, skips = x, []
        for level, pair in enumerate(self.down):
            h = pair(h, conditions[level])
            skips.append(h)
            if level < len(self.shorten):
                h = self.shorten[level](h)
        h = self.middle(h, conditions[-1])
        for pair, lengthen in zip(self.up, self.lengthen, strict=True):
            condition = conditions[len(skips) - 1]
            h = lengthen(pair(torch.cat([h, skips.pop()], dim=2), condition))
        out: Tensor = self.leave(self.last(h))
        return out

    def _conditions(self, time: Tensor, ctx: Tensor) -> list[Tensor]:
        """Condition of each level: ``[B, 1, E]`` with one time per chunk, else ``[B, L, E]``."""
        levels = len(self.down)
        if time.ndim == 2:
            return [self.act(torch.cat([time, ctx], dim=1)).unsqueeze(1)] * levels
        conditions = []
        for level in range(levels):
            pooled = time.unflatten(1, (-1, 2**level)).mean(2)
            conditions.append(self.act(torch.cat([pooled, ctx.unsqueeze(1).expand(-1, pooled.shape[1], -1)], dim=2)))
        return conditions


class _Pair(nn.Module):
    """Two residual blocks under the same condition."""

    def __init__(self, first: _ResidualBlock, second: _ResidualBlock) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(h, condition), condition)
        return out


class _ResidualBlock(nn.Module):
    """conv block, FiLM, conv block, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, config: UNet1d.Config, inputs: int, outputs: int, cond_dim: int) -> None:
        super().__init__()
        self.first = _ConvBlock(config, inputs, outputs)
        self.film = nn.Linear(cond_dim, 2 * outputs)
        self.second = _ConvBlock(config, outputs, outputs)
        self.residual = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, bias = self.film(condition).chunk(2, dim=-1)
        out: Tensor = self.second(torch.addcmul(bias, self.first(h), scale)) + self.residual(h)
        return out


class _ConvBlock(nn.Module):
    """convolution, group normalisation, activation."""

    def __init__(self, config: UNet1d.Config, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, config.kernel_size, padding=config.kernel_size // 2)
        self.norm = Norm(config.groups, outputs)
        self.act = activation(config.activation)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(h)))
        return out


class Conv(nn.Conv1d):
    """``nn.Conv1d`` on ``[B, L, C]``: the same parameters, the same numbers.

    On a CPU, layers with more weights than activations are far faster as one matrix product with the windows laid out side by
    side: oneDNN reorders the weights of a convolution in each pass, and here the weights are what is large.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        if kernel == 1:
            return F.linear(x, self.weight.squeeze(2), self.bias)
        if x.device.type != "cpu" or x.shape[0] * x.shape[1] > 2 * self.out_channels:
            image = x.unsqueeze(1).permute(0, 3, 1, 2)  # [B, C, 1, L], channels last without a copy
            out = F.conv2d(image, self.weight.unsqueeze(2), self.bias, (1, stride), (0, padding))
            return out.permute(0, 2, 3, 1).squeeze(1)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))  # before the windows repeat it, instead of after
        windows = F.pad(x, (0, 0, padding, padding)).unfold(1, kernel, stride)  # [B, L', C, kernel]
        return F.linear(windows.flatten(2), self.weight.flatten(1), self.bias)


class ConvUp(nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` of kernel 4, stride 2, padding 1 on ``[B, L, C]``: doubles the length.

    One matrix product gives the four taps of each position; output ``2m`` is tap 1 of ``m`` plus tap 3 of ``m - 1``, and output
    ``2m + 1`` is tap 2 of ``m`` plus tap 0 of ``m + 1``.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        taps = F.linear(x, self.weight.flatten(1).t()).unflatten(2, (self.out_channels, 4))
        after, even, odd, before = taps.unbind(3)  # taps 0..3
        even = even + F.pad(before[:, :-1], (0, 0, 1, 0))
        odd = odd + F.pad(after[:, 1:], (0, 0, 0, 1))
        out = torch.stack([even, odd], dim=2).flatten(1, 2)
        return out if self.bias is None else out + self.bias


class Norm(nn.GroupNorm):
    """``nn.GroupNorm`` on ``[B, L, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        image = x.unsqueeze(1).permute(0, 3, 1, 2)  # [B, C, 1, L], channels last without a copy
        out = F.group_norm(image, self.num_groups, self.weight, self.bias, self.eps)
        return out.permute(0, 2, 3, 1).squeeze(1)
