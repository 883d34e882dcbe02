"""State encoder: normalised vectors of the observation window, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import pydantic
import torch
from torch import Tensor, nn

from robopolicy import config as base
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.nets.embedding import Activation, activation


class StateEncoder(nn.Module):
    """Concatenates all features over the window, and passes them through an MLP if ``hidden`` says so.

    Args:
        config: Sizes.
        features: Declared features; vectors only.
        n_obs_steps: Length of the window.

    Raises:
        ConfigError: There is no feature, or one is an image.
    """

    class Config(base.Config):
        hidden: tuple[int, ...] = ()  # widths of the MLP's layers, the last one is the context's; empty: none
        activation: Activation = "silu"

        @pydantic.field_validator("hidden")
        @classmethod
        def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if any(width < 1 for width in value):
                raise ValueError(f"widths {value} must be positive")
            return value

    def __init__(self, config: StateEncoder.Config, *, features: Mapping[str, Feature], n_obs_steps: int) -> None:
        super().__init__()
        if not features:
            raise ConfigError("encoder 'state': no feature to encode; declare at least one observation")
        if images := [name for name, feature in features.items() if feature.is_image]:
            raise ConfigError(f"encoder 'state': {', '.join(images)} are images; use encoder 'multimodal' or leave them out")
        self.names = tuple(features)
        width = n_obs_steps * sum(feature.size for feature in features.values())
        layers: list[nn.Module] = []
        for outputs in config.hidden:
            layers += [nn.Linear(width, outputs), activation(config.activation)]
            width = outputs
        self.mlp = nn.Sequential(*layers[:-1])  # the last layer stays linear
        self.ctx_dim = width

    def forward(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Context ``[B, ctx_dim]`` of normalised ``name -> [B, n_obs_steps, *shape]``. ``generator`` is not used."""
        out: Tensor = self.mlp(torch.cat([obs[name].flatten(1) for name in self.names], dim=1))
        return out
