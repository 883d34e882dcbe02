"""``Normalizer``: an affine map per feature that brings data to the range a network likes, and back.

The map is fitted once on the training data, belongs to the policy and travels with it (two buffers in its safetensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from robopolicy.data.episodes import Episodes
from robopolicy.errors import DataError, nearest

Mode = Literal["minmax", "meanstd", "quantile", "identity"]

QUANTILES = (0.01, 0.99)
_SAMPLE = 200_000  # rows kept for quantiles; all of them in sets up to this size
_CONSTANT = 1e-6  # a spread below this part of the magnitude (or below this much in absolute terms) is noise, not signal


class Normalizer(nn.Module):
    """``normalize(x) = x * scale + offset``, per entry of a feature.

    ``minmax`` maps the smallest and largest value to -1 and 1, ``quantile`` the 1 % and 99 % quantiles (values beyond leave the
    range), ``meanstd`` to zero mean and unit standard deviation. An entry that is constant in the data is centred and not scaled,
    so that a small deviation at deployment stays small.

    Args:
        size: Number of entries of the feature (the product of its shape).
        mode: The rule; a new normaliser is the identity until fitted.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, size: int, mode: Mode = "minmax") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise DataError(f"normaliser mode '{mode}' is unknown; {nearest(mode, get_args(Mode))}")
        self.size = size
        self.mode: Mode = mode
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("offset", torch.zeros(size))

    @classmethod
    def fit(cls, values: np.ndarray | Iterable[np.ndarray], mode: Mode = "minmax") -> Normalizer:
        """Fit to rows ``[..., size]``, given at once or as a stream of blocks (larger-than-memory sets).

        Raises:
            DataError: No rows, or NaN or infinity among them.
        """
        stats = Statistics()
        for block in [values] if isinstance(values, np.ndarray) else values:
            stats.update(block)
        return cls.from_statistics(stats, mode)

    @classmethod
    def fit_feature(cls, episodes: Episodes, name: str, mode: Mode = "minmax") -> Normalizer:
        """Fit to one feature over all steps of a store, read in blocks."""
        size = episodes.features[name].size
        return cls.fit((block.reshape(-1, size) for block in episodes.blocks(name)), mode)

    @classmethod
    def from_statistics(cls, stats: Statistics, mode: Mode) -> Normalizer:
        """Raises DataError when there were no rows."""
        if not stats.count:
            raise DataError("normaliser: no data to fit to; the set is empty")
        normalizer = cls(len(stats.mean), mode)
        if mode == "identity":
            return normalizer
        if mode == "meanstd":
            centre, half = stats.mean, stats.std
        else:
            low, high = (stats.minimum, stats.maximum) if mode == "minmax" else stats.quantiles(QUANTILES)
            centre, half = (low + high) / 2, (high - low) / 2
        constant = half <= _CONSTANT * np.maximum(1.0, np.abs(centre))
        scale = 1.0 / np.where(constant, 1.0, half)
        normalizer.scale.copy_(torch.from_numpy(scale))
        normalizer.offset.copy_(torch.from_numpy(-centre * scale))
        return normalizer

    def normalize(self, x: Tensor) -> Tensor:
        """``x [..., *shape]`` with ``prod(shape) = size``, in the units of the feature, to network range."""
        return x * self._like(self.scale, x) + self._like(self.offset, x)

    def unnormalize(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return (x - self._like(self.offset, x)) / self._like(self.scale, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x)

    def equal(self, other: Normalizer, rtol: float = 1e-6) -> bool:
        """Whether two normalisers are the same map, entry by entry, to a relative tolerance in units of the network's range."""
        if self.size != other.size:
            return False
        close = torch.isclose(self.scale, other.scale, rtol=rtol, atol=0.0) & torch.isclose(
            self.offset, other.offset, rtol=rtol, atol=rtol
        )
        return bool(close.all())

    def extra_repr(self) -> str:
        return f"{self.size}, mode={self.mode}"

    def _like(self, buffer: Tensor, x: Tensor) -> Tensor:
        """The buffer, shaped like the trailing axes of ``x`` that make up one value of the feature."""
        axes = 0
        while math.prod(x.shape[x.ndim - axes :]) < self.size and axes < x.ndim:
            axes += 1
        shape = x.shape[x.ndim - axes :]
        if math.prod(shape) != self.size:
            raise DataError(
                f"normaliser for {self.size} entries got an array of shape {tuple(x.shape)}; its last axes must hold {self.size}"
            )
        return buffer.to(x.dtype).reshape(shape)


class Statistics:
    """Running minimum, maximum, mean, standard deviation and quantiles of rows ``[..., D]``, in float64.

    Mean and variance are merged block by block (Chan, Golub and LeVeque 1979), which stays accurate for large offsets. Quantiles
    are exact up to 200,000 rows, beyond that of a uniform random sample (reservoir) drawn with a fixed seed.
    """

    def __init__(self) -> None:
        self.count = 0
        self.minimum: np.ndarray = np.zeros(0)
        self.maximum: np.ndarray = np.zeros(0)
        self.mean: np.ndarray = np.zeros(0)
        self._squares: np.ndarray = np.zeros(0)
        self._sample: np.ndarray = np.zeros((0, 0))
        self._rng = np.random.default_rng(0)

    def update(self, rows: np.ndarray) -> None:
        """Add rows. Raises DataError for NaN or infinity."""
        block = np.asarray(rows, np.float64)
        block = block.reshape(-1, block.shape[-1])
        if not len(block):
            return
        if not np.isfinite(block).all():
            raise DataError("normaliser: the data hold NaN or infinity; run `robopolicy data check`")
        count, mean = len(block), block.mean(axis=0)
        squares = ((block - mean) ** 2).sum(axis=0)
        if not self.count:
            self.minimum, self.maximum, self.mean, self._squares = block.min(axis=0), block.max(axis=0), mean, squares
        else:
            self.minimum, self.maximum = np.minimum(self.minimum, block.min(axis=0)), np.maximum(self.maximum, block.max(axis=0))
            delta, total = mean - self.mean, self.count + count
            self._squares = self._squares + squares + delta**2 * (self.count * count / total)
            self.mean = self.mean + delta * (count / total)
        self._keep(block)
        self.count += count

    def _keep(self, block: np.ndarray) -> None:
        room = max(0, _SAMPLE - len(self._sample)) if self.count else _SAMPLE
        head, tail = block[:room], block[room:]
        self._sample = np.concatenate([self._sample, head]) if self.count else head.copy()
        if len(tail):
            # Row number n of the stream replaces a random one of the sample with probability SAMPLE / n.
            slots = (self._rng.random(len(tail)) * (self.count + room + 1 + np.arange(len(tail)))).astype(np.int64)
            for row in np.flatnonzero(slots < _SAMPLE):
                self._sample[slots[row]] = tail[row]

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation ``[D]``."""
        return np.sqrt(self._squares / max(self.count, 1))

    def quantiles(self, levels: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.quantile(self._sample, levels, axis=0)
        return low, high
