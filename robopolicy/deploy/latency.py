"""How long things took: an estimate of the next delay, and percentiles, both from ring buffers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


class Recorder:
    """Percentiles of the last ``size`` values, without allocating while they are recorded."""

    def __init__(self, size: int = 100_000) -> None:
        self._values = np.zeros(size)
        self.count = 0

    def add(self, value: float) -> None:
        self._values[self.count % len(self._values)] = value
        self.count += 1

    @property
    def values(self) -> np.ndarray:
        """The values kept; once the buffer has gone round, not in order."""
        return self._values[: min(self.count, len(self._values))]

    def last(self, n: int) -> np.ndarray:
        """The last ``n`` values, or as many as there are."""
        count, size = self.count, len(self._values)
        return self._values[np.arange(count - min(n, count, size), count) % size]

    def summary(self, scale: float = 1.0) -> dict[str, float]:
        """``p50, p95, p99, p99.9, max``, times ``scale``, and ``n``."""
        return percentiles(self.values * scale) | {"n": self.count}


def percentiles(values: np.ndarray) -> dict[str, float]:
    """``p50, p95, p99, p99.9, max`` of ``values``, each an observed value; NaN when there are none."""
    if not len(values):
        return dict.fromkeys((*PERCENTILES, "max"), math.nan)
    found = np.quantile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(PERCENTILES, found.tolist(), strict=True)) | {"max": float(values.max())}


class DelayEstimate:
    """The delay to expect of the next inference: the longest of the last ``window``, which forgets a slow one in time.

    A chunk that is early waits for its row, one that is late breaks the promise that it was made under; so the longest, not the
    mean, which half of them exceed.
    """

    def __init__(self, window: int = 10, initial: float = 0.0) -> None:
        self._recent = np.full(window, initial)
        self._count = 0

    def add(self, seconds: float) -> None:
        if self._count == 0:
            self._recent[:] = seconds  # what was assumed before anything was measured
        self._recent[self._count % len(self._recent)] = seconds
        self._count += 1

    @property
    def seconds(self) -> float:
        return float(self._recent.max())


class Log:
    """Rows of numbers in a ring buffer, written when the loop has ended.

    Args:
        size: Rows kept.
        columns: Name and width of each column; width 0 for a scalar.
    """

    def __init__(self, size: int, columns: dict[str, int]) -> None:
        self._rows = np.zeros(size, np.dtype([(name, np.float64, (width,) if width else ()) for name, width in columns.items()]))
        self.count = 0

    def next(self) -> np.ndarray:
        """The row to fill next; a view."""
        row = self._rows[self.count % len(self._rows)]
        self.count += 1
        return row

    def last(self, n: int) -> np.ndarray[Any, Any]:
        """The last ``n`` rows, or as many as there are, oldest first."""
        count, size = self.count, len(self._rows)
        return self._rows[np.arange(count - min(n, count, size), count) % size]

    def rows(self) -> np.ndarray[Any, Any]:
        """What was logged, oldest first: a structured array."""
        size = len(self._rows)
        if self.count <= size:
            return self._rows[: self.count].copy()
        return np.roll(self._rows, -(self.count % size))
