"""What all methods of distillation share.

A student lives on the linear path ``x_t = (1 - t) x0 + t eps``. There its network is a flow map ``f(x, t, u)``: the jump from
``t`` to ``u <= t`` is ``X(x, t -> u) = x + (u - t) f(x, t, u)``, and ``f(x, t, t)`` is the velocity. A network without
``policy.target_time`` knows the velocity only, or one jump that its method has taught it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from robopolicy import config as base
from robopolicy.distill.teacher import Teacher, draws
from robopolicy.errors import ConfigError
from robopolicy.generative.losses import draw_times
from robopolicy.generative.path import broadcast_time
from robopolicy.generative.sampler import randn
from robopolicy.policy import Policy, PolicyConfig

JUMP: Mapping[str, Any] = {"prediction": "flow", "target_time": True, "sampler": {"type": "jump", "num_steps": 1}}


class Samples(NamedTuple):
    """A batch.

    Attributes:
        obs: Observations of student and teacher, ``name -> [B, n_obs_steps, *shape]``.
        noise: Unit noise that the teacher started from, ``[B, H, A]``; zeros where ``clean`` is not the teacher's.
        clean: Normalised chunks ``[B, H, A]``: what the teacher makes of that noise, or the demonstrated actions.
        keep: 1 for rows that count, 0 for padded ones, ``[B, H, 1]``; None: all count.
    """

    obs: Mapping[str, Tensor]
    noise: Tensor
    clean: Tensor
    keep: Tensor | None


class Models(NamedTuple):
    """The student, its running average (a target: no gradient reaches it), and the teacher."""

    student: Policy
    average: Policy
    teacher: Teacher


class Method(ABC):
    """A method: settings of the student's policy, and a loss. Subclasses have a nested ``Config``.

    Attributes:
        DEFAULTS: What its runs start from, below the command line; a partial ``DistillConfig``.
        OF_DRAWS: What the student's policy has instead where the teacher's chunks are draws, no function of its noise (rules
            ``and`` and ``or``). None: it cannot learn from those.
        ASKS_FLOW: Whether it asks for the teacher's velocity besides its samples.
    """

    Config: ClassVar[type[base.Config]]
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    OF_DRAWS: ClassVar[Mapping[str, Any] | None] = None
    ASKS_FLOW: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def from_data(self) -> bool:
        """Whether it learns from demonstrated actions instead of the teacher's."""
        return bool(getattr(self.config, "source", "teacher") == "data")

    @property
    def times(self) -> tuple[float, ...] | None:
        """The only times at which the student's network is trained; None: everywhere. A sampler must not stop at others."""
        return None

    def check(self, teacher: Teacher, student: PolicyConfig) -> None:
        """Raises ConfigError for a teacher that it cannot learn from, or not by such a student."""
        if self.from_data:
            return
        if teacher.draws and self.OF_DRAWS is None:
            raise ConfigError(
                "a composition by rule and/or draws its chunks, so they are no function of the first noise, which this method "
                "learns; distil it by --method reflow, which learns its samples, and then that student by this one"
            )
        if self.ASKS_FLOW and not teacher.flows:
            raise ConfigError(
                "the teacher's sampler walks in a way of its own, and this method asks for the field alone; take --method "
                "same_noise or reflow, which learn from its samples"
            )

    def policy_for(self, teacher: Policy) -> Mapping[str, Any]:
        """What the student of this teacher has: :meth:`policy`, and where its chunks are draws :attr:`OF_DRAWS`."""
        return {**self.policy(), **((self.OF_DRAWS or {}) if draws(teacher) else {})}

    @abstractmethod
    def policy(self) -> Mapping[str, Any]:
        """What the student's policy has besides ``path: flow``: prediction, sampler, whether it hears the target time."""

    @abstractmethod
    def loss(self, batch: Samples, models: Models, generator: torch.Generator) -> Tensor:
        """The loss of a batch, a scalar."""


def direction(policy: Policy, x: Tensor, t: Tensor, u: Tensor, ctx: Tensor) -> Tensor:
    """``f(x, t, u) [B, H, A]`` of a policy with ``target_time``, for times ``[B]``."""
    x_in, t_in = policy.path.net_input(x, t)
    gap = t_in - policy.path.net_time(u).to(t_in.dtype)
    return policy.denoise(x_in, t_in, ctx, gap).to(x.dtype)


def jump(policy: Policy, x: Tensor, t: Tensor, u: Tensor, ctx: Tensor) -> Tensor:
    """``X(x, t -> u)`` of a policy with ``target_time``."""
    return x + broadcast_time(u - t, x) * direction(policy, x, t, u, ctx)


def noised(batch: Samples, t: Tensor, generator: torch.Generator, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The state at ``t [B]`` of the clean chunks under fresh noise, and its velocity ``eps - x0``; both ``[B, H, A]``.

    ``scale`` is of the noise: that of the student, where it learns the flow of a teacher, puts the states where the teacher's
    walks from such noise go. Learnt from data alone, the flow is that of unit noise, whatever it is sampled from.
    """
    eps = scale * randn(batch.clean.shape, generator, device=batch.clean.device, dtype=batch.clean.dtype)
    time = broadcast_time(t, batch.clean)
    return (1 - time) * batch.clean + time * eps, eps - batch.clean


def times(batch: Samples, policy: Policy, generator: torch.Generator) -> Tensor:
    """A time for each chunk, as ``policy.loss.time`` says, float64 ``[B]``."""
    drawn = draw_times((len(batch.clean),), policy.path, policy.config.loss, generator)
    return drawn.to(batch.clean.device)


def mean_square(error: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of the squared error ``[B, H, A]`` over the entries that count."""
    if keep is None:
        return error.square().mean()
    return (error.square() * keep).sum() / (keep.sum() * error.shape[-1]).clamp_min(1)


def pseudo_huber(error: Tensor) -> Tensor:
    """Mean over chunks of ``sqrt(|d|^2 + c^2) - c`` with ``c = .00054 sqrt(H A)`` (Song & Dhariwal 2023, arXiv 2310.14189)."""
    squared = error.square().flatten(1).sum(1)
    c = 0.00054 * (error[0].numel()) ** 0.5
    return ((squared + c**2).sqrt() - c).mean()
