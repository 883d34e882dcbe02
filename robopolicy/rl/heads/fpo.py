"""FPO and FPO++: the ratio from denoising losses, so that any sampler may explore (arXiv 2507.21053, arXiv 2602.02481).

The denoising loss bounds the likelihood of an action from one side; the difference of the old and the new loss, at the same
noises and times, stands for the logarithm of the ratio. Nothing about the sampler enters.
"""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from robopolicy import config as base
from robopolicy.errors import ConfigError
from robopolicy.generative.losses import draw_times
from robopolicy.generative.sampler import randn
from robopolicy.policy import Policy
from robopolicy.rl.heads.base import Acted, Head, Record


class FPO(Head):
    """``log ratio = old loss - new loss`` of the executed chunk at ``num_samples`` pairs of noise and time, the same all along.

    At the old weights the gradient of the surrogate is that of a denoising loss weighted by advantages. The losses are not
    divided by the variance of the policy: for a narrow policy, as imitation makes them, a small difference of losses is a large
    one of densities, which is why ``clip`` is a tenth of what Gaussian steps bear.

    Works on every path and for every prediction. Times are drawn as in the policy's own training; its ``loss.weighting`` is not
    applied.

    Attributes of Config:
        num_samples: Pairs N of noise and time for each chunk.
        per_sample: False is FPO: one ratio, of the mean difference. True is FPO++: N ratios, each clipped by itself, averaged.
        loss: ``mse``, or ``huber`` with ``huber_delta`` (half the square below it, linear above).
        target: ``own``: error of what the network predicts; ``eps``: error of the noise that its prediction stands for. On the
            linear path with a velocity network the latter is ``(1 - t)^2`` times the former, because ``eps = x + (1 - t) v``.
        reduce: Mean over the executed rows and dimensions, or sum over the executed rows of the mean over dimensions (FPO++).
        loss_clamp: Upper bound of each loss, old and new; gradients pass. Null: none.
        log_ratio_clamp: Bound of the magnitude of the log-ratio; gradients pass. Null: none.
        clip: Clip range.
        num_steps: Steps of the sampler; null: as in the checkpoint.
        zero_noise: Evaluate and deploy from no initial noise, as FPO++ does; exploration starts from unit noise then.
        perturb_std: Noise added to the chunk while exploring; what is scored is the perturbed chunk.
    """

    class Config(base.Config):
        num_samples: int = pydantic.Field(default=8, ge=1)
        per_sample: bool = False
        loss: Literal["mse", "huber"] = "mse"
        huber_delta: float = pydantic.Field(default=1.0, gt=0)
        target: Literal["own", "eps"] = "own"
        reduce: Literal["mean", "sum_steps"] = "mean"
        loss_clamp: float | None = pydantic.Field(default=None, gt=0)
        log_ratio_clamp: float | None = pydantic.Field(default=None, gt=0)
        clip: float = pydantic.Field(default=0.003, gt=0)
        num_steps: int | None = pydantic.Field(default=None, ge=1)
        zero_noise: bool = False
        perturb_std: float = pydantic.Field(default=0.0, ge=0)

    def __init__(self, config: FPO.Config, policy: Policy) -> None:
        self.config = config
        if policy.config.initial_noise == 0 and not config.zero_noise:
            raise ConfigError(
                "method fpo: this checkpoint samples from no initial noise (policy.initial_noise 0), which is what explores; "
                "set zero_noise: true"
            )
        self.noise = 1.0 if config.zero_noise else policy.config.initial_noise
        super().__init__(config, policy)

    def tunable(self, policy: Policy) -> Policy:
        changes: dict[str, object] = {"initial_noise": 0.0} if self.config.zero_noise else {}
        if self.config.num_steps is not None:
            changes["sampler"] = {**policy.config.sampler, "num_steps": self.config.num_steps}
        return policy.varied(**changes)

    @property
    def weights(self) -> Tensor:
        """``1 / N`` for each pair, or 1 for their mean: either way the mean over pairs."""
        return torch.full((self.config.num_samples,), 1 / self.config.num_samples) if self.config.per_sample else torch.ones(1)

    @property
    def clips(self) -> Tensor:
        return torch.full((self.config.num_samples if self.config.per_sample else 1,), self.config.clip)

    @torch.no_grad()
    def act(self, ctx: Tensor, generator: torch.Generator) -> Acted:
        policy = self.policy
        noise = randn((len(ctx), policy.horizon, policy.action_transform.dim), generator, device=ctx.device)
        x = policy.path.prior(self.noise * noise)
        chunk = policy.sampler.sample(policy.field, ctx, x, path=policy.path, generator=generator).x0
        if self.config.perturb_std > 0:
            chunk = chunk + self.config.perturb_std * randn(chunk.shape, generator, device=ctx.device)
        return Acted(chunk, {"chunk": chunk})

    @torch.no_grad()
    def prepare(self, ctx: Tensor, record: Record, generator: torch.Generator) -> Record:
        """Draws the pairs: noises ``eps [M, N, H, A]`` and times ``t [M, N]``."""
        chunk, num = record["chunk"], self.config.num_samples
        t = draw_times((len(chunk), num), self.policy.path, self.policy.config.loss, generator).to(chunk.device)
        eps = randn((len(chunk), num, *chunk.shape[1:]), generator, device=chunk.device)
        return super().prepare(ctx, {**record, "eps": eps, "t": t}, generator)

    def errors(self, policy: Policy, ctx: Tensor, record: Record, target: Literal["own", "eps"]) -> tuple[Tensor, Tensor]:
        """What the policy predicts at the recorded pairs, and what it should have: executed rows, each ``[M, N, rows, A]``."""
        eps, t = record["eps"].flatten(0, 1), record["t"].flatten()
        num, kind = record["t"].shape[1], policy.config.prediction if target == "own" else "eps"
        x0 = record["chunk"].repeat_interleave(num, dim=0)
        pred = policy.field(policy.path.perturb(x0, eps, t), t, ctx.repeat_interleave(num, dim=0))
        pair = (policy.path.target(*pred, t, kind), policy.path.target(x0, eps, t, kind))
        seen, wanted = (y[:, policy.executed].unflatten(0, (-1, num)) for y in pair)
        return seen, wanted

    def score(self, ctx: Tensor, record: Record) -> Tensor:
        """Minus the losses, ``[M, N]`` or their mean ``[M, 1]``."""
        config = self.config
        seen, wanted = self.errors(self.policy, ctx, record, config.target)
        if config.loss == "mse":
            entries = (seen - wanted).square()
        else:
            entries = F.huber_loss(seen, wanted, reduction="none", delta=config.huber_delta)
        rows = entries.mean(-1)
        losses = rows.mean(-1) if config.reduce == "mean" else rows.sum(-1)
        if config.loss_clamp is not None:
            losses = clamp_through(losses, 0.0, config.loss_clamp)
        return -(losses if config.per_sample else losses.mean(1, keepdim=True))

    def log_ratio(self, ctx: Tensor, record: Record) -> Tensor:
        difference, bound = super().log_ratio(ctx, record), self.config.log_ratio_clamp
        return difference if bound is None else clamp_through(difference, -bound, bound)

    def divergence(self, ctx: Tensor, record: Record) -> Tensor:
        """Mean squared difference to what the base predicts, at the recorded pairs.

        The KL of the two stochastic processes that generate chunks (same marginals of the noise, ``eta = 1`` in the limit of many
        steps) is ``1/2 int |d SNR / dt| E |x0 - x0_base|^2 dt``; on the linear path with a velocity network that is
        ``int (1 - t) / t E |v - v_base|^2 dt``. This is the integral without the weight, which is infinite at ``t = 0``.
        """
        new, _ = self.errors(self.policy, ctx, record, "own")
        with torch.no_grad():
            old, _ = self.errors(self.base, ctx, record, "own")
        return (new - old).square().mean()


def clamp_through(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` within ``[low, high]``, with the gradient as if it were not clamped."""
    return x + (x.clamp(low, high) - x).detach()
