"""Gaussian paths: the noise that a chunk goes through, and every conversion between what a network may predict.

A path is ``x_t = alpha(t) x0 + sigma(t) eps`` with ``eps ~ N(0, I)``, ``t = 0`` the clean chunk and ``t = 1`` noise. States on
different paths carry the same information when their noise level ``sigma / alpha`` is equal, never when their ``t`` is.

What a network may predict (``a = alpha(t)``, ``b = sigma(t)``, ``n = sqrt(a^2 + b^2)``):

====  =====================  ==========================  ==========================  ==================
kind  target                 x0                          eps                         ill-posed where
====  =====================  ==========================  ==========================  ==================
eps   ``eps``                ``(x - b y) / a``           ``y``                       ``a -> 0``
x0    ``x0``                 ``y``                       ``(x - a y) / b``           ``b -> 0``
v     ``(a eps - b x0)/n``   ``(a x / n - b y) / n``     ``(b x / n + a y) / n``     nowhere
flow  ``eps - x0``           ``(x - b y) / (a + b)``     ``(x + a y) / (a + b)``     nowhere
====  =====================  ==========================  ==========================  ==================

``v`` is divided by ``n`` so that it has unit scale on every path: on the variance preserving path ``n = 1`` and it is the ``v``
of Salimans & Ho 2022 (arXiv 2202.00512); on the EDM path it is minus the ``F`` of Karras et al. 2022 (arXiv 2206.00364) for
unit data scale. ``flow`` on the linear path is the velocity of flow matching (Lipman et al. 2023, arXiv 2210.02747). The score is
``-eps / sigma``.

Coefficients are computed in float64 whatever the type of ``t`` and cast to the type of ``x`` at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

import pydantic
import torch
from torch import Tensor

from robopolicy.config import Config
from robopolicy.errors import ConfigError

Kind = Literal["eps", "x0", "v", "flow"]

# Keeps the ill-posed ends of 'eps' and 'x0' finite: the sampler's clip, or a zero weight, then makes them harmless.
_TINY = 1e-12


class Pred(NamedTuple):
    """What a field sees in a noisy chunk: clean chunk and noise, each ``[B, H, A]``, with ``x = alpha x0 + sigma eps``."""

    x0: Tensor
    eps: Tensor


def broadcast_time(value: Tensor, x: Tensor) -> Tensor:
    """Shape a quantity per time (``[]``, ``[B]`` or ``[B, H]``) for arithmetic with ``x [B, H, A]``, in the type of ``x``.

    Raises:
        ValueError: ``value`` has another number of axes.
    """
    if value.ndim == 1:
        value = value[:, None, None]
    elif value.ndim == 2:
        value = value[:, :, None]
    elif value.ndim != 0:
        raise ValueError(f"time has shape {tuple(value.shape)}; expected [], [B] or [B, H]")
    return value.to(x.dtype)


class Path(ABC):
    """A Gaussian path. Subclasses say how the noise level depends on ``t``; everything else is written once, here."""

    num_steps: int | None = None  # length of the path's own table of times; None on a continuous path

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` of ``t`` in float64, each of the shape of ``t``."""

    @abstractmethod
    def t_of(self, noise_level: Tensor) -> Tensor:
        """The time at which ``sigma / alpha`` equals ``noise_level`` (inverse of :meth:`noise_level`), clamped to ``[0, 1]``."""

    @abstractmethod
    def grid(self, num_steps: int) -> Tensor:
        """Times at which a sampler of ``num_steps`` steps stops: float64 ``[num_steps + 1]``, falling from 1 to 0."""

    @abstractmethod
    def net_time(self, t: Tensor) -> Tensor:
        """What a network embeds instead of ``t``: about 0 (clean) to 100 (noise), float64, same shape."""

    @property
    def t_min(self) -> float:
        """Smallest time worth training at; below it the path has no noise to speak of."""
        return 0.0

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the clean chunk at ``t``, float64."""
        return self.coefficients(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at ``t``, float64."""
        return self.coefficients(t)[1]

    def noise_level(self, t: Tensor) -> Tensor:
        """``sigma / alpha`` at ``t``, float64; infinite where ``alpha`` is 0."""
        alpha, sigma = self.coefficients(t)
        return sigma / alpha

    def net_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What a network reads for the state ``x`` at ``t``: the state at unit scale and the time it embeds, typed like ``x``."""
        return x, self.net_time(t).to(x.dtype)

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The state ``x_t [B, H, A]`` of a clean chunk and a noise."""
        alpha, sigma = self._coefficients_like(t, x0)
        return alpha * x0 + sigma * eps

    def prior(self, noise: Tensor) -> Tensor:
        """The state at ``t = 1`` that unit Gaussian ``noise [B, H, A]`` stands for: where sampling starts."""
        return noise * float(self.sigma(torch.ones((), dtype=torch.float64)))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """What a network of this ``kind`` should predict ``[B, H, A]``."""
        if kind == "eps":
            return eps
        if kind == "x0":
            return x0
        if kind == "flow":
            return eps - x0
        alpha, sigma = self._coefficients_like(t, x0)
        return (alpha * eps - sigma * x0) / torch.sqrt(alpha**2 + sigma**2)

    def predict(self, x: Tensor, t: Tensor, y: Tensor, kind: Kind) -> Pred:
        """Read a network's output ``y`` of this ``kind`` at the state ``x`` and ``t`` (table above)."""
        alpha, sigma = self._coefficients_like(t, x)
        if kind == "eps":
            return Pred((x - sigma * y) / alpha.clamp_min(_TINY), y)
        if kind == "x0":
            return Pred(y, (x - alpha * y) / sigma.clamp_min(_TINY))
        if kind == "flow":
            scale = 1 / (alpha + sigma)
            return Pred((x - sigma * y) * scale, (x + alpha * y) * scale)
        scale = torch.rsqrt(alpha**2 + sigma**2)
        unit = x * scale
        return Pred((alpha * unit - sigma * y) * scale, (sigma * unit + alpha * y) * scale)

    def x0_gain(self, t: Tensor, kind: Kind) -> Tensor:
        """``|d x0 / d y|`` at ``t`` (float64): how an error of the prediction shows in the clean chunk."""
        alpha, sigma = self.coefficients(t)
        if kind == "eps":
            return sigma / alpha.clamp_min(_TINY)
        if kind == "x0":
            return torch.ones_like(alpha)
        return sigma / (alpha + sigma) if kind == "flow" else sigma * torch.rsqrt(alpha**2 + sigma**2)

    def score(self, pred: Pred, t: Tensor) -> Tensor:
        """Gradient of the log-density of ``x_t``: ``-eps / sigma``."""
        sigma = broadcast_time(self.sigma(t), pred.eps)
        return -pred.eps / sigma.clamp_min(_TINY)

    def _coefficients_like(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t)
        return broadcast_time(alpha, x), broadcast_time(sigma, x)


class VPCosine(Path):
    """Variance preserving path with the squared cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672).

    The table: ``abar_i = prod_{j <= i} (1 - beta_j)`` with ``beta_j = min(1 - f((j+1)/T) / f(j/T), 0.999)`` and
    ``f(s) = cos^2(pi/2 (s + 0.008) / 1.008)``; the cap acts on the last step only. Table index ``i`` (0..T-1) is ``t = (i+1)/T``
    and ``t = 0`` is exactly clean. Between table points ``log(sigma/alpha)`` is linear in ``t``; below the first point, where the
    logarithm has no lower end, ``sigma/alpha`` is linear in ``t``. Covers noise levels up to 2.0e3 for T = 100.
    """

    class Config(Config):
        num_steps: int = pydantic.Field(default=100, ge=2, le=100_000)  # T, the length of the table

    def __init__(self, config: VPCosine.Config | None = None) -> None:
        self.config = config or VPCosine.Config()
        self.num_steps: int = self.config.num_steps
        steps = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
        f = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp_max(0.999)
        # 1 - abar through log1p and expm1: no cancellation where there is hardly any noise.
        log_abar = torch.cumsum(torch.log1p(-beta), 0)
        self.alphas_cumprod = log_abar.exp()
        log_level = 0.5 * (torch.log(-torch.expm1(log_abar)) - log_abar)
        self._log_levels = {torch.device("cpu"): log_level}  # a copy for each device that was asked for

    def _log_level(self, device: torch.device) -> Tensor:
        if device not in self._log_levels:
            self._log_levels[device] = self._log_levels[torch.device("cpu")].to(device)
        return self._log_levels[device]

    @property
    def t_min(self) -> float:
        return 1 / self.num_steps

    def net_time(self, t: Tensor) -> Tensor:
        """``t T - 1``: the integer index at table times, which is what the published networks embed."""
        index = t.double() * self.num_steps - 1
        whole = index.round()
        # A float32 time of the table misses its index by up to T * 6e-8, and the level is steep near t = 1: snap.
        return torch.where((index - whole).abs() < 1e-6 * self.num_steps, whole, index)

    def noise_level(self, t: Tensor) -> Tensor:
        index = self.net_time(t)
        table = self._log_level(t.device)
        below = index.floor().clamp(0, self.num_steps - 2)
        low = below.long()
        log_level = torch.lerp(table[low], table[low + 1], (index - below).clamp(0, 1))
        return log_level.exp() * (index + 1).clamp(0, 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self.noise_level(t)
        alpha = torch.rsqrt(1 + level**2)
        return alpha, alpha * level

    def t_of(self, noise_level: Tensor) -> Tensor:
        level = noise_level.double()
        table = self._log_level(level.device)
        log_level = level.log()
        low = ((table <= log_level[..., None]).sum(-1) - 1).clamp(0, self.num_steps - 2)  # searchsorted, for exported graphs too
        index = low + (log_level - table[low]) / (table[low + 1] - table[low])
        first = level / table[0].exp() - 1  # the linear piece between t = 0 and the first point
        return ((torch.where(log_level < table[0], first, index) + 1) / self.num_steps).clamp(0, 1)

    def grid(self, num_steps: int) -> Tensor:
        """Trailing spacing: table index ``round(T - k T / num_steps) - 1``, so that the first is T-1 (pure noise) for any number.

        Raises:
            ConfigError: More steps than the table has.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ConfigError(f"sampler: num_steps {num_steps} on a path of {self.num_steps} steps; use 1 to {self.num_steps}")
        times = torch.arange(num_steps, -1, -1, dtype=torch.float64) * (self.num_steps / num_steps)
        return times.round() / self.num_steps


class LinearFlow(Path):
    """Straight path of flow matching: ``alpha = 1 - t``, ``sigma = t`` (Lipman et al.; Liu et al. 2023, arXiv 2209.03003)."""

    class Config(Config):
        pass

    def __init__(self, config: LinearFlow.Config | None = None) -> None:
        self.config = config or LinearFlow.Config()

    def net_time(self, t: Tensor) -> Tensor:
        """``100 t``: the range that networks of the 100 step diffusion path see, so that one embedding suits both."""
        return t.double() * 100

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1 - t, t

    def t_of(self, noise_level: Tensor) -> Tensor:
        return 1 / (1 + 1 / noise_level.double())  # right at both ends: level 0 gives 0, infinity gives 1

    def grid(self, num_steps: int) -> Tensor:
        """Equal steps in ``t``."""
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


class EDM(Path):
    """Variance exploding path of Karras et al. 2022: ``alpha = 1``, ``sigma = sigma_max t^rho``.

    In this coordinate the noise levels of Karras' sampling grid, ``sigma_i^(1/rho)`` equally spaced between ``sigma_max`` and
    ``sigma_min``, are equally spaced in ``t``, and ``t = 0`` is exactly clean. Networks read ``x / sqrt(sigma^2 + sigma_data^2)``
    and embed ``25 ln(sigma)`` (a hundred times Karras' ``c_noise = ln(sigma) / 4``, the scale of the other paths).
    """

    class Config(Config):
        sigma_min: float = pydantic.Field(default=0.002, gt=0)
        sigma_max: float = pydantic.Field(default=80.0, gt=0)
        rho: float = pydantic.Field(default=7.0, ge=1)
        sigma_data: float = pydantic.Field(default=0.5, gt=0)  # standard deviation of normalised actions

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.sigma_min >= self.sigma_max:
                raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
            return self

    def __init__(self, config: EDM.Config | None = None) -> None:
        self.config = config or EDM.Config()

    @property
    def t_min(self) -> float:
        return (self.config.sigma_min / self.config.sigma_max) ** (1 / self.config.rho)

    def net_time(self, t: Tensor) -> Tensor:
        """``25 ln(sigma)``, with ``sigma`` bounded below by ``sigma_min``."""
        return 25 * self.sigma(t).clamp_min(self.config.sigma_min).log()

    def net_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(self.sigma(t) ** 2 + self.config.sigma_data**2)
        return x * broadcast_time(scale, x), self.net_time(t).to(x.dtype)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return torch.ones_like(t), self.config.sigma_max * t**self.config.rho

    def t_of(self, noise_level: Tensor) -> Tensor:
        return ((noise_level.double() / self.config.sigma_max) ** (1 / self.config.rho)).clamp(0, 1)

    def grid(self, num_steps: int) -> Tensor:
        """Karras' grid: ``num_steps`` levels from ``sigma_max`` to ``sigma_min``, equally spaced in ``sigma^(1/rho)``, then 0."""
        levels = torch.linspace(1, self.t_min, num_steps, dtype=torch.float64)
        return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


PATHS: Mapping[str, str] = {
    "vp_cosine": "robopolicy.generative.path:VPCosine",
    "flow": "robopolicy.generative.path:LinearFlow",
    "edm": "robopolicy.generative.path:EDM",
}
