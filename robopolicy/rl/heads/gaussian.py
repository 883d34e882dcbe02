"""A Gaussian policy, for comparison: PPO on the mean action that every diffusion or flow policy holds at ``t = 1``.

At pure noise the best guess of the clean chunk is its mean given the observation, so one network call at ``t = 1`` from zero
noise is the regression policy that the checkpoint's own training made on the side. PPO (Schulman et al. 2017, arXiv 1707.06347)
tunes it with a learned, state-independent std.
"""

from __future__ import annotations

import math
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from robopolicy import config as base
from robopolicy.errors import ConfigError
from robopolicy.generative.sampler import StepDist, randn
from robopolicy.policy import Policy
from robopolicy.rl.heads.base import Acted, Head, Record, ddim


class Gaussian(Head):
    """Attributes of Config:
    std: Initial std of the exploration, in normalised units. min_std, max_std: Its bounds. learn_std: Whether it is learned.
    clip: Clip range. reduce: Log-probabilities are averaged or summed over the executed entries.
    """

    class Config(base.Config):
        std: float = pydantic.Field(default=0.1, gt=0)
        min_std: float = pydantic.Field(default=0.01, gt=0)
        max_std: float = pydantic.Field(default=1.0, gt=0)
        learn_std: bool = True
        clip: float = pydantic.Field(default=0.2, gt=0)
        reduce: Literal["mean", "sum"] = "sum"

    def __init__(self, config: Gaussian.Config, policy: Policy) -> None:
        self.config = config
        if policy.config.prediction == "eps":
            raise ConfigError(
                "method gaussian: a network that predicts eps says nothing about the clean chunk at t = 1; use a policy with "
                "prediction v, x0 or flow"
            )
        if policy.config.frozen_above is not None:
            raise ConfigError(
                f"method gaussian: above t = {policy.config.frozen_above:.3g} this checkpoint's network is frozen, and this "
                "method tunes it at t = 1; use the checkpoint that was fine-tuned, or another method"
            )
        super().__init__(config, policy)
        self.log_std = nn.Parameter(torch.full((policy.action_transform.dim,), math.log(config.std)), config.learn_std)
        self.to(policy.device)

    def tunable(self, policy: Policy) -> Policy:
        return policy.varied(sampler=ddim(policy, 1), initial_noise=0.0)

    def distribution(self, policy: Policy, ctx: Tensor) -> StepDist:
        x = ctx.new_zeros(len(ctx), policy.horizon, policy.action_transform.dim)
        mean = policy.field(x, ctx.new_ones(len(ctx)), ctx).x0
        if policy.sampler.clip is not None:
            mean = mean.clamp(-policy.sampler.clip, policy.sampler.clip)
        return StepDist(mean, self.std)

    @property
    def std(self) -> Tensor:
        """Std of the exploration ``[A]``."""
        return self.log_std.exp().clamp(self.config.min_std, self.config.max_std)

    @torch.no_grad()
    def act(self, ctx: Tensor, generator: torch.Generator) -> Acted:
        mean, std = self.distribution(self.policy, ctx)
        chunk = mean + std * randn(mean.shape, generator, device=ctx.device)
        return Acted(chunk, {"chunk": chunk})

    def score(self, ctx: Tensor, record: Record) -> Tensor:
        log_prob = self.distribution(self.policy, ctx).log_prob(record["chunk"])[:, self.policy.executed].flatten(1)
        return (log_prob.mean(-1) if self.config.reduce == "mean" else log_prob.sum(-1))[:, None]

    def entropy(self, ctx: Tensor, record: Record) -> Tensor | None:
        return self.std.log().mean() + 0.5 * math.log(2 * math.pi * math.e) if self.config.learn_std else None

    def divergence(self, ctx: Tensor, record: Record) -> Tensor:
        """KL to the base with the present std, which is not pulled."""
        new = self.distribution(self.policy, ctx)
        with torch.no_grad():
            old = self.distribution(self.base, ctx)
        return (0.5 * ((new.mean - old.mean) / old.std) ** 2)[:, self.policy.executed].mean()

    def bc_loss(self, ctx: Tensor, chunk: Tensor, is_pad: Tensor | None, generator: torch.Generator) -> Tensor:
        error = (self.distribution(self.policy, ctx).mean - chunk).square().mean(-1)
        return error.mean() if is_pad is None else (error * ~is_pad).sum() / (~is_pad).sum().clamp_min(1)
