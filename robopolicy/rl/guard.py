"""``Guard``: notices when fine-tuning makes the policy worse than it has been.

Surrogates of generative policies are trust regions in name only (flow-matching losses least of all): a policy may gain for a
hundred iterations and then be lost within ten. The scores of training episodes show it at once and cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pydantic

from robopolicy.config import Config


class GuardConfig(Config):
    """Attributes:
    episodes: Training episodes in the window whose mean is watched.
    drop: A collapse is a fall of the mean by this many standard deviations of single episodes (.3: from 60 % success to 45 %) ...
    z: ... and by this many standard errors. The best of many windows is partly luck: at 4, a sixth of the runs that never change
        are stopped within 300 iterations of 100 episodes; at 5.5 one in 200.
    stop: Stop the run; otherwise only warn.
    """

    episodes: int = pydantic.Field(default=400, ge=20)
    drop: float = pydantic.Field(default=0.3, gt=0)
    z: float = pydantic.Field(default=5.5, gt=0)
    stop: bool = True


class Collapse(NamedTuple):
    best: float  # mean score of the best window
    iteration: int  # at whose end that was
    now: float


class Guard:
    """Fed with the scores of each iteration's episodes; compares the last window with the best one so far."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.history: list[tuple[int, float, float]] = []  # per iteration: episodes, sum of scores, sum of their squares
        self.best: tuple[float, float, int] | None = None  # mean, std, iteration

    def __call__(self, iteration: int, scores: Sequence[float]) -> Collapse | None:
        """Take in one iteration's scores; says when the policy has collapsed."""
        values = np.asarray(scores, np.float64)
        self.history.append((len(values), float(values.sum()), float((values**2).sum())))
        window = self._window()
        if window is None:
            return None
        count, mean, std = window
        if self.best is None or mean > self.best[0]:
            self.best = (mean, std, iteration)
            return None
        best, spread, when = self.best
        spread = max(spread, std, 1e-9)
        fall = (best - mean) / spread
        if fall > self.config.drop and fall > self.config.z * math.sqrt(2 / count):
            return Collapse(best, when, mean)
        return None

    def _window(self) -> tuple[int, float, float] | None:
        """Episodes, mean and std of the last iterations that hold at least as many episodes as asked for."""
        totals = np.zeros(3)
        for row in reversed(self.history):
            totals += row
            if totals[0] >= self.config.episodes:
                mean = totals[1] / totals[0]
                return int(totals[0]), float(mean), math.sqrt(max(0.0, totals[2] / totals[0] - mean**2))
        return None
