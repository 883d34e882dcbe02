"""AND and OR: superposition of several parents' fields while sampling (Skreta et al. 2024, arXiv 2412.17762).

In coordinates ``x / alpha`` at noise level ``s = sigma / alpha`` parent ``i`` sees the noise ``e_i``, and the reverse diffusion
``dx = 2 ds sum_i k_i e_i + n`` may mix them by any ``k`` that sums to 1. How likely the result is to parent ``i`` can be added
up on the way: ``dlog q_i = -(|ds| / s) |e_i|^2 - <dx, e_i> / s`` (Ito; the released code of OR has the first sign wrong).

* ``or``: ``k = softmax(temperature log q)``: a chunk that one parent finds likely.
* ``and``: ``k`` such that all ``log q`` stay equal: a chunk that all parents find equally likely. That is the same as to drop the
  part of the noise ``n`` along which the parents disagree, and to walk to the point at the same distance from all ``e_i``,
  for two parents their mean. Written so, nothing is divided by a vanishing disagreement.

What the noise alone does, a plain field by the same stochastic sampler says: ``ddim`` with ``eta = 1``.

The step is the stochastic one of every sampler (:func:`robopolicy.generative.sampler.step_dist`, ``eta = 1``), for which
``2 |ds|`` above reads ``(s_t^2 - s_u^2) / s_t``: it stands the long steps from infinite noise, which Euler's would not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, Protocol

import pydantic
import torch
from torch import Tensor

from robopolicy.config import Config
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Field
from robopolicy.generative.path import Path, Pred, broadcast_time
from robopolicy.generative.sampler import (
    DDIM,
    Generators,
    SampleResult,
    Time,
    clip_pred,
    randn,
    step_dist,
)

SUPERPOSE = "robopolicy.compose.superpose:Superpose"  # the type by which configs name it

Mode = Literal["and", "or"]


class Parents(Protocol):
    """Several fields on one path that can be asked one by one."""

    def each(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> list[Pred]:
        """What every parent sees, each ``[B, H, A]``."""
        ...


class Superpose(DDIM):
    """Samples the AND or the OR of a composition's parents.

    Attributes of Config:
        mode: As above.
        num_steps: Steps; 30 or more, the estimate of ``log q`` is one of small steps.
        clip: Bound of the mixed ``x0``.
        temperature: Of the softmax in mode ``or``.
    """

    class Config(Config):
        mode: Mode = "and"
        num_steps: int = pydantic.Field(default=50, ge=1)
        clip: float | None = pydantic.Field(default=1.0, gt=0)
        temperature: float = pydantic.Field(default=1.0, ge=0)

    eta = 1.0
    superposes = True  # planners that would put a field of their own around the parents cannot

    def __init__(self, config: Superpose.Config | None = None) -> None:
        self.config: Superpose.Config = config or Superpose.Config()  # type: ignore[assignment]

    def sample(
        self,
        field: Field | Parents,
        ctx: Tensor,
        x_init: Tensor,
        *,
        path: Path,
        generator: Generators | None = None,
        t_start: float = 1.0,
        record: bool = False,
        times: Tensor | None = None,
    ) -> SampleResult:
        """As :meth:`robopolicy.generative.sampler.Sampler.sample`, of a field that has ``each``; ConfigError for others."""
        each = getattr(field, "each", None)
        if each is None:
            raise ConfigError(
                f"sampler 'superpose' asks the parents of a composed policy one by one, and {type(field).__name__} has none; "
                "use sampler ddim, or compose with rule convex"
            )
        if times is None:
            times = torch.tensor(self.times(path, t_start), dtype=torch.float64)
        stops: Sequence[Time] = times.tolist() if times.ndim == 1 else list(times)
        x, chain, log_q = x_init, [x_init], None
        for t, u in itertools.pairwise(stops):
            now = torch.as_tensor(t, dtype=torch.float64, device=x.device)
            seen: list[Pred] = each(x, (now.expand(len(x)) if now.ndim == 0 else now).to(x.dtype), ctx)
            eps = torch.stack([pred.eps for pred in seen])
            if log_q is None:
                log_q = eps.new_zeros(eps.shape[:2])
            share = self._shares(eps.flatten(2), log_q)[:, :, None, None]
            mixed = Pred((share * torch.stack([pred.x0 for pred in seen])).sum(0), (share * eps).sum(0))
            dist = step_dist(path, clip_pred(path, mixed, x, t, self.clip), x, t, u, self.eta)
            after = dist.mean
            if isinstance(dist.std, Tensor) or dist.std > 0:
                noise = dist.std * randn(x.shape, generator, device=x.device, dtype=x.dtype)
                after = after + (self._agreed(noise, eps) if self.config.mode == "and" else noise)
            log_q = log_q + _log_q_change(path, x, after, now, torch.as_tensor(u, dtype=torch.float64, device=x.device), eps)
            x = after
            if record:
                chain.append(x)
        return SampleResult(x, torch.stack(chain) if record else None, times, len(stops) - 1)

    def _shares(self, eps: Tensor, log_q: Tensor) -> Tensor:
        """``k [N, B]`` for ``eps [N, B, H A]`` and ``log_q [N, B]``; sums to 1 over the parents."""
        if self.config.mode == "or":
            return torch.softmax(self.config.temperature * log_q, dim=0)
        equal = torch.full_like(log_q, 1 / len(log_q))
        if len(log_q) == 2:
            return equal
        # Same distance from all e_i, within the plane through them: solve <e - e_1, e_i - e_1> = |e_i - e_1|^2 / 2.
        apart = (eps[1:] - eps[:1]).transpose(0, 1)  # [B, N - 1, H A]
        gram = apart @ apart.transpose(1, 2)
        others = _solve(gram, 0.5 * torch.diagonal(gram, dim1=1, dim2=2)[:, :, None])[:, :, 0].T
        return torch.cat([1 - others.sum(0, keepdim=True), others])

    def _agreed(self, noise: Tensor, eps: Tensor) -> Tensor:
        """The noise without its part in the directions in which the parents differ."""
        apart = (eps[1:] - eps[:1]).flatten(2).transpose(0, 1)
        part = _solve(apart @ apart.transpose(1, 2), apart @ noise.flatten(1)[:, :, None])
        return noise - (apart.transpose(1, 2) @ part)[:, :, 0].unflatten(1, noise.shape[1:])


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Solution for symmetric ``gram [B, n, n]``, kept away from singular: parents that agree (nearly) differ in no direction."""
    size = torch.diagonal(gram, dim1=1, dim2=2).sum(1)[:, None, None]
    return torch.linalg.solve(
        gram + (1e-6 * size + 1e-12) * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device), right
    )


def _log_q_change(path: Path, x: Tensor, after: Tensor, t: Tensor, u: Tensor, eps: Tensor) -> Tensor:
    """``dlog q [N, B]`` of a step from ``x`` at ``t`` to ``after`` at ``u``; finite also from infinite noise (``alpha = 0``)."""
    (a, b), (c, d) = path.coefficients(t), path.coefficients(u)
    ratio = torch.where(b > 0, d * a / (c * b).clamp_min(1e-300), 0.0)  # s_u / s_t
    moved = after * broadcast_time(a / (b * c), x) - x * broadcast_time(1 / b, x)  # dx / s_t in coordinates x / alpha
    spread = broadcast_time(0.5 * (1 - ratio**2), x)
    return -(spread * eps.square() + moved * eps).sum((2, 3))
