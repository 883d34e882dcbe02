"""What passes between inference and control: a chunk of actions with its times, and the one command for now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Chunk:
    """Planned actions. Row ``k`` is due at ``obs_time + k * dt``; row 0 is the action for the moment of the observation.

    Attributes:
        actions: ``[F, A]`` in the action feature's units; ``F = horizon - n_obs_steps + 1`` as planners make them.
        obs_time: Clock time of the newest observation behind it [s].
        dt: Time from one row to the next [s].
        ready_time: Clock time at which inference ended [s].
        index: Number of the chunk, counting from 0.
    """

    actions: np.ndarray
    obs_time: float
    dt: float
    ready_time: float
    index: int


class Previous(NamedTuple):
    """What planners are told of the plan in progress: ``actions [B, F, A]`` from the observation's time on, in its units.

    The first ``known [B]`` rows are real; the rest is padding.
    """

    actions: np.ndarray
    known: np.ndarray


@dataclass(frozen=True, slots=True)
class Command:
    """What to do now.

    Attributes:
        action: ``[A]`` in the action feature's units.
        age: How old the observation behind it is [s].
        chunk: Index of the chunk that it is from.
        starved: Nothing is planned for now; the last action is held.
    """

    action: np.ndarray
    age: float
    chunk: int
    starved: bool
