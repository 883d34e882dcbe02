"""Executors: which planned action is due now. One per robot, on the control thread; numpy only, no waiting, no network.

Rows of a chunk are due at times (:class:`robopolicy.deploy.chunk.Chunk`), and an executor looks them up by time; it never counts
calls. So a control loop may run at any rate, skip ticks, and get chunks late.

=============  =======================================================================================================
``latest``     The newest chunk from the moment it arrives; its rows whose time has passed are dropped.
``ensemble``   The mean of what all chunks plan for now, weighted by age (ACT's temporal ensembling).
``receding``   A fixed number of rows of each chunk, the first at its arrival; then waits, holding the last action.
=============  =======================================================================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pydantic

from robopolicy.config import Config, component
from robopolicy.deploy.chunk import Chunk, Command
from robopolicy.errors import EvaluationError

_EARLY = 1e-6  # of a row: times are sums of periods, and a row must not be missed by a rounding error


class Switch(NamedTuple):
    """A change from one chunk to the next: when [s], and how far the new command is from what the old plan said for that time."""

    time: float
    jump: float  # Euclidean, in the action feature's units


class Executor(ABC):
    """What control asks for the present action. Not shared between threads.

    Attributes:
        switches: The last 1000 changes of plan.
        held: Commands without a plan for their time, since :meth:`reset`.
    """

    def __init__(self) -> None:
        self.switches: deque[Switch] = deque(maxlen=1000)
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new episode."""
        self.switches.clear()
        self.held = 0
        self._last: np.ndarray | None = None
        self._index = -1
        self._obs_time = -math.inf
        self._before: np.ndarray | None = None  # what was planned for the moment of a change, by those before it
        self._changed = False

    def add(self, chunk: Chunk) -> None:
        """Take a chunk that has just arrived. One that is older than the newest taken is ignored."""
        if chunk.obs_time < self._obs_time:
            return
        self._obs_time, self._index = chunk.obs_time, chunk.index
        self._take(chunk)
        self._changed = True

    def action(self, now: float) -> Command:
        """The command for ``now``; call it with times that do not fall.

        Raises:
            EvaluationError: No chunk has arrived yet, so there is nothing to hold.
        """
        planned = self.planned(now)
        if self._changed and self._last is not None:
            before = self._planned_before(now)
            before = self._last if before is None else before
            self.switches.append(Switch(now, float(np.linalg.norm((self._last if planned is None else planned) - before))))
        self._changed = False
        starved = planned is None
        if planned is None:
            if self._last is None:
                raise EvaluationError("the executor has no chunk yet; plan the first one before asking for actions")
            self.held += 1
            planned = self._last
        self._last = planned
        return Command(planned, now - self._obs_time, self._index, starved)

    def rows(self, now: float, before: int = 1, after: int = 2) -> tuple[np.ndarray, float, float] | None:
        """Planned rows around ``now``, for interpolation: ``before + 1`` up to now's own row and ``after`` behind it.

        Returns:
            Actions ``[n, A]``, the time of the first of them [s] and the time between two [s]; fewer rows than asked for at
            either end of the plan. None when nothing is planned for now.
        """
        grid = self._grid(now)
        if grid is None:
            return None
        start, dt = grid
        times = [start + k * dt for k in range(-before, after + 1)]
        found = [(time, row) for time in times if (row := self.planned(time)) is not None]
        return np.stack([row for _, row in found]), found[0][0], dt

    def remaining(self, now: float) -> Chunk | None:
        """What is planned from ``now`` on, the row nearest to ``now`` first; None when nothing is.

        The nearest, not the one that is due: a plan from an observation at ``now`` has rows of its own, and observations come a
        little early or late.
        """
        grid = self._grid(now)
        if grid is None:
            return None
        start, dt = grid
        if now - start > dt / 2:
            start += dt
        actions: list[np.ndarray] = []
        while (row := self.planned(start + len(actions) * dt)) is not None:
            actions.append(row)
        if not actions:
            return None
        return Chunk(np.stack(actions), start, dt, start, self._index)

    @abstractmethod
    def planned(self, now: float) -> np.ndarray | None:
        """The action ``[A]`` planned for ``now``, or None."""

    @abstractmethod
    def _take(self, chunk: Chunk) -> None: ...

    @abstractmethod
    def _planned_before(self, now: float) -> np.ndarray | None:
        """What was planned for ``now`` before the newest chunk came."""

    @abstractmethod
    def _grid(self, now: float) -> tuple[float, float] | None:
        """The time at which now's row began, and the time between rows; None when nothing is planned for now."""


def row_at(chunk: Chunk, now: float) -> int | None:
    """The row of ``chunk`` that is due at ``now``, or None outside it."""
    row = math.floor((now - chunk.obs_time) / chunk.dt + _EARLY)
    return row if 0 <= row < len(chunk.actions) else None


def _action_at(chunk: Chunk | None, now: float) -> np.ndarray | None:
    row = None if chunk is None else row_at(chunk, now)
    return None if chunk is None or row is None else chunk.actions[row]


class Latest(Executor):
    """Swaps at arrival, by time stamps."""

    class Config(Config):
        pass

    def __init__(self, config: Latest.Config | None = None) -> None:
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.chunk: Chunk | None = None
        self._old: Chunk | None = None

    def planned(self, now: float) -> np.ndarray | None:
        return _action_at(self.chunk, now)

    def _take(self, chunk: Chunk) -> None:
        self._old, self.chunk = self.chunk, chunk

    def _planned_before(self, now: float) -> np.ndarray | None:
        return _action_at(self._old, now)

    def _grid(self, now: float) -> tuple[float, float] | None:
        row = None if self.chunk is None else row_at(self.chunk, now)
        return None if self.chunk is None or row is None else (self.chunk.obs_time + row * self.chunk.dt, self.chunk.dt)


class Receding(Latest):
    """Carries out the first ``rows`` rows of a chunk from its arrival on, whenever it was observed; then waits for the next.

    For a robot that stands still while it thinks: then the observation is still right when the chunk arrives.
    """

    class Config(Config):
        rows: int = pydantic.Field(default=8, ge=1)

    def __init__(self, config: Receding.Config | None = None) -> None:
        self.config = config or Receding.Config()
        super().__init__()

    def _take(self, chunk: Chunk) -> None:
        rows = chunk.actions[: self.config.rows]
        super()._take(Chunk(rows, max(chunk.ready_time, chunk.obs_time), chunk.dt, chunk.ready_time, chunk.index))


class Ensemble(Executor):
    """Temporal ensembling: ``sum w_i a_i / sum w_i`` over all chunks that plan for now, ``w_i = exp(-m i)``, i = 0 the oldest.

    ``m`` = .01 as ACT (arXiv 2304.13705) has it nearly averages; a negative one prefers the newest. Averages between two ways
    around something lead into it.
    """

    class Config(Config):
        m: float = 0.01

    def __init__(self, config: Ensemble.Config | None = None) -> None:
        self.config = config or Ensemble.Config()
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self._chunks: list[Chunk] = []  # oldest first

    def planned(self, now: float) -> np.ndarray | None:
        return self._mean(self._chunks, now)

    def _mean(self, chunks: list[Chunk], now: float) -> np.ndarray | None:
        total, norm, weight = None, 0.0, 1.0
        for chunk in chunks:
            row = _action_at(chunk, now)
            if row is not None:
                total = weight * row.astype(np.float64) if total is None else total + weight * row
                norm += weight
                weight *= math.exp(-self.config.m)
        return None if total is None else (total / norm).astype(self._chunks[-1].actions.dtype)

    def _take(self, chunk: Chunk) -> None:
        self._chunks = [c for c in self._chunks if c.obs_time + len(c.actions) * c.dt > chunk.ready_time] + [chunk]

    def _planned_before(self, now: float) -> np.ndarray | None:
        return self._mean(self._chunks[:-1], now)

    def _grid(self, now: float) -> tuple[float, float] | None:
        for chunk in reversed(self._chunks):
            row = row_at(chunk, now)
            if row is not None:
                return chunk.obs_time + row * chunk.dt, chunk.dt
        return None


EXECUTORS: Mapping[str, str] = {
    "latest": "robopolicy.deploy.executor:Latest",
    "receding": "robopolicy.deploy.executor:Receding",
    "ensemble": "robopolicy.deploy.executor:Ensemble",
}


def make_executor(setting: Mapping[str, object] | str) -> Executor:
    """The executor that ``{type: ensemble, m: 0.1}``, or a name, asks for. Raises ConfigError."""
    cls, config = component("executor", setting, EXECUTORS)
    executor: Executor = cls(config)
    return executor
