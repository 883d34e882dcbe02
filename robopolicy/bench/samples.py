"""What is said of a sample of durations: percentiles and a histogram, never the mean alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from robopolicy.deploy.latency import PERCENTILES, percentiles


class Summary(NamedTuple):
    """Of a sample, in its own unit. A percentile is an observed value: that share of the sample lies at or below it."""

    n: int
    mean: float
    percentiles: dict[str, float]
    max: float

    def to_json(self) -> dict[str, float]:
        return {"n": self.n, "mean": self.mean, **self.percentiles, "max": self.max}


def summarize(values: np.ndarray) -> Summary:
    """Of a sample ``[n]``, n at least 1. With n below 1000 the 99.9 % is the largest value."""
    found = percentiles(values)
    return Summary(len(values), float(values.mean()), {name: found[name] for name in PERCENTILES}, found["max"])


class Histogram(NamedTuple):
    """How many values fall into each bin; bins are equally wide in the logarithm, because latencies have long tails."""

    edges: np.ndarray  # [bins + 1]
    counts: np.ndarray  # [bins]


def histogram(values: np.ndarray, bins: int = 60, low: float | None = None, high: float | None = None) -> Histogram:
    """Of positive values ``[n]``; ``low`` and ``high`` make several histograms comparable."""
    low, high = float(values.min()) if low is None else low, float(values.max()) if high is None else high
    edges = np.geomspace(low * 0.999, high * 1.001, bins + 1)
    return Histogram(edges, np.histogram(values, edges)[0])
