"""``Head``: the interface between the on-policy core and a method."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robopolicy import config as base
from robopolicy.generative.losses import denoising_loss
from robopolicy.policy import Policy

Record = dict[str, Tensor]


class Acted(NamedTuple):
    """An exploring policy's chunk, and what the ratio will need to know of how it came about."""

    chunk: Tensor  # [B, H, A] normalised
    record: Record  # name -> [B, ...]


class Head(nn.Module, ABC):
    """A method of policy optimisation.

    It explores (:meth:`act`), and it says how much likelier the policy of now is than the policy of then to do what was done
    (:meth:`log_ratio`), as ``R`` terms for each chunk, each with a weight and a clip of its own. Everything else (advantages,
    clipped surrogate, minibatches, value network, stopping) is the core's.

    The encoder is frozen: contexts ``[B, C]`` are computed once, when acting. All of it runs in evaluation mode, so that dropout
    cannot make the policy that is scored another one than the policy that acted.

    Args:
        config: The head's own settings.
        policy: What to improve, loaded from a checkpoint. It is copied; the head's ``policy`` is the one that learns.
    """

    class Config(base.Config):
        pass

    config: Any  # the method's own Config, set before this class's __init__; `clip` is in all of them

    def __init__(self, config: base.Config, policy: Policy) -> None:
        super().__init__()
        self.policy = self.tunable(policy).eval()
        self.policy.requires_grad_(False)
        self.policy.net.requires_grad_(True)
        self._base = [copy.deepcopy(self.policy).requires_grad_(False)]  # in a list: neither a parameter nor saved

    @property
    def base(self) -> Policy:
        """The policy before the first update, in the form that this head gave it."""
        return self._base[0]

    def tunable(self, policy: Policy) -> Policy:
        """A copy of the policy with the sampler that it shall be evaluated and deployed with; before any update it should be the
        checkpoint that came in, up to that sampler."""
        return policy.varied()

    @property
    def weights(self) -> Tensor:
        """Weight ``[R]`` of each term of the ratio in the surrogate: of a single one, 1."""
        return torch.ones(1)

    @property
    def clips(self) -> Tensor:
        """Clip range ``[R]`` of each term's ratio: of a single one, ``clip`` of the config."""
        return torch.full((1,), self.config.clip)

    @abstractmethod
    def act(self, ctx: Tensor, generator: torch.Generator) -> Acted:
        """An exploring chunk for each context ``[B, C]``, without gradients. What is recorded is what was executed, unclipped."""

    @torch.no_grad()
    def prepare(self, ctx: Tensor, record: Record, generator: torch.Generator) -> Record:
        """Add to the record, once after a roll-out and without gradients, what the old policy says of it.

        Called on slices of the roll-out; ``generator`` draws what must stay the same over all epochs (FPO's noises and times).
        """
        return {**record, "old": self.score(ctx, record)}

    @abstractmethod
    def score(self, ctx: Tensor, record: Record) -> Tensor:
        """Log-likelihood, or what stands for it, of what was done under the present weights: ``[M, R]``, with gradients."""

    def log_ratio(self, ctx: Tensor, record: Record) -> Tensor:
        """Logarithm of new to old policy ``[M, R]``, with gradients; exactly 0 before the first update."""
        return self.score(ctx, record) - record["old"]

    def entropy(self, ctx: Tensor, record: Record) -> Tensor | None:
        """Mean entropy per entry of the exploring distribution, when the method learns how much to explore."""
        return None

    def penalty(self, ctx: Tensor, record: Record) -> Tensor | None:
        """A regulariser of the method's own, already weighted."""
        return None

    @abstractmethod
    def divergence(self, ctx: Tensor, record: Record) -> Tensor:
        """How far the policy is from its base: KL per entry of the chunk, exact for Gaussian steps, with gradients; a scalar."""

    def bc_loss(self, ctx: Tensor, chunk: Tensor, is_pad: Tensor | None, generator: torch.Generator) -> Tensor:
        """Imitation loss of clean normalised chunks ``[B, H, A]``: keeps the policy near demonstrations, or near its base.

        ``is_pad [B, H]`` is True beyond the end of a demonstration.
        """
        policy = self.policy
        return denoising_loss(
            policy.denoise, policy.path, policy.config.prediction, chunk, ctx, is_pad, generator, policy.config.loss
        )

    def anneal(self, progress: float) -> None:
        """Told before each iteration how much of the training is done, 0 to 1."""


def ddim(policy: Policy, num_steps: int, eta: float = 0.0) -> dict[str, object]:
    """The sampler that walks in the very steps that a head scores; ``eta`` 0 on the linear path is Euler's."""
    return {"type": "ddim", "num_steps": num_steps, "eta": eta, "clip": policy.sampler.clip}
