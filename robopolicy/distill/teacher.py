"""``Teacher``: any policy, asked for its own samples from given noise, or for its velocity on the linear path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robopolicy.config import component
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import OnPath
from robopolicy.generative.path import LinearFlow, broadcast_time
from robopolicy.generative.sampler import DDIM, DDPM, SAMPLERS, DPMSolver, Sampler, clip_pred
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
        self.sampler = _deterministic(policy) if sampler is None else _build(sampler)
        self.on_linear = OnPath(policy.field, policy.path, _LINEAR)
        self.networks, self.calls = policy.networks, 0
        try:
            self.sample(torch.zeros(1, policy.ctx_dim), torch.zeros(1, policy.config.horizon, policy.action_transform.dim))
        except ValueError as error:  # it asked for a generator
            raise ConfigError(
                f"the teacher's sampler {dict(sampler or policy.config.sampler)} draws noise on the way, so its chunks are no "
                "function of its first noise; give another, for example --teacher-sampler '{type: euler, num_steps: 10}'"
            ) from error
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
        with torch.autocast(policy.device.type, enabled=False):
            return policy.walk(policy.start(noise), ctx, sampler=self.sampler).x0

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        """``eps - x0 [B, H, A]`` that it sees in states ``x [B, H, A]`` on the LINEAR path at ``t [B]``.

        On another path it is asked at the same noise level. Where its sampler clips the clean chunk, so does this.
        """
        self.calls += len(x) * self.networks
        with torch.autocast(self.policy.device.type, enabled=False):
            pred = clip_pred(_LINEAR, self.on_linear(x, t.double(), ctx), x, t, self.sampler.clip)
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


def _deterministic(policy: Policy) -> Sampler:
    """The policy's sampler; one of the DDIM family without the noise that it draws on the way."""
    sampler = policy.sampler
    if isinstance(sampler, DDPM):
        return DDIM(DDIM.Config(num_steps=sampler.num_steps(policy.path), clip=sampler.clip))
    if isinstance(sampler, DDIM) and type(sampler) in (DDIM, DPMSolver) and sampler.eta > 0:
        return type(sampler)(sampler.config.model_copy(update={"eta": 0.0}))
    return sampler


def _build(value: Mapping[str, Any]) -> Sampler:
    cls, config = component("sampler", value, SAMPLERS)
    sampler: Sampler = cls(config)
    return sampler
