"""DPPO: the last denoising steps are a Markov chain whose Gaussian steps have densities (Ren et al. 2024, arXiv 2409.00588)."""

from __future__ import annotations

import itertools
import math
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.errors import ConfigError
from robopolicy.generative.sampler import StepDist, randn, step_dist
from robopolicy.policy import Policy
from robopolicy.rl.heads.base import Acted, Head, Record, ddim


class DPPO(Head):
    """Each of the last ``tuned_steps`` denoising steps is a step of the surrogate, with the advantage of the whole chunk.

    The earlier steps keep the frozen network of the base, in training and afterwards. A chain over the sampler's grid with
    ``eta = 1`` is DDPM, with fewer ``eta`` or steps DDIM, and on a flow policy its stochastic counterpart with the same
    marginals; stds are floored in order to explore.

    Attributes of Config:
        num_steps: Steps K of the chain. tuned_steps: The last K' of them are fine-tuned; null: all.
        eta: Share of fresh noise while exploring. eval_eta: In evaluation and deployment, without any floor.
        min_std: Floor of the exploring std. min_logprob_std: Floor of the std with which steps are scored; null: ``min_std``.
        gamma_denoising: Discount of the advantage for each step before the last.
        clip: Clip range of the last step. clip_base: Of the noisiest tuned step, exponential between with ``clip_rate``; null:
            the same for all.
        reduce: Log-probabilities of a step are averaged or summed over the executed entries. The clip means nothing without it.
        log_prob_range: Clamp of the log-density of each entry; null: none. The published -5, 2 leaves an entry beyond 3.6 std,
            and with floors below .054 every entry, without gradient.
    """

    class Config(base.Config):
        num_steps: int = pydantic.Field(default=10, ge=1)
        tuned_steps: int | None = pydantic.Field(default=5, ge=1)
        eta: float = pydantic.Field(default=1.0, ge=0, le=1)
        eval_eta: float = pydantic.Field(default=0.0, ge=0, le=1)
        min_std: float = pydantic.Field(default=0.1, gt=0)
        min_logprob_std: float | None = pydantic.Field(default=None, gt=0)
        gamma_denoising: float = pydantic.Field(default=0.99, gt=0, le=1)
        clip: float = pydantic.Field(default=0.05, gt=0)
        clip_base: float | None = pydantic.Field(default=None, gt=0)
        clip_rate: float = pydantic.Field(default=3.0, gt=0)
        reduce: Literal["mean", "sum"] = "mean"
        log_prob_range: tuple[float, float] | None = None

        @pydantic.model_validator(mode="after")
        def _fits(self) -> Self:
            if self.tuned_steps is not None and self.tuned_steps > self.num_steps:
                raise ValueError(f"tuned_steps {self.tuned_steps} of a chain of {self.num_steps} steps; lower it")
            return self

    def __init__(self, config: DPPO.Config, policy: Policy) -> None:
        self.config = config
        self.num_tuned = config.tuned_steps or config.num_steps
        self.times: tuple[float, ...] = tuple(policy.path.grid(config.num_steps).tolist())
        super().__init__(config, policy)
        self.tuned = list(itertools.pairwise(self.times[config.num_steps - self.num_tuned :]))

    def tunable(self, policy: Policy) -> Policy:
        changes: dict[str, object] = {"sampler": ddim(policy, self.config.num_steps, self.config.eval_eta)}
        boundary = self.times[self.config.num_steps - self.num_tuned]
        frozen = policy.config.frozen_above
        if frozen is not None and abs(frozen - boundary) > 1e-6:
            raise ConfigError(
                f"method dppo: this checkpoint was fine-tuned below t = {frozen:.3g} only, and num_steps {self.config.num_steps} "
                f"with tuned_steps {self.num_tuned} starts at {boundary:.3g}; keep the settings of its first fine-tuning"
            )
        if self.num_tuned < self.config.num_steps:
            changes["frozen_above"] = boundary
        return policy.varied(**changes)

    @property
    def weights(self) -> Tensor:
        """``gamma_denoising^(K' - 1 - i) / K'``, the noisiest step first: the mean over steps is that of the published loss."""
        discounts = self.config.gamma_denoising ** torch.arange(self.num_tuned - 1, -1, -1, dtype=torch.float32)
        return discounts / self.num_tuned

    @property
    def clips(self) -> Tensor:
        return clip_schedule(self.num_tuned, self.config.clip, self.config.clip_base, self.config.clip_rate)

    @torch.no_grad()
    def act(self, ctx: Tensor, generator: torch.Generator) -> Acted:
        policy = self.policy
        noise = randn((len(ctx), policy.horizon, policy.action_transform.dim), generator, device=ctx.device)
        x = policy.path.prior(policy.config.initial_noise * noise)
        chain = [x]
        for t, u in itertools.pairwise(self.times):
            x = self.step(policy, x, t, u, ctx).floored(self.config.min_std).sample(generator)
            chain.append(x)
        return Acted(x, {"chain": torch.stack(chain[-self.num_tuned - 1 :], dim=1)})

    def step(self, policy: Policy, x: Tensor, t: float, u: float, ctx: Tensor) -> StepDist:
        """The distribution of the state at ``u``: the same function samples and scores."""
        pred = policy.field(x, x.new_full((len(x),), t), ctx)
        return step_dist(policy.path, pred, x, t, u, self.config.eta, clip=policy.sampler.clip)

    def score(self, ctx: Tensor, record: Record) -> Tensor:
        chain, floor = record["chain"], self.config.min_logprob_std or self.config.min_std
        steps = [
            self.step(self.policy, chain[:, i], t, u, ctx).log_prob(chain[:, i + 1], floor) for i, (t, u) in enumerate(self.tuned)
        ]
        entries = torch.stack(steps, dim=1)[:, :, self.policy.executed].flatten(2)  # [M, K', rows x A]
        if self.config.log_prob_range is not None:
            entries = entries.clamp(*self.config.log_prob_range)
        return entries.mean(-1) if self.config.reduce == "mean" else entries.sum(-1)

    def divergence(self, ctx: Tensor, record: Record) -> Tensor:
        chain, total = record["chain"], ctx.new_zeros(())
        for i, (t, u) in enumerate(self.tuned):
            new = self.step(self.policy, chain[:, i], t, u, ctx).floored(self.config.min_std)
            with torch.no_grad():
                old = self.step(self.base, chain[:, i], t, u, ctx)
            total = total + (0.5 * ((new.mean - old.mean) / new.std) ** 2)[:, self.policy.executed].mean()
        return total


def clip_schedule(num: int, clip: float, clip_base: float | None, rate: float) -> Tensor:
    """``e_i = base + (clip - base) (exp(rate i / (num - 1)) - 1) / (exp(rate) - 1)``: noisy steps move less. ``[num]``."""
    if clip_base is None or num == 1:
        return torch.full((num,), clip)
    u = torch.arange(num, dtype=torch.float64) / (num - 1)
    return (clip_base + (clip - clip_base) * torch.expm1(rate * u) / math.expm1(rate)).float()
