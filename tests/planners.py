"""Planners for processes of their own, in a module that imports little."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from robopolicy.errors import DataError


class Told:
    """A planner that does what the observation ``what`` says; else its 4 rows hold what it was given."""

    rows = 4

    def __init__(self) -> None:
        self.resets = 0

    def plan(self, obs: Mapping[str, np.ndarray], previous: Any, delay: int, generator: Any) -> np.ndarray:
        what = str(obs["what"]) if "what" in obs else ""
        if what == "die":
            os._exit(3)
        if what == "hang":
            time.sleep(1000)
        if what == "fail":
            raise ValueError("no\nweights")
        if what == "refuse":
            raise DataError("observation 'x' holds NaN; check that sensor")
        if what == "torch":
            return np.full((1, self.rows, 1), float("torch" in sys.modules))
        if what == "sum":
            image = obs["image"]
            return np.array([image.sum() + obs["x"].sum(), image[0, 0, 0], 0, 0], np.float64).reshape(1, 4, 1)
        known = 0 if previous is None else int(previous.known[0])
        noise = float(generator.standard_normal()) if isinstance(generator, np.random.Generator) else _torch(generator)
        rows = [noise, known, delay, self.resets]
        return np.array(rows, np.float64).reshape(1, 4, 1)

    def reset(self) -> None:
        self.resets += 1


def _torch(generator: Any) -> float:
    import torch

    return float(torch.randn((), generator=generator, dtype=torch.float64))


def refuses() -> Told:
    raise DataError("no such policy; name another")


def dies() -> Told:
    os._exit(7)


def hangs() -> Told:
    time.sleep(1000)
    return Told()
