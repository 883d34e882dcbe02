"""``Status``: what the arbiter is doing and how well, as one immutable value for diagnostics, logs and pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from robopolicy.deploy.clock import Tick
from robopolicy.deploy.latency import percentiles
from robopolicy.deploy.requests import Answer
from robopolicy.deploy.safety import Result
from robopolicy.deploy.sources import Target, age
from robopolicy.robot import State


class Period(NamedTuple):
    """What happened in one period.

    Attributes:
        tick: When.
        state: As measured.
        source: Who commanded.
        target: What it wanted.
        result: What the safety filter let through; ``executed`` was sent (in shadow mode: would have been).
    """

    tick: Tick
    state: State
    source: str
    target: Target
    result: Result


@dataclass(frozen=True)
class Status:
    """A snapshot.

    Attributes:
        time: Begin of the last period, on the control clock [s]. One that does not move on: control hangs.
        mode: ``idle`` (never started: nothing is sent), ``starting`` (the first plan is awaited), ``running``, ``holding``,
            ``stopped``, ``estopped``.
        source: Who commands.
        shadow: Nothing is sent.
        cause: Of the last hold, stop or refusal; empty while it runs.
        muted: Why nothing is sent until the next start, as for a second master; empty: it is.
        reasons: Interventions and warnings of the last period.
        request: The last request, but deadmen, and what came of it.
        fault: The last exception in a period; empty when there was none.
        deadman: Whether it is pressed; None: there is none.
        names: Of the coordinates.
        measured: Positions ``[n]``.
        set_point: What was sent last ``[n]``; None: nothing was.
        ages: Of ``state``, of the inputs that the source looks at, and of the ``command``'s observation [s].
        rate: Periods per second in the last seconds.
        lateness_ms, work_ms: Percentiles of the last seconds.
        periods, skipped, missed: Since the beginning.
        counters: Periods with each kind of reason.
        events: How often each kind began.
        reports: Of each source: latency of inference, chunks, periods without one.
        notes: What the system did not permit.
    """

    time: float
    mode: str
    source: str
    shadow: bool
    cause: str
    muted: str
    reasons: tuple[str, ...]
    request: Answer | None
    fault: str
    deadman: bool | None
    names: tuple[str, ...]
    measured: tuple[float, ...]
    set_point: tuple[float, ...] | None
    ages: Mapping[str, float]
    rate: float
    lateness_ms: Mapping[str, float]
    work_ms: Mapping[str, float]
    periods: int
    skipped: int
    missed: int
    counters: Mapping[str, int]
    events: Mapping[str, int]
    reports: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]


def ages(period: Period) -> dict[str, float]:
    """Of everything that went into a period [s]."""
    now, target = period.tick.start, period.target
    found = {"state": age(now, period.state.stamp)}
    found |= {name: age(now, stamp) for name, stamp in (target.stamps or {}).items()}
    return found if target.positions is None else found | {"command": target.age}


def timing(rows: np.ndarray) -> tuple[float, dict[str, float], dict[str, float]]:
    """Rate [Hz], lateness and work [ms] of logged periods."""
    late, work = 1e3 * (rows["start"] - rows["deadline"]), 1e3 * (rows["finish"] - rows["start"])
    span = float(rows["start"][-1] - rows["start"][0]) if len(rows) > 1 else 0.0
    return (len(rows) - 1) / span if span > 0 else 0.0, percentiles(late), percentiles(work)
