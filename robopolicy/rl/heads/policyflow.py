"""PolicyFlow: a Gaussian tail behind a deterministic sampler, and its ratio from the velocity at one time (arXiv 2602.01156)."""

from __future__ import annotations

import math
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from robopolicy import config as base
from robopolicy.generative.path import broadcast_time
from robopolicy.generative.sampler import StepDist, clip_pred, randn
from robopolicy.policy import Policy
from robopolicy.rl.heads.base import Acted, Head, Record, ddim


class PolicyFlow(Head):
    """``action = f(z) + delta`` with ``delta ~ N(0, std^2)``; what an update does to ``f`` is read from its velocity at one time.

    With ``z_tau = x / (alpha + sigma)`` and ``tau = sigma / (alpha + sigma)`` every path is straight, and a deterministic step is
    ``z_tau' = z_tau + (tau' - tau) (eps - x0)``, from ``tau(1)`` to 0. The sum over steps is ``f``; so, to first order and as
    long as a step does not carry on what an earlier one changed, an update moves ``f(z)`` by

        ``- sum_k (tau_k - tau_{k+1}) (u_new - u_old)(x_k, t_k)``,  ``u = eps - x0``,

    which is estimated at one of the sampler's times, drawn with probability ``(tau_k - tau_{k+1}) / tau(1)``, as
    ``-tau(1) (u_new - u_old)``. On the linear path all times are equally likely, ``tau(1)`` is 1, and ``-u`` is the published
    velocity, whose time runs the other way. States ``x_k`` are put on the straight line between ``z`` and ``f(z)``.

    Attributes of Config:
        num_steps: Steps of the deterministic sampler.
        std: Initial std of the tail, in normalised units; learned, one for each action dimension, if ``learn_std``.
        reg: Weight of the published regulariser, see :meth:`penalty`; it widens the policy and keeps it from narrow targets.
        clip: Clip range. reduce: Log-densities are summed or averaged over the executed entries.
    """

    class Config(base.Config):
        num_steps: int = pydantic.Field(default=10, ge=1)
        std: float = pydantic.Field(default=0.1, ge=math.exp(-5), le=math.exp(2))
        learn_std: bool = True
        reg: float = pydantic.Field(default=0.0, ge=0)
        clip: float = pydantic.Field(default=0.2, gt=0)
        reduce: Literal["mean", "sum"] = "sum"

    def __init__(self, config: PolicyFlow.Config, policy: Policy) -> None:
        self.config = config
        super().__init__(config, policy)
        self.log_std = nn.Parameter(torch.full((policy.action_transform.dim,), math.log(config.std)), config.learn_std)
        self.to(policy.device)
        times = policy.path.grid(config.num_steps)
        alpha, sigma = policy.path.coefficients(times)
        tau = sigma / (alpha + sigma)
        self.times, self.shares, self.length = times[:-1], tau[:-1] - tau[1:], tau[0].item()

    def tunable(self, policy: Policy) -> Policy:
        return policy.varied(sampler=ddim(policy, self.config.num_steps))

    @property
    def std(self) -> Tensor:
        """Std of the tail ``[A]``."""
        return self.log_std.clamp(-5, 2).exp()

    @torch.no_grad()
    def act(self, ctx: Tensor, generator: torch.Generator) -> Acted:
        policy = self.policy
        noise = policy.config.initial_noise * randn((len(ctx), policy.horizon, len(self.log_std)), generator, device=ctx.device)
        end = policy.sampler.sample(policy.field, ctx, policy.path.prior(noise), path=policy.path).x0
        delta = self.std * randn(end.shape, generator, device=ctx.device)
        return Acted(end + delta, {"noise": noise, "end": end, "delta": delta})

    @torch.no_grad()
    def prepare(self, ctx: Tensor, record: Record, generator: torch.Generator) -> Record:
        """Draws a time ``t [M]`` for each chunk, and stores the old policy's velocity ``[M, H, A]`` there."""
        drawn = torch.multinomial(self.shares.to(generator.device), len(ctx), replacement=True, generator=generator)
        record = {**record, "t": self.times[drawn.cpu()].to(ctx.device)}
        return super().prepare(ctx, {**record, "velocity": self.velocity(self.policy, ctx, record)}, generator)

    def state(self, record: Record) -> Tensor:
        """The state ``[M, H, A]`` at the drawn time, on the line from the noise to the sampler's chunk."""
        return self.policy.path.perturb(record["end"], record["noise"], record["t"])

    def velocity(self, policy: Policy, ctx: Tensor, record: Record) -> Tensor:
        """``eps - x0`` as the sampler sees it there: with its clip, without which that of ``eps`` networks explodes at t = 1."""
        x, t = self.state(record), record["t"]
        pred = clip_pred(policy.path, policy.field(x, t, ctx), x, t, policy.sampler.clip)
        return pred.eps - pred.x0

    def score(self, ctx: Tensor, record: Record) -> Tensor:
        shift = -self.length * (self.velocity(self.policy, ctx, record) - record["velocity"])
        log_prob = StepDist(shift, self.std).log_prob(record["delta"])[:, self.policy.executed].flatten(1)
        return (log_prob.mean(-1) if self.config.reduce == "mean" else log_prob.sum(-1))[:, None]

    def entropy(self, ctx: Tensor, record: Record) -> Tensor | None:
        return self.std.log().mean() + 0.5 * math.log(2 * math.pi * math.e) if self.config.learn_std else None

    def penalty(self, ctx: Tensor, record: Record) -> Tensor | None:
        """``reg`` times the mean of ``(tau u_new + eps_old)^2`` over executed rows.

        The velocity that widens a density fastest is minus its score, ``eps / tau``, in the direction of falling ``tau``: hence
        ``-tau u`` is drawn to ``eps_old``. Published as ``MSE((1 - s) v_new, x - s v_old)`` with ``s = 1 - t`` and ``v = -u``.
        """
        if self.config.reg == 0:
            return None
        path, t, x = self.policy.path, record["t"], self.state(record)
        alpha, sigma = path.coefficients(t)
        scaled = broadcast_time(sigma / (alpha + sigma), x) * self.velocity(self.policy, ctx, record)
        noise = path.predict(x, t, record["velocity"], "flow").eps
        return self.config.reg * (scaled + noise).square()[:, self.policy.executed].mean()

    def divergence(self, ctx: Tensor, record: Record) -> Tensor:
        """KL of the tail at the shifted endpoint to that of the base with the present std, which is not pulled."""
        with torch.no_grad():
            old, std = self.velocity(self.base, ctx, record), self.std
        shift = self.length * (self.velocity(self.policy, ctx, record) - old)
        return (0.5 * (shift / std) ** 2)[:, self.policy.executed].mean()
