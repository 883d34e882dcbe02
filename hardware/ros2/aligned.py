"""Messages of many sources put side by side by when they were made, not by when they came. No ROS: the recorder and bags use it.

A camera's picture comes 30 to 100 ms after the joint angles of the same moment. Whoever stores what is newest stores that skew
with it. So rows are formed a little later than they are due, when everything made before has come.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, NamedTuple, TypeVar

from robopolicy.deploy.safety import Stamp

T = TypeVar("T")
_SLOWEST = 0.5  # [s]: what says it was made longer ago than this, or in the future, has a clock of its own
_AHEAD = 0.01  # [s] that clocks may disagree


class Entry(NamedTuple, Generic[T]):
    """One message.

    Attributes:
        value: What it says.
        made: When that was so, as far as can be told [s].
        stamp: As it came.
    """

    value: T
    made: float
    stamp: Stamp


class Track(Generic[T]):
    """The recent messages of one source. Not for several threads.

    A stamp is believed where it says that the message took between nothing and half a second; any other is of a clock that
    disagrees, and the time of arrival is taken instead.

    Args:
        keep: How much is kept behind the newest [s].

    Attributes:
        came: Messages so far.
        unstamped: Those whose stamp was missing or not believed.
        disordered: Those that were made before one that came earlier; they are dropped.
    """

    def __init__(self, keep: float = 2.0) -> None:
        self._keep = keep
        self._entries: deque[Entry[T]] = deque()
        self.came = self.unstamped = self.disordered = 0

    def add(self, value: T, stamp: Stamp) -> None:
        believed = stamp.made is not None and -_AHEAD <= stamp.came - stamp.made <= _SLOWEST
        made = stamp.made if believed and stamp.made is not None else stamp.came
        self.came += 1
        self.unstamped += not believed
        if self._entries and made < self._entries[-1].made:
            self.disordered += 1
            return
        self._entries.append(Entry(value, made, stamp))
        while len(self._entries) > 1 and self._entries[1].made < made - self._keep:
            self._entries.popleft()

    def at(self, time: float) -> Entry[T] | None:
        """The newest entry that was made by ``time``; None if there is none (it came later, or was dropped long ago)."""
        return next((entry for entry in reversed(self._entries) if entry.made <= time), None)

    @property
    def newest(self) -> Entry[T] | None:
        return self._entries[-1] if self._entries else None
