"""Streams of the virtual arm: readings through a :class:`Channel` of faults, and on as the messages that drivers send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hardware.ros2 import messages
from hardware.ros2.contract import message_type
from hardware.ros2.faults import Channel, Reading
from hardware.ros2.profile import Input
from hardware.ros2.runtime import RosClock

FRAME = "world"


class Stream:
    """One topic: readings through a channel of faults, and on as messages."""

    def __init__(self, publisher: Any, make: Callable[[Reading, Any], Any], seed: int, clock: RosClock) -> None:
        self.publisher, self._make, self._clock, self.channel = publisher, make, clock, Channel(seed)

    def push(self, moment: float, values: np.ndarray, names: tuple[str, ...]) -> None:
        """What was measured at ``moment`` on the clock."""
        stamp = self._clock.stamp(moment)
        self.channel.push(self._clock.now(), Reading(stamp.sec * 1_000_000_000 + stamp.nanosec, values, names))
        self.flush()

    def flush(self) -> None:
        """Send what is due."""
        for reading in self.channel.due(self._clock.now()):
            stamp = max(reading.stamp, 1)
            time = message_type("builtin_interfaces/msg/Time")(sec=stamp // 1_000_000_000, nanosec=stamp % 1_000_000_000)
            self.publisher.publish(self._make(reading, time))


def joint_state(reading: Reading, stamp: Any) -> Any:
    message = messages.joint_state(reading.names, reading.values[0], reading.values[1], stamp, FRAME)
    message.effort = reading.values[2].tolist()
    return message


def pose(reading: Reading, stamp: Any) -> Any:
    values = np.zeros(7)
    values[: len(reading.values)] = reading.values
    return messages.pose(values[:3], values[3:], stamp, reading.names[0])


def packed(picture: np.ndarray, source: Input) -> tuple[np.ndarray, tuple[str, ...]]:
    """Bytes of a picture, and what they are."""
    if source.type == "compressed":
        message = messages.compressed(picture, message_type("builtin_interfaces/msg/Time")())
        return np.frombuffer(message.data, np.uint8), (message.format,)
    message = messages.image(picture, message_type("builtin_interfaces/msg/Time")(), encoding=source.encoding)
    return np.frombuffer(message.data, np.uint8), (source.encoding,)


def compressed(reading: Reading, stamp: Any) -> Any:
    message = message_type("sensor_msgs/msg/CompressedImage")(format=reading.names[0], data=reading.values.tobytes())
    message.header.stamp, message.header.frame_id = stamp, FRAME
    return message


def raw(height: int, width: int) -> Callable[[Reading, Any], Any]:
    def make(reading: Reading, stamp: Any) -> Any:
        encoding = reading.names[0]
        step = width * messages.CHANNELS.get(encoding.removeprefix("not_"), 3)
        message = message_type("sensor_msgs/msg/Image")(height=height, width=width, encoding=encoding, step=step)
        message.header.stamp, message.header.frame_id, message.data = stamp, FRAME, reading.values.tobytes()
        return message

    return make
