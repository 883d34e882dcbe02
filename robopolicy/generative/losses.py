"""The denoising loss: noise a chunk at a random time, ask the network for what was agreed, and weigh the squared error."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import pydantic
import torch
from torch import Tensor

from robopolicy.config import Config
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Denoiser
from robopolicy.generative.path import Kind, Path, broadcast_time
from robopolicy.generative.sampler import randn


class LossConfig(Config):
    """How the denoising loss draws times and weighs errors.

    Attributes:
        time: Distribution of the time. ``table``: uniform over the table of the path; ``uniform``; ``logit_normal``:
            ``sigmoid(N(mean, std))`` (Esser et al. 2024, arXiv 2403.03206); ``beta``: ``Beta(a, b)`` (pi0, arXiv 2410.24164, uses
            1.5, 1: more noise). None: ``table`` on a path that has one, else ``uniform``. Continuous ones cover ``[t_min, 1]``.
        weighting: ``none``: error of the prediction itself; ``x0``: error of the clean chunk that it stands for; ``min_snr``: the
            latter times ``min(alpha^2 / sigma^2, gamma)`` (Hang et al. 2023, arXiv 2303.09556).
        mask_padding: Leave padded actions out. False teaches to hold the last action beyond the end, as published policies do.
        prefix: Training-time real-time chunking: up to so many rows from "now" on are given clean, at time 0, and not counted;
            the number is drawn uniformly from 0 to ``prefix`` for every chunk. The planner ``rtc_trained`` needs it.
        staircase: Share of chunks whose rows get later times the further ahead they are, in groups of ``stairs`` rows, those
            before "now" clean: streaming diffusion (arXiv 2406.04806). The planner ``streaming`` needs it, and some without.
        stairs: Rows of a group: those executed between two plans.
    """

    time: Literal["table", "uniform", "logit_normal", "beta"] | None = None
    logit_normal_mean: float = 0.0
    logit_normal_std: float = pydantic.Field(default=1.0, gt=0)
    beta_a: float = pydantic.Field(default=1.5, gt=0)
    beta_b: float = pydantic.Field(default=1.0, gt=0)
    weighting: Literal["none", "x0", "min_snr"] = "none"
    min_snr_gamma: float = pydantic.Field(default=5.0, gt=0)
    mask_padding: bool = True
    prefix: int = pydantic.Field(default=0, ge=0)
    staircase: float = pydantic.Field(default=0.0, ge=0, le=1)
    stairs: int = pydantic.Field(default=4, ge=1)

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.prefix and self.staircase:
            raise ValueError("prefix and staircase exclude each other; train one policy for each")
        return self


class DenoisingLoss(NamedTuple):
    """Attributes:
    mean: Weighted mean over all entries that count, a scalar.
    rows: Weighted mean over the action axis ``[B, H]``, 0 where padded; for diagnostics.
    t: The times that were drawn, ``[B]`` or ``[B, H]``.
    """

    mean: Tensor
    rows: Tensor
    t: Tensor


def draw_times(shape: tuple[int, ...], path: Path, config: LossConfig, generator: torch.Generator) -> Tensor:
    """Random times, float64, on the generator's device."""
    device = generator.device
    kind = config.time or ("uniform" if path.num_steps is None else "table")
    if kind == "table":
        if path.num_steps is None:
            raise ConfigError(f"loss: time 'table' on path {type(path).__name__}, which has none; use uniform")
        index = torch.randint(path.num_steps, shape, generator=generator, device=device)
        return (index + 1).double() / path.num_steps
    if kind == "beta":
        share = _beta(shape, config.beta_a, config.beta_b, generator)
    elif kind == "logit_normal":
        normal = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        share = torch.sigmoid(config.logit_normal_mean + config.logit_normal_std * normal)
    else:
        share = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    return path.t_min + (1 - path.t_min) * share


def _beta(shape: tuple[int, ...], a: float, b: float, generator: torch.Generator) -> Tensor:
    """``Beta(a, b)`` from two gamma variables; torch's own distribution takes no generator."""
    x, y = (torch._standard_gamma(torch.full(shape, k, dtype=torch.float64, device=generator.device), generator) for k in (a, b))
    return x / (x + y)


def draw_row_times(
    t: Tensor, rows: int, path: Path, config: LossConfig, generator: torch.Generator, now: int
) -> tuple[Tensor, Tensor | None]:
    """What ``prefix`` and ``staircase`` make of the times ``t [B]`` of chunks: ``[B]`` or ``[B, rows]``, and which rows count.

    A row at time 0 is clean: the network reads the action itself there, and is not asked for it. ``now`` is the row of the
    newest observation.
    """
    if not (config.prefix or config.staircase):
        return t, None
    ahead = torch.arange(rows, device=t.device) - now
    draw = torch.rand(2, len(t), generator=generator, device=generator.device, dtype=torch.float64).to(t.device)
    if config.prefix:
        given = (draw[0] * (config.prefix + 1)).long()[:, None]  # 0 .. prefix
        known = (ahead >= 0) & (ahead < given)
        return torch.where(known, 0.0, t[:, None]), ~known
    stairs = staircase(rows - now, config.stairs, draw[1], path)
    stairs = torch.cat([stairs.new_zeros(len(t), now), stairs], dim=1)
    climbs = draw[0][:, None] < config.staircase
    return torch.where(climbs, stairs, t[:, None]), (stairs > 0) | ~climbs


def staircase(rows: int, group: int, share: Tensor, path: Path) -> Tensor:
    """Times ``[B, rows]`` that rise by groups of ``group`` rows, float64; ``share [B]`` of the way is left of the present stair.

    With ``n`` groups, group ``i`` is at stair ``i + share`` of ``n``: a full stair (1) before denoising, 0 after, when the first
    group is clean and each has become what the one before it was. Stairs are the points of the path's own grid, so that a stair
    is a step of its sampler.
    """
    count = -(-rows // group)
    index = torch.arange(rows, device=share.device) // group
    stairs = path.grid(count).flip(0).to(share.device)  # rising from 0 to 1
    return torch.lerp(stairs[index].expand(len(share), -1), stairs[index + 1].expand(len(share), -1), share[:, None].double())


def weight(path: Path, t: Tensor, kind: Kind, config: LossConfig) -> Tensor:
    """Weight of the squared error of a prediction at ``t``, float64, of the shape of ``t``."""
    if config.weighting == "none":
        return torch.ones_like(t, dtype=torch.float64)
    gain = path.x0_gain(t, kind) ** 2
    if config.weighting == "x0":
        return gain
    return gain * (1 / path.noise_level(t) ** 2).clamp_max(config.min_snr_gamma)


def denoising_terms(
    net: Denoiser,
    path: Path,
    kind: Kind,
    x0: Tensor,
    ctx: Tensor,
    is_pad: Tensor | None,
    generator: torch.Generator,
    config: LossConfig,
    *,
    t: Tensor | None = None,
    now: int = 0,
) -> DenoisingLoss:
    """The loss ``E w(t) |net(x_t, t, ctx) - target|^2`` with its rows.

    Args:
        net: The network.
        path: Path on which it is trained.
        kind: What it predicts.
        x0: Clean chunks ``[B, H, A]``, normalised.
        ctx: Context ``[B, C]``.
        is_pad: True for actions beyond the end of their episode, ``[B, H]`` or ``[B, H, A]``; None when there are none.
        generator: Source of times and noise.
        config: Times and weights.
        t: Times to use instead of drawing one for each chunk: ``[B]``, or ``[B, H]`` when every row has its own.
        now: The row of the newest observation, from which ``config.prefix`` and ``config.staircase`` count.
    """
    counts: Tensor | None = None
    if t is None:
        t = draw_times((x0.shape[0],), path, config, generator).to(x0.device)
        t, counts = draw_row_times(t, x0.shape[1], path, config, generator, now)
    eps = randn(x0.shape, generator, device=x0.device, dtype=x0.dtype)
    x, net_t = path.net_input(path.perturb(x0, eps, t), t)
    error = net(x, net_t, ctx).to(x0.dtype) - path.target(x0, eps, t, kind)
    squared = error.square()
    if config.weighting != "none":
        squared = squared * broadcast_time(weight(path, t, kind, config), x0)
    if (is_pad is None or not config.mask_padding) and counts is None:
        return DenoisingLoss(squared.mean(), squared.mean(-1).detach(), t)
    keep = torch.ones_like(squared)
    if is_pad is not None and config.mask_padding:
        keep = keep * ~(is_pad if is_pad.ndim == 3 else is_pad[:, :, None])
    if counts is not None:
        keep = keep * counts[:, :, None]
    squared = squared * keep
    return DenoisingLoss(squared.sum() / keep.sum().clamp_min(1), squared.mean(-1).detach(), t)


def denoising_loss(
    net: Denoiser,
    path: Path,
    kind: Kind,
    x0: Tensor,
    ctx: Tensor,
    is_pad: Tensor | None,
    generator: torch.Generator,
    config: LossConfig,
    *,
    t: Tensor | None = None,
    now: int = 0,
) -> Tensor:
    """The mean of :func:`denoising_terms`, which see."""
    return denoising_terms(net, path, kind, x0, ctx, is_pad, generator, config, t=t, now=now).mean
