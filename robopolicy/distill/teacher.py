"""``Teacher``: any policy, asked for its own samples from given noise, or for its velocity on the linear path.

A superposition (AND, OR) draws noise on the way: its samples can be learnt, but they are no function of the first noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robopolicy.compose.superpose import SUPERPOSE, Superpose
from robopolicy.config import component
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import OnPath
from robopolicy.generative.path import LinearFlow, broadcast_time
from robopolicy.generative.sampler import DDIM, DDPM, SAMPLERS, DPMSolver, Generators, Sampler, clip_pred
from robopolicy.policy import Policy

_LINEAR = LinearFlow()


class Teacher:
    """A policy that is copied.

    Args:
        policy: The teacher: diffusion or flow, fine-tuned or composed.
        sampler: How it is sampled, instead of its own: a function of its first noise; of a superposition, one of the same mode.

    Raises:
        ConfigError: The sampler draws noise on the way and has no counterpart that does not, or what the policy's own
            adds on its way would be lost.

    Attributes:
        calls: Network calls that were made for one chunk each, so far.
        draws: Whether its chunks are draws, no function of its first noise: those of a superposition.
        flows: Whether its sampler walks its field as it is; one with a walk of its own may add to it on the way.
    """

    def __init__(self, policy: Policy, sampler: Mapping[str, Any] | None = None) -> None:
        self.policy = policy.eval().requires_grad_(False)
        self.sampler = _deterministic(policy) if sampler is None else _build(sampler)
        self.draws, self.flows = draws(policy), not self.sampler.own_walk
        if isinstance(policy.sampler, Superpose) and _mode(self.sampler) != _mode(policy.sampler):
            raise ConfigError(
                f"the teacher is a composition by rule '{_mode(policy.sampler)}', which is a way of sampling: by sampler "
                f"'{dict(sampler or {}).get('type')}' it would be the plain mean; drop --teacher-sampler, or give "
                f"'{{type: {SUPERPOSE}, mode: {_mode(policy.sampler)}, num_steps: 30}}'"
            )
        if not self.sampler.keeps(policy.sampler):
            own = policy.config.sampler["type"]
            raise ConfigError(
                f"the teacher's sampler '{own}' walks in a way of its own, and what it adds is lost with sampler "
                f"'{dict(sampler or {}).get('type')}'; drop --teacher-sampler, or give one of type {own}"
            )
        self.on_linear = OnPath(policy.field, policy.path, _LINEAR)
        self.networks, self.calls = policy.networks, 0
        try:
            noise = torch.zeros(1, policy.config.horizon, policy.action_transform.dim)
            self.sample(torch.zeros(1, policy.ctx_dim), noise, torch.Generator().manual_seed(0) if self.draws else None)
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
    def sample(self, ctx: Tensor, noise: Tensor, generator: Generators | None = None) -> Tensor:
        """The normalised chunks ``[B, H, A]`` that it makes of unit ``noise [B, H, A]``, and, if it :attr:`draws`, of more."""
        self.calls += len(noise) * self.nfe
        policy = self.policy
        with torch.autocast(policy.device.type, enabled=False):
            return policy.walk(policy.start(noise), ctx, generator, sampler=self.sampler).x0

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


def draws(policy: Policy) -> bool:
    """Whether the policy is a superposition, which is not what it is without the noise that it draws on the way."""
    return isinstance(policy.sampler, Superpose)


def _mode(sampler: Sampler) -> str | None:
    return sampler.config.mode if isinstance(sampler, Superpose) else None


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
