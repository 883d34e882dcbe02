"""What came last: one slot for each topic, with the times of its message, and a count of those that were refused.

A message that cannot be trusted (NaN, wrong names or lengths, older than the one before, the same again) does not enter the slot.
What the slot holds then grows old, and the safety filter holds the arm as it does when nothing comes at all.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from hardware.ros2.messages import Rejected
from hardware.ros2.runtime import RosClock
from robopolicy.deploy.safety import Stamp

_CLOCK_SET = 1_000_000_000  # [ns]: stamps that go back farther were not overtaken on the way, the source's clock was set
_RATE_OF = 50  # messages
_RECYCLED = 3  # buffers that a driver may hand out in turn
_BESIDE = 1.0  # [s] since which a publisher is not heard any more

T = TypeVar("T")


class Latest(NamedTuple, Generic[T]):
    """The newest good message.

    Attributes:
        value: What its reader made of it.
        stamp: When it came, and was made.
        number: How many good ones there were up to it.
    """

    value: T
    stamp: Stamp
    number: int


class Slot(Generic[T]):
    """The newest good message of one topic. Written by one thread, read by any.

    Args:
        name: Of the input, for messages.
        clock: Of the stamps.
        read: Message to value; raises Rejected.
        compared: Values are arrays, and :attr:`unchanged` looks at them, and at the last few that differed: up to 4 us for a
            pose, 0.25 ms for a picture of 640x480.

    Attributes:
        latest: None until one came.
        rejected: How many were refused, by kind; ``out_of_order`` and ``duplicate`` are found here. ``clock_set`` is a note:
            those were taken.
        last_rejection: Why the last one was, for people.
    """

    def __init__(self, name: str, clock: RosClock, read: Callable[[Any], T], *, compared: bool = False) -> None:
        self.name, self._clock, self._read, self._compared = name, clock, read, compared
        self.latest: Latest[T] | None = None
        self._changed = 0.0  # when a message last came that was unlike those before
        self._seen: deque[T] = deque(maxlen=_RECYCLED)  # values that differ, where they are compared
        self._heard: dict[bytes, tuple[float, float]] = {}  # publisher: since when it is heard, and until when
        self.rejected: Counter[str] = Counter()
        self.last_rejection = ""
        self._refused_at = -math.inf
        self._newest: int | None = None  # stamp [ns]
        self._arrivals: deque[float] = deque(maxlen=_RATE_OF)

    def take(self, message: Any, origin: bytes | None = None) -> None:
        """A message came: the subscription's callback, see :func:`with_origin`."""
        self.accept(message, self._clock.now(), origin)

    def accept(self, message: Any, came: float, origin: bytes | None = None) -> None:
        """The same for one that came at ``came``."""
        header = getattr(message, "header", None)
        made = None if header is None else self._clock.made(header.stamp)
        nanoseconds = None if header is None or made is None else header.stamp.sec * 1_000_000_000 + header.stamp.nanosec
        try:
            value = self._read(message)
            if origin is not None:  # of what is ours: others may use the topic for joints that are not
                self._hear(origin, came)
            self._in_order(nanoseconds)
        except Rejected as error:
            self.rejected[error.kind] += 1
            self.last_rejection, self._refused_at = str(error), came
            return
        self._newest = nanoseconds
        self._arrivals.append(came)
        before = self.latest
        if not self._compared or not any(np.array_equal(value, one) for one in self._seen):  # type: ignore[arg-type]
            self._changed = came
            if self._compared:
                self._seen.append(value)
        self.latest = Latest(value, Stamp(came, made), 1 if before is None else before.number + 1)

    def _in_order(self, stamp: int | None) -> None:
        if stamp is None or self._newest is None:
            return
        later = stamp - self._newest
        if later < -_CLOCK_SET:
            self.rejected["clock_set"] += 1
        elif later < 0:
            raise Rejected("out_of_order", f"made {-later * 1e-9:.3g} s before the one that came before it")
        elif later == 0:
            raise Rejected("duplicate", "the same stamp again")

    def age(self, now: float) -> float:
        """Since the newest came, or was made, whichever is longer [s]; infinite when none came."""
        if (latest := self.latest) is None:
            return float("inf")
        stamp = latest.stamp
        return now - (stamp.came if stamp.made is None else min(stamp.came, stamp.made))

    def arriving(self, now: float) -> bool:
        """Whether a good message came within the last second, in which :meth:`origins` looks."""
        return self.latest is not None and now - self.latest.stamp.came <= _BESIDE

    @property
    def unchanged(self) -> float:
        """For how long the same value has come again and again, or the last few in turn, to the bit [s]; 0: not compared."""
        return 0.0 if self.latest is None else max(0.0, self.latest.stamp.came - self._changed)

    def refusing(self, now: float) -> str:
        """Why the last one was refused, if that was within a second and none was good since; empty: it was not."""
        good = -math.inf if self.latest is None else self.latest.stamp.came
        return self.last_rejection if self._refused_at > good and now - self._refused_at <= _BESIDE else ""

    def origins(self, now: float) -> list[bytes]:
        """Publishers whose good messages come side by side; one that took over from another stands alone."""
        heard = [(origin, first, last) for origin, (first, last) in list(self._heard.items()) if now - last <= _BESIDE]
        newest = max((first for _, first, _ in heard), default=0.0)
        return [origin for origin, _, last in heard if last >= newest]

    def _hear(self, origin: bytes, came: float) -> None:
        first, last = self._heard.get(origin, (came, came))
        self._heard[origin] = first if came - last <= _BESIDE else came, came

    @property
    def rate(self) -> float:
        """Of the last messages [Hz]; 0 when there were fewer than two."""
        arrivals = tuple(self._arrivals)
        span = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else 0.0
        return (len(arrivals) - 1) / span if span > 0 else 0.0


def with_origin(callback: Callable[[Any, bytes | None], None]) -> Callable[..., None]:
    """For a subscription: ``callback(message, origin)``, by the publisher's gid as discovery has it; None: nobody says.

    rclpy asks a callback's signature whether it wants a message's info, which has the gid. It should then hand over two
    arguments; the EventsExecutor of the wheels hands over one, a tuple of both, and older ones know no gid.
    """

    def take(*given: Any) -> None:
        message, info = given[0] if isinstance(given[0], tuple) else given if len(given) == 2 else (given[0], None)
        gid = info.get("publisher_gid") if isinstance(info, Mapping) else None
        callback(message, None if gid is None else bytes(gid["data"]))

    take.__signature__ = inspect.signature(lambda message, info: None)  # type: ignore[attr-defined]
    return take


class Decoder:
    """Pictures are decoded in a thread of their own, the newest of each camera: joint states do not wait for them."""

    def __init__(self, clock: RosClock) -> None:
        self._clock = clock
        self._waiting: dict[str, tuple[Slot[Any], Any, float, bytes | None]] = {}
        self._there = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def callback(self, slot: Slot[Any]) -> Callable[[Any, bytes | None], None]:
        """For the subscription of a slot, instead of :meth:`Slot.take`."""

        def take(message: Any, origin: bytes | None = None) -> None:
            with self._there:
                self._waiting[slot.name] = (slot, message, self._clock.now(), origin)
                self._there.notify()

        return take

    def close(self) -> None:
        with self._there:
            self._ended = True
            self._there.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._there:
                self._there.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return
                waiting, self._waiting = self._waiting, {}
            for slot, message, came, origin in waiting.values():
                slot.accept(message, came, origin)
