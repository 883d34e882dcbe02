"""Does the student keep what its teacher can do? Spread at a fixed observation, distance of distributions, modes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Student against teacher at fixed observations, over many noises; each a mean over observations.

    Attributes:
        std_ratio: Std of the student's chunks over that of the teacher's: 1 when it keeps the spread, 0 when it gives the mean.
        energy: Energy distance of the two sets, in units of the mean distance of two chunks of the teacher; 0 when alike.
        off_support: Share of the student's chunks that are further from every chunk of the teacher than 95 % of the teacher's own
            are from the others; .05 when alike.
        same_noise: Root mean square of student minus teacher from the same noise, in units of the teacher's std; None for a
            teacher whose chunks are no function of it.
    """

    std_ratio: float
    energy: float
    off_support: float
    same_noise: float | None

    def __str__(self) -> str:
        again = "" if self.same_noise is None else f", error from the same noise {self.same_noise:.2f} of its std"
        return (
            f"spread: std {self.std_ratio:.2f} of the teacher's, energy distance {self.energy:.3f}, "
            f"off its support {self.off_support:.1%}{again}"
        )


def spread(teacher: Tensor, student: Tensor) -> Spread:
    """Compare chunks of both, ``[N, K, H, A]``: N observations, K noises, the same for both."""
    theirs, ours = teacher.flatten(2).double(), student.flatten(2).double()
    own = theirs.std(1).square().mean(-1).sqrt().clamp_min(1e-9)
    return Spread(
        std_ratio=float((ours.std(1).square().mean(-1).sqrt() / own).mean()),
        energy=float(torch.stack([energy_distance(a, b) for a, b in zip(theirs, ours, strict=True)]).mean()),
        off_support=float(torch.stack([off_support(a, b) for a, b in zip(theirs, ours, strict=True)]).mean()),
        same_noise=float(((ours - theirs).square().mean((1, 2)).sqrt() / own).mean()),
    )


def energy_distance(first: Tensor, second: Tensor) -> Tensor:
    """``2 E|a - b| - E|a - a'| - E|b - b'|`` of points ``[K, D]``, over ``E|a - a'|``; unbiased, so it may be below 0."""
    pairs = [len(points) * (len(points) - 1) for points in (first, second)]
    within = [torch.cdist(points, points).sum() / n for points, n in zip((first, second), pairs, strict=True)]
    return (2 * torch.cdist(first, second).mean() - within[0] - within[1]) / within[0].clamp_min(1e-9)


def off_support(reference: Tensor, points: Tensor, level: float = 0.95) -> Tensor:
    """Share of ``points [K, D]`` whose nearest point of ``reference [M, D]`` is further than the nearest other one is for a
    ``level`` share of the reference. Both are split in halves, so that a distribution is not compared with itself."""
    half = len(reference) // 2
    known, others = reference[:half], reference[half:]
    radius = torch.cdist(others, known).min(1).values.quantile(level)
    return (torch.cdist(points[half:], known).min(1).values > radius).double().mean()


def mode_shares(points: Tensor, centres: Tensor, radius: float) -> tuple[Tensor, float]:
    """Share of ``points [K, D]`` within ``radius`` of each of ``centres [M, D]`` (their nearest), and share within none."""
    distance, nearest = torch.cdist(points, centres).min(1)
    inside = distance <= radius
    counts = torch.bincount(nearest[inside], minlength=len(centres))
    return counts / len(points), float((~inside).double().mean())
