"""A bag in the place of a node: what runs on a robot's topics runs on those of a bag, on its time, with the same code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from hardware.ros2.bagfile import Bag, BagError, Message
from hardware.ros2.robot import RosRobot
from hardware.ros2.runtime import RosClock

_PICTURES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
_DECODED = 10.0  # [s] of the machine's time, for one picture


class BagClock(RosClock):
    """Seconds since a bag's first message; they pass when messages are delivered."""

    def __init__(self, start: int) -> None:
        self._start, self.time = start, 0.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, time: float) -> None:
        self.time = max(self.time, time)

    def of(self, wall: int) -> float:
        """A time in nanoseconds of the wall clock."""
        return (wall - self._start) * 1e-9

    def made(self, stamp: Any) -> float | None:
        return None if stamp.sec == stamp.nanosec == 0 else self.of(stamp.sec * 1_000_000_000 + stamp.nanosec)


class BagNode:
    """As much of rclpy's node as subscriptions need; messages reach them by :meth:`deliver`.

    Args:
        bag: Open.
        clock: Of the bag.
        namespace: That the robot's topics had.

    Attributes:
        robot: Whose pictures are waited for: it decodes them in a thread of its own.
    """

    def __init__(self, bag: Bag, clock: BagClock, namespace: str = "") -> None:
        self._bag, self._clock, self._namespace = bag, clock, namespace.strip("/")
        self._callbacks: dict[str, list[Callable[[Any], None]]] = {}
        self.robot: RosRobot | None = None

    def create_subscription(self, type_: Any, topic: str, callback: Callable[[Any], None], quality: Any) -> Any:
        name = topic if topic.startswith("/") else "/".join(("", *self._namespace.split("/") * bool(self._namespace), topic))
        self._callbacks.setdefault(name, []).append(callback)
        return SimpleNamespace(topic_name=name)

    def destroy_subscription(self, subscription: Any) -> None:
        self._callbacks.pop(subscription.topic_name, None)

    def get_publishers_info_by_topic(self, topic: str) -> list[Any]:
        return [SimpleNamespace(topic_type=self._bag.types[topic])] if topic in self._bag.types else []

    def messages(self) -> Iterator[Message]:
        """Those that somebody has subscribed to. Raises BagError when there are none."""
        wanted = set(self._callbacks) & set(self._bag.types)
        if not wanted:
            raise BagError(
                f"the bag has {', '.join(sorted(self._bag.types)) or 'no topics'}; the profile needs "
                f"{', '.join(sorted(self._callbacks))}: give the right --profile, or the --namespace it was recorded in"
            )
        return self._bag.messages(wanted)

    def deliver(self, message: Message) -> None:
        """A message comes, at its time."""
        self._clock.sleep_until(self._clock.of(message.came))
        value = self._bag.read(message)
        before = self._seen() if message.type in _PICTURES else -1
        for callback in self._callbacks.get(message.topic, ()):
            callback(value)
        if message.type in _PICTURES:
            end = time.monotonic() + _DECODED
            while self._seen() == before:
                if time.monotonic() > end:
                    raise BagError(f"a picture of '{message.topic}' was not decoded within {_DECODED:g} s")
                time.sleep(1e-4)

    def _seen(self) -> int:
        """Pictures that were taken or refused."""
        slots = [] if self.robot is None else self.robot.slots.values()
        return sum(sum(s.rejected.values()) + (0 if s.latest is None else s.latest.number) for s in slots)
