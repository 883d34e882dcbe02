"""``Teacher``: any policy, asked for its own samples from given noise, or for its velocity on the linear path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robopolicy.config import component
from robopolicy.errors import ConfigError
from robopolicy.generative.path import LinearFlow, broadcast_time
from robopolicy.generative.sampler import DDIM, DDPM, SAMPLERS, Consistency, Sampler, clip_pred
from robopolicy.policy import Policy

_LINEAR = LinearFlow()


class Teacher:
    """A policy that is copied.

    Args:
        policy: The teacher: diffusion or flow, fine-tuned or composed.
        sampler: How it is sampled, instead of its own; it must be a function of its first noise.

    Raises:
        ConfigError: The sampler draws noise on the way and has no counterpart that does not.

    Attributes:
        calls: Network calls that were made for one chunk each, so far.
    """

    def __init__(self, policy: Policy, sampler: Mapping[str, Any] | None = None) -> None:
        self.policy = policy.eval().requires_grad_(False)
        self.sampler = policy.sampler if sampler is None else _build(sampler)
        if sampler is None:
            self.sampler = deterministic(self.sampler, policy)
        elif deterministic(self.sampler, policy) is not self.sampler:
            raise ConfigError(f"teacher_sampler {dict(sampler)} draws noise on the way; use eta: 0, noise: 0 or another sampler")
        self.networks = networks(policy)
        self.calls = 0

    @property
    def nfe(self) -> int:
        """Network calls for a chunk."""
        return self.networks * self.sampler.nfe(self.policy.path)

    @torch.no_grad()
    def encode(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Its context ``[B, C]`` of observations, of which it may need only some."""
        with torch.autocast(self.policy.device.type, enabled=False):
            return self.policy.encode({name: obs[name] for name in self.policy.observation_features})

    @torch.no_grad()
    def sample(self, ctx: Tensor, noise: Tensor) -> Tensor:
        """The normalised chunks ``[B, H, A]`` that it makes of unit ``noise [B, H, A]``."""
        self.calls += len(noise) * self.nfe
        policy = self.policy
        x = policy.path.prior(policy.config.initial_noise * noise)
        with torch.autocast(policy.device.type, enabled=False):
            return self.sampler.sample(policy.field, ctx, x, path=policy.path).x0

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        """``eps - x0 [B, H, A]`` that it sees in states ``x [B, H, A]`` on the LINEAR path at ``t [B]``.

        The state is carried to the teacher's path at the same noise level ``sigma / alpha``. A path that ends at a finite level
        (EDM) is asked at its end for all beyond. Where the sampler clips the clean chunk, so does this.
        """
        self.calls += len(x) * self.networks
        path, t = self.policy.path, t.double()
        with torch.autocast(self.policy.device.type, enabled=False):
            if isinstance(path, LinearFlow):
                theirs, there = t, x
            else:
                theirs = path.t_of(_LINEAR.noise_level(t))
                alpha, sigma = path.coefficients(theirs)
                there = x * broadcast_time(alpha + sigma, x)
            pred = self.policy.field(there, theirs, ctx)
            pred = clip_pred(path, pred, there, theirs, self.sampler.clip)
        return pred.eps - pred.x0

    def step(self, x: Tensor, t: Tensor, u: Tensor, ctx: Tensor, order: int = 2) -> Tensor:
        """The state at ``u <= t`` (each ``[B]``) to which its flow carries ``x`` at ``t``, on the linear path, by one step.

        ``order`` 2 is Heun's method, which falls back to Euler's for the step to ``u = 0``, as its sampler does.
        """
        velocity = self.velocity(x, t, ctx)
        ahead = x + broadcast_time(u - t, x) * velocity
        if order == 1:
            return ahead
        there = self.velocity(ahead, u.clamp_min(1e-6), ctx)
        mean = torch.where(broadcast_time(u, x) > 1e-9, (velocity + there) / 2, velocity)
        return x + broadcast_time(u - t, x) * mean


def deterministic(sampler: Sampler, policy: Policy) -> Sampler:
    """The sampler, or its counterpart without noise on the way. Raises ConfigError when it has none."""
    if isinstance(sampler, DDPM):
        return DDIM(DDIM.Config(num_steps=sampler.num_steps(policy.path), clip=sampler.clip))
    if isinstance(sampler, DDIM) and sampler.eta > 0:
        return type(sampler)(sampler.config.model_copy(update={"eta": 0.0}))
    redraws = isinstance(sampler, Consistency) and sampler.config.noise > 0 and sampler.config.num_steps > 1
    if redraws or sampler.eta > 0:
        raise ConfigError(
            f"the teacher's sampler {policy.config.sampler} draws noise on the way, so its chunks are no function of its first "
            "noise; give another, for example --teacher-sampler '{type: euler, num_steps: 10}'"
        )
    return sampler


def networks(policy: Policy) -> int:
    """Networks that one evaluation of its field asks: more than one for a composed policy."""
    parents = getattr(policy, "parents", None)
    return 1 if parents is None else sum(networks(parent) for parent in parents)


def _build(value: Mapping[str, Any]) -> Sampler:
    cls, config = component("sampler", value, SAMPLERS)
    sampler: Sampler = cls(config)
    return sampler
