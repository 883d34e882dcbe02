"""Time: a clock that tests can fake, and deadlines that do not drift."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

_SWITCH_INTERVAL = 2e-4  # [s]: inference gives the interpreter up this often; Python's own 5 ms is more than a period


class Clock(Protocol):
    """A monotonic clock in seconds."""

    def now(self) -> float: ...

    def sleep_until(self, time: float) -> None:
        """Return at ``time``, or at once if it has passed."""
        ...


class SystemClock:
    """The machine's monotonic clock. Sleeps once: spinning before a deadline makes things worse where cores are few."""

    def now(self) -> float:
        return time.monotonic_ns() * 1e-9

    def sleep_until(self, time_: float) -> None:
        left = time_ - self.now()
        if left > 0:
            time.sleep(left)


class FakeClock:
    """A clock that only moves when it is told to, or slept on.

    Attributes:
        time: What it shows [s]; may be set.
    """

    def __init__(self, start: float = 0.0) -> None:
        self.time = start

    def now(self) -> float:
        return self.time

    def sleep_until(self, time: float) -> None:
        self.time = max(self.time, time)


class Tick(NamedTuple):
    """One period of a loop.

    Attributes:
        number: Of the period since the start; jumps when periods were skipped.
        deadline: When it should have begun [s].
        start: When it did [s].
        skipped: Whole periods that were lost before it.
    """

    number: int
    deadline: float
    start: float
    skipped: int


class Ticker:
    """Periods at ``start + k * period``: absolute, so that being late once does not make the rest late.

    A loop that is late by whole periods skips them: it never catches up with a burst of commands.
    """

    def __init__(self, clock: Clock, period: float, start: float | None = None) -> None:
        self._clock, self.period = clock, period
        self.begin = clock.now() if start is None else start
        self._next = 0

    def wait(self) -> Tick:
        """Sleep until the next period begins."""
        deadline = self.begin + self._next * self.period
        self._clock.sleep_until(deadline)
        now = self._clock.now()
        skipped = 0
        if now - deadline >= self.period:
            skipped = int((now - deadline) / self.period)
            self._next += skipped
            deadline = self.begin + self._next * self.period
        tick = Tick(self._next, deadline, now, skipped)
        self._next += 1
        return tick


def set_fifo(priority: int) -> None:
    """Real-time priority for the calling thread. Raises OSError where that is not permitted."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))


def permitted(action: Callable[[], None], what: str, notes: list[str]) -> None:
    """Do what the system may refuse, and note it if it does."""
    try:
        action()
    except OSError as error:
        notes.append(f"{what} was not permitted ({error.strerror})")


@contextmanager
def quiet(fifo: int | None, cpu: int | None, notes: list[str], *, collect: bool = False) -> Iterator[None]:
    """As few interruptions of the calling thread as can be had.

    Garbage collection never looks again at what exists now; short turns for other threads; and what is asked for.

    Args:
        fifo: Real-time priority; None: as it is.
        cpu: Processor; None: any.
        notes: What the system did not permit is added.
        collect: Go on collecting what is new, for programs that run for hours; otherwise it waits until the end.
    """
    collecting, interval = gc.isenabled(), sys.getswitchinterval()
    scheduled = hasattr(os, "sched_setscheduler")  # Linux
    if scheduled:
        affinity, policy = os.sched_getaffinity(0), (os.sched_getscheduler(0), os.sched_getparam(0))
    elif cpu is not None or fifo is not None:
        notes.append("priority and processor of control cannot be set on this system")
    gc.collect()
    gc.freeze()
    if not collect:
        gc.disable()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        if scheduled and cpu is not None:
            permitted(lambda: os.sched_setaffinity(0, {cpu}), f"cpu {cpu}", notes)
        if scheduled and fifo is not None:
            permitted(lambda: set_fifo(fifo), f"SCHED_FIFO {fifo} for control", notes)
        yield
    finally:
        if scheduled:
            os.sched_setscheduler(0, *policy)
            os.sched_setaffinity(0, affinity)
        sys.setswitchinterval(interval)
        gc.unfreeze()
        if collecting:
            gc.enable()
