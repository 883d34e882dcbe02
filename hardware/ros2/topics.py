"""Looking at topics from outside: who publishes and listens with which quality of service, how often, how large, how old."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hardware.ros2.contract import Topic, message_type
from hardware.ros2.inputs import with_origin

UNKNOWN = "_NODE_NAME_UNKNOWN_"  # of a node whose topics are heard of before its name, and forgotten after it
_KEPT = 20_000  # messages of a topic that are remembered
# Types that begin with a header, whose stamp can be read from the first bytes without decoding an image.
_STAMPED = ("JointState", "Image", "CompressedImage", "PoseStamped", "TwistStamped", "JointTrajectory", "DiagnosticArray")


class End(NamedTuple):
    """A publisher or a subscription.

    Attributes:
        node: Full name.
        type: As it writes the message's type.
        trouble: Why it does not fit the contract's quality of service; empty: it does.
    """

    node: str
    type: str
    trouble: str = ""


@dataclass
class Seen:
    """What a topic looked like.

    Attributes:
        name: In full.
        publishers, subscriptions: Ours left out.
        seconds: For so long it was listened to.
        arrivals: ``[messages]`` when each came, on the monotonic clock [s].
        ages: Now less the header's stamp, of those that have one [s]; negative: from the future.
        largest: Message [bytes].
        joints: Names in the last message of joint states.
        mad: Messages of joint states with a position that is no number.
        said: The last Bool of a permit; None: none came.
        speakers: Publishers whose messages came and that are still there: their nodes, and the joints of joint states.
    """

    name: str
    publishers: list[End] = field(default_factory=list)
    subscriptions: list[End] = field(default_factory=list)
    seconds: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    largest: int = 0
    joints: tuple[str, ...] = ()
    mad: int = 0
    said: bool | None = None
    speakers: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Messages a second, from the first to the last; 0 where fewer than two came."""
        span = self.arrivals[-1] - self.arrivals[0] if len(self.arrivals) > 1 else 0.0
        return (len(self.arrivals) - 1) / span if span > 0 else 0.0

    @property
    def longest_gap(self) -> float:
        """Between two messages [s]; NaN where fewer than two came."""
        return float(np.diff(self.arrivals).max()) if len(self.arrivals) > 1 else math.nan

    @property
    def age(self) -> float | None:
        """Median [s]; None: nothing is stamped."""
        return float(np.median(self.ages)) if self.ages else None


def look(ros: Any, node: Any, topics: Iterable[Topic], seconds: float, settle: float = 1.0) -> dict[str, Seen]:
    """Listen to all of ``topics`` for so long: key -> what was seen.

    ``ros`` is a :class:`~hardware.ros2.runtime.Ros` that nobody else spins, ``node`` one of its nodes; the first ``settle``
    seconds are for discovery. Subscriptions are best effort, which every publisher fits; whether ours would fit is judged from
    what discovery says.
    """
    topics = list(topics)
    seen = {topic.key: Seen(full_name(topic.name, node)) for topic in topics}
    end = time.monotonic() + settle
    ros.spin(until=lambda: time.monotonic() > end)
    heard: dict[str, dict[bytes, tuple[str, ...]]] = {topic.key: {} for topic in topics}
    subscriptions = [
        _listen(node, topic, seen[topic.key], heard[topic.key])
        for topic in topics
        if topic.direction == "in" or topic.key == "command"
    ]
    begin = time.monotonic()
    ros.spin(until=lambda: time.monotonic() > begin + seconds)
    for topic in topics:
        entry = seen[topic.key]
        entry.seconds = time.monotonic() - begin
        entry.publishers, entry.subscriptions = _ends(node, topic, entry.name)
        there = {bytes(info.endpoint_gid): info for info in node.get_publishers_info_by_topic(entry.name)}
        entry.speakers = [(node_of(there[gid]), joints) for gid, joints in heard[topic.key].items() if gid in there]
    for subscription in subscriptions:
        node.destroy_subscription(subscription)
    return seen


def full_name(name: str, node: Any) -> str:
    """With the node's namespace; ``~`` is left to the node whose name it is, so give such names in full."""
    return name if name.startswith("/") else f"{node.get_namespace().rstrip('/')}/{name}"


def _listen(node: Any, topic: Topic, entry: Seen, heard: dict[bytes, tuple[str, ...]]) -> Any:
    """Fill ``entry``; ``heard``: joints by publisher."""
    from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
    from rclpy.serialization import deserialize_message

    kind = message_type(topic.type)
    permit = topic.key.startswith("permit.")
    stamped, joints = topic.type.rpartition("/")[2] in _STAMPED, topic.type.endswith("/JointState")

    def came(raw: bytes, origin: bytes | None) -> None:
        now = time.monotonic()
        if len(entry.arrivals) >= _KEPT:
            return
        entry.arrivals.append(now)
        entry.largest = max(entry.largest, len(raw))
        if stamped and (made := stamp_of(raw)) is not None:
            entry.ages.append(time.time() - made)
        if permit:
            entry.said = bool(deserialize_message(raw, kind).data)
        if joints:
            message = deserialize_message(raw, kind)
            entry.joints = tuple(message.name)
            entry.mad += not all(map(math.isfinite, message.position))
        if origin is not None:
            heard[origin] = tuple(message.name) if joints else ()

    quality = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
    if permit:  # a latched word comes to those that ask for it
        quality = topic.quality.to_ros()
    return node.create_subscription(kind, entry.name, with_origin(came), quality, raw=True)


def stamp_of(raw: bytes) -> float | None:
    """The header's stamp in a serialized message that begins with one [s, wall clock]; None: not stamped."""
    order = "<" if raw[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", raw, 4)
    return None if seconds == 0 and nanoseconds == 0 else seconds + 1e-9 * nanoseconds


def _ends(node: Any, topic: Topic, name: str) -> tuple[list[End], list[End]]:
    """Publishers and subscriptions of others, each with its trouble against our side of the contract."""
    ours = topic.quality.to_ros()
    own = (node.get_name(), node.get_namespace())
    publishers = [
        End(node_of(info), info.topic_type, _trouble(info.qos_profile, ours) if topic.direction == "in" else "")
        for info in node.get_publishers_info_by_topic(name)
        if (info.node_name, info.node_namespace) != own
    ]
    subscriptions = [
        End(node_of(info), info.topic_type, _trouble(ours, info.qos_profile) if topic.direction == "out" else "")
        for info in node.get_subscriptions_info_by_topic(name)
        if (info.node_name, info.node_namespace) != own
    ]
    return publishers, subscriptions


def node_of(info: Any) -> str:
    """Full name of the node behind a publisher or subscription."""
    if info.node_name == UNKNOWN:
        return "a node that is not known by name yet"
    return f"{info.node_namespace.rstrip('/')}/{info.node_name}"


def _trouble(publisher: Any, subscription: Any) -> str:
    """Why no message passes; empty: they do."""
    from rclpy.qos import QoSCompatibility, qos_check_compatible

    compatible, reason = qos_check_compatible(_finite(publisher), _finite(subscription))
    errors = [part.strip() for part in reason.split(";") if part.strip().startswith("ERROR")]
    return "; ".join(errors) if compatible == QoSCompatibility.ERROR else ""


def _finite(profile: Any) -> Any:
    """Without infinite deadlines: discovery says so for "none", and the check takes it for a demand."""
    from rclpy.duration import Duration
    from rclpy.qos import QoSProfile

    found = QoSProfile(depth=1, reliability=profile.reliability, durability=profile.durability, liveliness=profile.liveliness)
    for name in ("deadline", "liveliness_lease_duration"):
        value = getattr(profile, name)
        setattr(found, name, value if value.nanoseconds < 1 << 60 else Duration())
    return found
