"""ReinFlow: learned noise turns a few deterministic steps into a chain with a density (Zhang et al. 2025, arXiv 2505.22094)."""

from __future__ import annotations

import itertools
import math
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from robopolicy import config as base
from robopolicy.generative.sampler import StepDist, randn, step_dist
from robopolicy.nets.embedding import sinusoidal, zero_
from robopolicy.policy import Policy
from robopolicy.rl.heads.base import Acted, Head, Record, ddim


class ReinFlow(Head):
    """All ``num_steps`` deterministic steps explore with a std of their own, learned, and their joint density makes one ratio.

    The deterministic step is Euler's on a flow policy and DDIM's on a diffusion policy. The noise network is thrown away at the
    end: what is evaluated and deployed takes the same steps without noise. The first state's density is the same under the old
    and the new policy, and is left out.

    Attributes of Config:
        num_steps: Steps K. min_std, max_std: Bounds of the learned std of each entry.
        hidden: Widths of the noise network.
        decay: Whether ``max_std`` falls to ``min_std``: linearly, after the share ``hold`` of the training.
        clip: Clip range. reduce: Log-densities are averaged or summed over the steps and the executed entries.
    """

    class Config(base.Config):
        num_steps: int = pydantic.Field(default=4, ge=1)
        min_std: float = pydantic.Field(default=0.08, gt=0)
        max_std: float = pydantic.Field(default=0.16, gt=0)
        hidden: tuple[pydantic.PositiveInt, ...] = (64, 64)
        decay: bool = False
        hold: float = pydantic.Field(default=0.35, ge=0, lt=1)
        clip: float = pydantic.Field(default=0.05, gt=0)
        reduce: Literal["mean", "sum"] = "mean"

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.min_std > self.max_std:
                raise ValueError(f"min_std {self.min_std} is above max_std {self.max_std}; swap them")
            return self

    def __init__(self, config: ReinFlow.Config, policy: Policy) -> None:
        self.config = config
        self.max_std = config.max_std
        self.steps = list(itertools.pairwise(policy.path.grid(config.num_steps).tolist()))
        super().__init__(config, policy)
        self.noise_net = NoiseNet(policy.horizon, policy.action_transform.dim, policy.ctx_dim, config.hidden)
        self.noise_net.to(policy.device)

    def tunable(self, policy: Policy) -> Policy:
        return policy.varied(sampler=ddim(policy, self.config.num_steps))

    def anneal(self, progress: float) -> None:
        if self.config.decay:
            left = min(1.0, (1 - progress) / (1 - self.config.hold))
            self.max_std = self.config.min_std + left * (self.config.max_std - self.config.min_std)

    def step(self, policy: Policy, x: Tensor, t: float, u: float, ctx: Tensor) -> StepDist:
        """The distribution ``[B, H, A]`` of the state at ``u``: the same function samples and scores."""
        time = x.new_full((len(x),), t)
        mean = step_dist(policy.path, policy.field(x, time, ctx), x, t, u, clip=policy.sampler.clip).mean
        return StepDist(mean, self.std(x, time, ctx))

    def std(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        """Exploring std ``[B, H, A]``, from ``min_std`` to ``max_std`` on a logarithmic scale."""
        share = (torch.tanh(self.noise_net(*self.policy.path.net_input(x, t), ctx)) + 1) / 2
        low, high = math.log(self.config.min_std), math.log(self.max_std)
        return torch.exp(low + (high - low) * share)

    @torch.no_grad()
    def act(self, ctx: Tensor, generator: torch.Generator) -> Acted:
        policy = self.policy
        noise = randn((len(ctx), policy.horizon, policy.action_transform.dim), generator, device=ctx.device)
        chain = [policy.path.prior(policy.config.initial_noise * noise)]
        for t, u in self.steps:
            chain.append(self.step(policy, chain[-1], t, u, ctx).sample(generator))
        return Acted(chain[-1], {"chain": torch.stack(chain, dim=1)})  # [B, K + 1, H, A]

    def score(self, ctx: Tensor, record: Record) -> Tensor:
        chain = record["chain"]
        steps = [self.step(self.policy, chain[:, i], t, u, ctx).log_prob(chain[:, i + 1]) for i, (t, u) in enumerate(self.steps)]
        entries = torch.stack(steps, dim=1)[:, :, self.policy.executed].flatten(1)  # [M, K x rows x A]
        return (entries.mean(-1) if self.config.reduce == "mean" else entries.sum(-1))[:, None]

    def entropy(self, ctx: Tensor, record: Record) -> Tensor | None:
        chain = record["chain"]
        stds = [self.std(chain[:, i], chain.new_full((len(chain),), t), ctx) for i, (t, _) in enumerate(self.steps)]
        return torch.stack(stds, dim=1)[:, :, self.policy.executed].log().mean() + 0.5 * math.log(2 * math.pi * math.e)

    def divergence(self, ctx: Tensor, record: Record) -> Tensor:
        """KL of the chain to that of the base with the present noise, which is not pulled: sum over steps, mean over entries."""
        chain, total = record["chain"], ctx.new_zeros(())
        for i, (t, u) in enumerate(self.steps):
            new = self.step(self.policy, chain[:, i], t, u, ctx)
            with torch.no_grad():
                old = self.step(self.base, chain[:, i], t, u, ctx)
            total = total + (0.5 * ((new.mean - old.mean) / old.std) ** 2)[:, self.policy.executed].mean()
        return total


class NoiseNet(nn.Module):
    """MLP ``(x [B, H, A], time [B], ctx [B, C]) -> [B, H, A]``. It starts at zero: the middle of the range of stds."""

    TIME_DIM = 16

    def __init__(self, horizon: int, action_dim: int, ctx_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        widths = [horizon * action_dim + self.TIME_DIM + ctx_dim, *hidden]
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*layers, zero_(nn.Linear(widths[-1], horizon * action_dim)))

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([x.flatten(1), sinusoidal(t, self.TIME_DIM), ctx], dim=1))
        return out.view_as(x)
