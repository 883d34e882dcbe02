"""Samplers: how a field is walked from noise to a clean chunk.

One update rule serves all of them, :func:`step_dist`. A sampler only decides at which times to stop and how to sharpen what the
field sees before the step is taken. That makes every sampler deterministic (``eta = 0``) or stochastic, on every path, and gives
reinforcement learning its densities from the very numbers that sampling used.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self, cast

import pydantic
import torch
from torch import Tensor

from robopolicy.config import Config
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Field
from robopolicy.generative.path import Path, Pred, broadcast_time

Generators = torch.Generator | Sequence[torch.Generator]
Time = float | Tensor  # shared by the whole batch, or [B], or [B, H]


def randn(
    shape: Sequence[int],
    generator: Generators | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit Gaussian noise, drawn on the generator's device and moved to ``device``.

    Args:
        shape: Shape of the result; its first axis is the batch.
        generator: One for all, or one for each row of the batch: then a row's noise does not depend on the rows around it.
        device: Where the result lives.
        dtype: Type of the result.

    Raises:
        ValueError: No generator, or a sequence whose length is not ``shape[0]``.
    """
    if generator is None:
        raise ValueError("noise is needed but no generator was given; pass a torch.Generator or one for each row")
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; give one for each row")
    rows = [torch.randn(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(rows).to(device)


class StepDist(NamedTuple):
    """Gaussian of the next state: ``mean [B, H, A]`` and ``std`` (a number, or broadcastable to ``mean``)."""

    mean: Tensor
    std: float | Tensor

    def sample(self, generator: Generators | None) -> Tensor:
        """Draw the next state; a step whose std is the number 0 draws nothing."""
        if not isinstance(self.std, Tensor) and self.std == 0:
            return self.mean
        return self.mean + self.std * randn(self.mean.shape, generator, device=self.mean.device, dtype=self.mean.dtype)

    def floored(self, min_std: float) -> StepDist:
        """The same mean with at least ``min_std``: what makes a nearly deterministic sampler explore."""
        if isinstance(self.std, Tensor):
            return StepDist(self.mean, self.std.clamp_min(min_std))
        return StepDist(self.mean, max(self.std, min_std))

    def log_prob(self, x: Tensor, min_std: float = 0.0) -> Tensor:
        """Log-density of each entry of the next state ``x [B, H, A]``; sum over (H, A) for that of the chunk.

        Args:
            x: State that was reached.
            min_std: Floor of the std. The last step of a sampler has std 0 and no density without a floor.
        """
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device).clamp_min(min_std)
        return -0.5 * ((x - self.mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)


def clip_pred(path: Path, pred: Pred, x: Tensor, t: Time, clip: float | None) -> Pred:
    """Clip ``x0`` to ``[-clip, clip]`` and recompute ``eps = (x - alpha x0) / sigma``, so that the pair still explains ``x``.

    Needed where ``x0`` is computed from ``eps`` at ``t`` near 1: there its error is multiplied by the noise level, 2000 at the
    end of the cosine schedule. Only sensible when the normalised actions lie in the range.
    """
    if clip is None:
        return pred
    alpha, sigma, *_ = _step(path, t, t, 0.0, x)
    x0 = pred.x0.clamp(-clip, clip)
    return Pred(x0, (x - alpha * x0) / (sigma.clamp_min(1e-12) if isinstance(sigma, Tensor) else max(sigma, 1e-12)))


def step_dist(path: Path, pred: Pred, x: Tensor, t: Time, u: Time, eta: float = 0.0, *, clip: float | None = None) -> StepDist:
    """Distribution of the state at ``u`` given the state ``x`` at ``t``: the only place where means and stds are computed.

    With ``a, b`` the scales of data and noise at ``t``, ``c, d`` those at ``u <= t``, and ``r = (d / c) / (b / a)``::

        std  = eta d sqrt(1 - r^2)
        mean = c x0 + sqrt(d^2 - std^2) eps

    ``eta = 0`` is DDIM and, on the linear path, Euler's method; ``eta = 1`` is ancestral sampling (DDPM with the smaller of its
    two posterior variances). Song et al. 2021, arXiv 2010.02502, equation 12, written for any path.

    Args:
        path: Path of the state.
        pred: What the field sees in ``x``.
        x: State ``[B, H, A]`` at ``t``.
        t: Time of the state.
        u: Time to go to. A step to ``u = 0`` has std 0: it is deterministic and has no density.
        eta: Share of fresh noise in [0, 1].
        clip: Bound of ``x0``, see :func:`clip_pred`; the mean then follows the clipped pair.
    """
    x0, eps = clip_pred(path, pred, x, t, clip)
    step = _step(path, t, u, eta, x)
    return StepDist(step.to_x0 * x0 + step.to_eps * eps, step.std)


class _Step(NamedTuple):
    """Numbers of one step: floats, or tensors broadcastable to the state when rows have times of their own."""

    alpha: float | Tensor
    sigma: float | Tensor
    to_x0: float | Tensor
    to_eps: float | Tensor
    std: float | Tensor


def _step(path: Path, t: Time, u: Time, eta: float, x: Tensor) -> _Step:
    if isinstance(t, float) and isinstance(u, float):
        return _shared_step(path, t, u, eta)
    t, u = (torch.as_tensor(time, dtype=torch.float64, device=x.device) for time in (t, u))
    step = _Step(*(broadcast_time(value, x) for value in _step_numbers(path, t, u, eta)))
    return step if eta else step._replace(std=0.0)  # the number 0 tells StepDist.sample to draw nothing


@functools.lru_cache(maxsize=4096)
def _shared_step(path: Path, t: float, u: float, eta: float) -> _Step:
    """Cached: samplers walk the same few times for ever, and these float64 scalars would cost more than the step itself."""
    return _Step(*(value.item() for value in _step_numbers(path, _scalar(t), _scalar(u), eta)))


def _step_numbers(path: Path, t: Tensor, u: Tensor, eta: float) -> tuple[Tensor, ...]:
    (a, b), (c, d) = path.coefficients(t), path.coefficients(u)
    r = torch.where(b > 0, d * a / (c * b).clamp_min(1e-300), 0.0)  # a row that is clean already (b = d = 0) stays as it is
    spread = eta**2 * (1 - r**2).clamp_min(0)
    return a, b, c, d * torch.sqrt(1 - spread), d * torch.sqrt(spread)


def _rows(t: Time, x: Tensor) -> Tensor:
    """A time as fields take it: ``[B]``, or ``[B, H]`` as it came."""
    return x.new_full((x.shape[0],), t) if isinstance(t, float) else t.to(x.dtype)


def _scalar(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _grid(path: Path, num_steps: int, t_start: float) -> tuple[float, ...]:
    times: list[float] = path.grid(num_steps).tolist()
    return tuple(times) if t_start >= 1 else (t_start, *(t for t in times if t < t_start - 1e-9))


class SampleResult(NamedTuple):
    """What :meth:`Sampler.sample` returns.

    Attributes:
        x0: Clean chunk ``[B, H, A]``.
        chain: States at all times ``[K + 1, B, H, A]``, from the first to ``x0``; None unless it was asked for.
        times: The times, float64 ``[K + 1]`` (or as they were given).
        nfe: How often the field was evaluated.
    """

    x0: Tensor
    chain: Tensor | None
    times: Tensor
    nfe: int


class _Seen(NamedTuple):
    """What the previous step saw, for multi-step samplers."""

    pred: Pred
    t: Time


class Sampler(ABC):
    """Walks a field from noise to a chunk. Holds settings only: one instance may serve many threads."""

    eta: float = 0.0

    @abstractmethod
    def num_steps(self, path: Path) -> int:
        """Steps of a full walk from ``t = 1``."""

    @property
    @abstractmethod
    def clip(self) -> float | None:
        """Bound of ``x0``, see :func:`clip_pred`."""

    @property
    def own_walk(self) -> bool:
        """Whether it walks in a way of its own, and so may add to the field: a cost, a superposition."""
        return type(self).sample is not Sampler.sample

    def keeps(self, walk: Sampler) -> bool:
        """Whether what ``walk`` may add on its own way is not lost when this one takes its place."""
        return not walk.own_walk or type(self) is type(walk)

    def times(self, path: Path, t_start: float = 1.0) -> tuple[float, ...]:
        """Times of a walk from ``t_start``: the path's grid for :meth:`num_steps`, or, for a warm start, the part of it below."""
        return _grid(path, self.num_steps(path), float(t_start))

    def nfe(self, path: Path, t_start: float = 1.0) -> int:
        """Evaluations of the field in a walk from ``t_start``."""
        return self._evaluations(len(self.times(path, t_start)) - 1)

    def sample(
        self,
        field: Field,
        ctx: Tensor,
        x_init: Tensor,
        *,
        path: Path,
        generator: Generators | None = None,
        t_start: float = 1.0,
        record: bool = False,
        times: Tensor | None = None,
    ) -> SampleResult:
        """Walk from ``x_init`` to a clean chunk.

        Args:
            field: What to walk along, on ``path``.
            ctx: Context ``[B, C]``, handed to the field.
            x_init: State ``[B, H, A]`` at ``t_start``: ``path.prior(noise)`` at 1, ``path.perturb(chunk, noise, t)`` below.
            path: Path of the field.
            generator: Source of fresh noise, one or one per row; deterministic samplers need none.
            t_start: Time of ``x_init``. Below 1 (warm start) only the grid's times below it are walked, at fewer evaluations.
            record: Keep the states at all times.
            times: Walk these instead: falling along the first axis, ``[K + 1]``, ``[K + 1, B]`` or, when every row of the chunk
                has a time of its own, ``[K + 1, B, H]``. ``x_init`` is the state at ``times[0]``.
        """
        stops: Sequence[Time]
        if times is None:
            stops = self.times(path, t_start)
            times = torch.tensor(stops, dtype=torch.float64)
        else:
            stops = times.tolist() if times.ndim == 1 else list(times)

        def see(x: Tensor, t: Time) -> Pred:
            return clip_pred(path, self._ask(field, x, t, ctx, to), x, t, self.clip)

        x, last, chain = x_init, None, [x_init]
        for t, to in itertools.pairwise(stops):
            seen = see(x, t)
            pred = self._sharpen(see, path, x, t, to, seen, last)
            x = self.step(path, pred, x, t, to).sample(generator)
            last = _Seen(seen, t)
            if record:
                chain.append(x)
        return SampleResult(x, torch.stack(chain) if record else None, times, self._evaluations(len(stops) - 1))

    def step(self, path: Path, pred: Pred, x: Tensor, t: Time, u: Time) -> StepDist:
        """Where this sampler goes from ``x`` at ``t``, given what was seen there."""
        return step_dist(path, pred, x, t, u, self.eta)

    def _ask(self, field: Field, x: Tensor, t: Time, ctx: Tensor, to: Time) -> Pred:
        """What the field sees in ``x`` at ``t``, on the way to ``to``."""
        return field(x, _rows(t, x), ctx)

    def _evaluations(self, num_steps: int) -> int:
        return num_steps

    def _sharpen(
        self, see: Callable[[Tensor, Time], Pred], path: Path, x: Tensor, t: Time, u: Time, seen: Pred, last: _Seen | None
    ) -> Pred:
        """The pair with which to step from ``x`` at ``t`` to ``u``, given what is seen now and what was seen one step before."""
        return seen


class DDPM(Sampler):
    """Ancestral sampling, ``eta = 1``, on the path's own table (Ho et al. 2020, arXiv 2006.11239)."""

    class Config(Config):
        num_steps: int | None = pydantic.Field(default=None, ge=1)  # None: every step of the path's table
        clip: float | None = pydantic.Field(default=1.0, gt=0)

    eta = 1.0

    def __init__(self, config: DDPM.Config | None = None) -> None:
        self.config = config or DDPM.Config()

    @property
    def clip(self) -> float | None:
        return self.config.clip

    def num_steps(self, path: Path) -> int:
        """Raises ConfigError on a continuous path when the number of steps was left open."""
        steps = self.config.num_steps or path.num_steps
        if steps is None:
            raise ConfigError(f"sampler 'ddpm': path {type(path).__name__} has no table of its own; set num_steps")
        return steps


class DDIM(Sampler):
    """The update rule as it stands (Song et al. 2021, arXiv 2010.02502): ``eta`` 0 deterministic, 1 ancestral."""

    class Config(Config):
        num_steps: int = pydantic.Field(default=10, ge=1)
        eta: float = pydantic.Field(default=0.0, ge=0, le=1)
        clip: float | None = pydantic.Field(default=1.0, gt=0)

    def __init__(self, config: DDIM.Config | None = None) -> None:
        self.config = config or DDIM.Config()
        self.eta = self.config.eta

    @property
    def clip(self) -> float | None:
        return self.config.clip

    def num_steps(self, path: Path) -> int:
        return self.config.num_steps


class Euler(Sampler):
    """Euler's method on the probability flow ODE: on the linear path ``x += (u - t) velocity``. DDIM's update, unclipped."""

    class Config(Config):
        num_steps: int = pydantic.Field(default=8, ge=1)
        clip: float | None = pydantic.Field(default=None, gt=0)

    def __init__(self, config: Euler.Config | None = None) -> None:
        self.config = config or type(self).Config()

    @property
    def clip(self) -> float | None:
        return self.config.clip

    def num_steps(self, path: Path) -> int:
        return self.config.num_steps


class Heun(Euler):
    """Heun's second order method on the probability flow ODE, two evaluations a step and one for the last.

    The ODE is integrated in ``z = x / (alpha + sigma)`` over ``tau = sigma / (alpha + sigma)``, where it is
    ``dz/dtau = eps - x0`` on every path. ``tau`` is the time of the linear path, so there this is Heun's method as usual, and
    nothing is infinite where ``alpha`` or ``sigma`` is 0. (The noise level, over which Karras et al. integrate, is infinite at
    the start of the linear path.) Averaging the velocities of both ends and stepping with the pair that the average stands for is
    exactly Heun's step. The last step is Euler's: networks are not trained at ``t = 0``.
    """

    def _evaluations(self, num_steps: int) -> int:
        return 2 * num_steps - 1

    def _sharpen(
        self, see: Callable[[Tensor, Time], Pred], path: Path, x: Tensor, t: Time, u: Time, seen: Pred, last: _Seen | None
    ) -> Pred:
        last_step = u == 0 if isinstance(u, float) else not u.any()
        if last_step:
            return seen
        ahead = see(step_dist(path, seen, x, t, u).mean, u)
        now, then = seen.eps - seen.x0, ahead.eps - ahead.x0
        velocity = 0.5 * (now + then)
        if isinstance(u, Tensor):
            velocity = torch.where(broadcast_time(u, x) > 0, velocity, now)
        return path.predict(x, torch.as_tensor(t, dtype=torch.float64, device=x.device), velocity, "flow")


class Jump(Euler):
    """Jumps of a flow map: the field is told where each step goes and answers with the whole way (``policy.target_time``).

    One step is one call from noise to action. MeanFlow, shortcut and CTM heads all end here.
    """

    class Config(Config):
        num_steps: int = pydantic.Field(default=1, ge=1)
        clip: float | None = pydantic.Field(default=None, gt=0)

    def _ask(self, field: Field, x: Tensor, t: Time, ctx: Tensor, to: Time) -> Pred:
        jump = cast("Callable[[Tensor, Tensor, Tensor, Tensor], Pred]", field)
        return jump(x, _rows(t, x), ctx, _rows(to, x))


class Consistency(Sampler):
    """Denoise at once, noise again to an earlier time, and so on (Song et al. 2023, arXiv 2303.01469, algorithm 1).

    With ``noise: 0`` the state is only scaled back between the calls: with times 1 and .1, no initial noise and a network that
    predicts ``x0`` this is the minimal iterative policy (MIP, "Much Ado About Noising"); one step is plain regression.
    """

    class Config(Config):
        num_steps: int = pydantic.Field(default=1, ge=1)
        times: tuple[float, ...] | None = None  # of the calls, falling, the first 1; None: the path's grid for num_steps
        noise: float = pydantic.Field(default=1.0, ge=0, le=1)
        clip: float | None = pydantic.Field(default=None, gt=0)

        @pydantic.model_validator(mode="after")
        def _falls(self) -> Self:
            times = self.times
            if times is not None and (
                len(times) != self.num_steps or times[0] != 1 or any(a <= b for a, b in itertools.pairwise(times))
            ):
                raise ValueError(f"times {list(times)}: give num_steps = {self.num_steps} of them, falling, the first 1")
            return self

    def __init__(self, config: Consistency.Config | None = None) -> None:
        self.config = config or Consistency.Config()

    @property
    def clip(self) -> float | None:
        return self.config.clip

    def num_steps(self, path: Path) -> int:
        return self.config.num_steps

    def times(self, path: Path, t_start: float = 1.0) -> tuple[float, ...]:
        if self.config.times is None:
            return super().times(path, t_start)
        return tuple(t for t in (*self.config.times, 0.0) if t <= t_start + 1e-9)

    def step(self, path: Path, pred: Pred, x: Tensor, t: Time, u: Time) -> StepDist:
        alpha, sigma, *_ = _step(path, u, u, 0.0, x)
        return StepDist(alpha * pred.x0, sigma * self.config.noise)


class DPMSolver(DDIM):
    """DPM-Solver++(2M), second order at one evaluation a step (Lu et al. 2022, arXiv 2211.01095); ``eta = 1`` is its SDE variant.

    With ``lambda = log(alpha / sigma)`` and ``h = lambda_u - lambda_t``, the clean chunk is extrapolated along ``lambda``,
    ``D = x0 + h / (2 h_last) (x0 - x0_last)``, and the step is :func:`step_dist` with ``D`` and the noise that goes with it. The
    first step has nothing to extrapolate from, and the last one (``h`` infinite) takes ``x0`` as it is.
    """

    def _sharpen(
        self, see: Callable[[Tensor, Time], Pred], path: Path, x: Tensor, t: Time, u: Time, seen: Pred, last: _Seen | None
    ) -> Pred:
        if last is None:
            return seen
        weight = _extrapolation(path, last.t, t, u, x)
        x0 = seen.x0 + weight * (seen.x0 - last.pred.x0)
        alpha, sigma, *_ = _step(path, t, t, 0.0, x)
        return Pred(x0, (x - alpha * x0) / sigma)


def _extrapolation(path: Path, s: Time, t: Time, u: Time, x: Tensor) -> float | Tensor:
    if isinstance(s, float) and isinstance(t, float) and isinstance(u, float):
        return _shared_extrapolation(path, s, t, u)
    s, t, u = (torch.as_tensor(time, dtype=torch.float64, device=x.device) for time in (s, t, u))
    return broadcast_time(_extrapolation_weight(path, s, t, u), x)


@functools.lru_cache(maxsize=4096)
def _shared_extrapolation(path: Path, s: float, t: float, u: float) -> float:
    return _extrapolation_weight(path, _scalar(s), _scalar(t), _scalar(u)).item()


def _extrapolation_weight(path: Path, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """``h / (2 h_last)``; 0 where a noise level at either end is 0 or infinite, or a row waits."""
    before, now, after = (-path.noise_level(time).log() for time in (s, t, u))
    weight = (after - now) / (2 * (now - before))
    return torch.where(torch.isfinite(weight), weight, 0.0)


SAMPLERS: Mapping[str, str] = {
    "ddpm": "robopolicy.generative.sampler:DDPM",
    "ddim": "robopolicy.generative.sampler:DDIM",
    "euler": "robopolicy.generative.sampler:Euler",
    "jump": "robopolicy.generative.sampler:Jump",
    "consistency": "robopolicy.generative.sampler:Consistency",
    "heun": "robopolicy.generative.sampler:Heun",
    "dpm_solver": "robopolicy.generative.sampler:DPMSolver",
}
