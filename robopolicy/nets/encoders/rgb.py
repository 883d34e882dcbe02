"""Image encoder, and the encoder that mixes images with vectors.

Images stay ``uint8`` ``[B, n_obs_steps, H, W, C]`` until they are on the device; they are cropped as bytes and become floats in
[-1, 1] last, which is a quarter of the memory traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import pydantic
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from robopolicy import config as base
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.nets.embedding import NetConfig
from robopolicy.nets.encoders.state import StateEncoder


class RGBConfig(NetConfig):
    """Attributes:
    crop: Share of height and width that is kept: a random window in training, the centre in evaluation. 84 of 96 is 0.875.
    stem: ``small``: 3x3 stride 2; ``imagenet``: 7x7 stride 2 and a pool of stride 2, as ResNet-18 has it.
    widths: Channels of each stage; every stage but the first halves height and width.
    blocks: Residual blocks in each stage.
    group_width: Channels in a group of the group normalisation.
    keypoints: Channels of the spatial softmax.
    dim: Features of one frame.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {"widths": (16, 32, 64), "blocks": 1, "stem": "small"},
        "resnet18": {"widths": (64, 128, 256, 512), "blocks": 2, "stem": "imagenet"},
    }
    crop: float = pydantic.Field(default=0.875, gt=0, le=1)
    stem: Literal["small", "imagenet"] = "small"
    widths: tuple[int, ...] = pydantic.Field(default=(16, 32, 64), min_length=1)
    blocks: int = pydantic.Field(default=1, ge=1)
    group_width: int = pydantic.Field(default=16, ge=1)
    keypoints: int = pydantic.Field(default=32, ge=1)
    dim: int = pydantic.Field(default=64, ge=1)

    @pydantic.model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if odd := [width for width in self.widths if width < 1 or width % self.group_width]:
            raise ValueError(f"widths {odd} are not positive multiples of group_width {self.group_width}")
        return self


def crop_window(images: Tensor, height: int, width: int, top: Tensor, left: Tensor) -> Tensor:
    """Cut one window out of all frames of a sample: ``[B, T, H, W, C] -> [B, T, height, width, C]``.

    Args:
        images: Frames.
        height: Rows of the window.
        width: Columns of the window.
        top: First row for each sample, int64 ``[B]``.
        left: First column for each sample, int64 ``[B]``.
    """
    # A view with every possible window, of which the indexing copies one for each sample.
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # [B, T, tops, lefts, C, height, width]
    windows = rearrange(windows, "b t y x c h w -> b y x t h w c")
    return windows[torch.arange(images.shape[0], device=images.device), top, left]


def spatial_softmax(logits: Tensor) -> Tensor:
    """Expected position of each channel, x then y in [-1, 1]: ``[N, K, H, W] -> [N, 2 K]`` (Levine et al. 2016, 1504.00702)."""
    height, width = logits.shape[2:]
    weights = rearrange(logits.float(), "n k h w -> n k (h w)").softmax(-1)
    weights = rearrange(weights, "n k (h w) -> n k h w", h=height)
    # Not as matrix products: autocast would round positions to bfloat16, a fifth of a pixel at the border of 96.
    x = (weights.sum(2) * torch.linspace(-1, 1, width, device=logits.device)).sum(-1)
    y = (weights.sum(3) * torch.linspace(-1, 1, height, device=logits.device)).sum(-1)
    return torch.cat([x, y], dim=1)


class RGBBranch(nn.Module):
    """ResNet with group normalisation and spatial softmax, applied to each frame.

    Group instead of batch normalisation, because averaged weights (EMA) do not fit running statistics (Chi et al. 2023).

    Args:
        config: Sizes.
        feature: The image feature.
        n_obs_steps: Length of the window.

    Raises:
        ConfigError: The feature is not an image.
    """

    def __init__(self, config: RGBConfig, feature: Feature, n_obs_steps: int) -> None:
        super().__init__()
        if not feature.is_image:
            raise ConfigError(
                f"encoder: feature '{feature.name}' {feature.dtype} {feature.shape} is no image; expected uint8 (H, W, 1 or 3)"
            )
        height, width, channels = feature.shape
        self.crop = max(1, round(config.crop * height)), max(1, round(config.crop * width))
        self.stem = _stem(config, channels)
        stages: list[nn.Module] = []
        inputs = config.widths[0]
        for stage, outputs in enumerate(config.widths):
            for block in range(config.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_ResidualBlock(inputs, outputs, stride, config.group_width))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.keypoints = nn.Conv2d(inputs, config.keypoints, 1)
        self.leave = nn.Linear(2 * config.keypoints, config.dim)
        self.ctx_dim = n_obs_steps * config.dim

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features ``[B, ctx_dim]`` of ``uint8 [B, n_obs_steps, H, W, C]``; ``generator`` places the crops in training."""
        frames = rearrange(self._crop(images, generator), "b t h w c -> (b t) c h w")  # channels last in memory
        h = frames.to(self.leave.weight.dtype) / 127.5 - 1
        points = spatial_softmax(self.keypoints(self.stages(self.stem(h))))
        out: Tensor = self.leave(points.to(self.leave.weight.dtype))
        return out.unflatten(0, images.shape[:2]).flatten(1)

    def _crop(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        height, width = self.crop
        spare_y, spare_x = images.shape[2] - height, images.shape[3] - width
        if self.training and (spare_y or spare_x):
            device = torch.device("cpu") if generator is None else generator.device
            corner = torch.rand((2, images.shape[0]), generator=generator, device=device).to(images.device)
            return crop_window(images, height, width, (corner[0] * (spare_y + 1)).long(), (corner[1] * (spare_x + 1)).long())
        top, left = spare_y // 2, spare_x // 2
        return images[:, :, top : top + height, left : left + width]


def _stem(config: RGBConfig, channels: int) -> nn.Module:
    width = config.widths[0]
    norm = nn.GroupNorm(width // config.group_width, width)
    if config.stem == "small":
        return nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), norm, nn.ReLU())
    convolution = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))


class _ResidualBlock(nn.Module):
    """Basic block of He et al. 2015, arXiv 1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(outputs // group_width, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(outputs // group_width, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.GroupNorm(outputs // group_width, outputs))

    def forward(self, h: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(h)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(h))


class MultimodalEncoder(nn.Module):
    """Images through a branch of their own each, everything else through the state encoder, side by side.

    Args:
        config: Sizes.
        features: Declared features, images and vectors in any mixture.
        n_obs_steps: Length of the window.
    """

    class Config(base.Config):
        state: StateEncoder.Config = StateEncoder.Config()
        rgb: RGBConfig = RGBConfig()

    def __init__(self, config: MultimodalEncoder.Config, *, features: Mapping[str, Feature], n_obs_steps: int) -> None:
        super().__init__()
        images = {name: feature for name, feature in features.items() if feature.is_image}
        vectors = {name: feature for name, feature in features.items() if not feature.is_image}
        branches = {name: RGBBranch(config.rgb, feature, n_obs_steps) for name, feature in images.items()}
        self.ctx_dim: int = sum(branch.ctx_dim for branch in branches.values())
        self.rgb = nn.ModuleDict(branches)
        self.state: StateEncoder | None = None
        if vectors or not images:  # the state encoder says what is wrong when there is nothing at all
            self.state = StateEncoder(config.state, features=vectors, n_obs_steps=n_obs_steps)
            self.ctx_dim += self.state.ctx_dim

    def forward(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Context ``[B, ctx_dim]``.

        Args:
            obs: ``name -> [B, n_obs_steps, *shape]``: vectors normalised, images uint8.
            generator: Places the random crops in training; None: torch's default one.
        """
        parts = [] if self.state is None else [self.state(obs)]
        parts += [branch(obs[name], generator) for name, branch in self.rgb.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
