"""Bags and live topics: record what comes, as it comes; replay what was, now."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hardware.ros2.bagfile import Bag, BagError, BagWriter, Message, Storage, open_bag, restamped
from hardware.ros2.contract import NODE_TOPICS, Quality, message_type, robot_topics
from hardware.ros2.heard import COMMANDED_TOPIC
from hardware.ros2.profile import RosProfile
from hardware.ros2.runtime import Ros
from hardware.ros2.topics import node_of

POLICY_NODE = "robopolicy_policy"
_DEPTH = 100  # messages that may wait for us
_LOOK = 0.5  # [s] between looks for topics that have appeared
_OTHERS = 1.0  # [s] for other publishers to be found before a replay
_DISCOVERY = 5.0  # [s] at most for subscribers to be found before a replay: on a busy computer it took 3.6
_TELL = 1.0  # [s]
_LATCHED = ("std_msgs/msg/Bool", "std_msgs/msg/String")  # states, of which the last one holds


def profile_topics(profile: RosProfile) -> dict[str, str]:
    """Relative name -> type of all that belongs to a robot and its policy."""
    topics = {topic.name: topic.type for topic in robot_topics(profile)}
    topics |= {topic.name.replace("~", POLICY_NODE): topic.type for topic in NODE_TOPICS}
    return topics | {f"{POLICY_NODE}/shadow": "sensor_msgs/msg/JointState", COMMANDED_TOPIC: "sensor_msgs/msg/JointState"}


def record(
    ros: Ros,
    out: Path,
    topics: Sequence[str],
    *,
    namespace: str = "",
    storage: Storage = "mcap",
    reserve: float = 500.0,
    seconds: float | None = None,
    told: Callable[[str], None] = print,
) -> dict[str, int]:
    """Write every message of the topics into a bag, until told to stop; messages of each topic.

    A topic is subscribed to once somebody publishes it, as that publisher offers it: reliable, latched, or neither.

    Raises:
        BagError: The bag cannot be written (any more). What was written until a second before is in it.
    """
    node = ros.node("robopolicy_bag", namespace=namespace or None)
    wanted = {node.resolve_topic_name(name) for name in topics}
    begin = time.monotonic()
    with BagWriter(out, storage, reserve) as writer:
        state = {"looked": -_LOOK, "told": begin}

        def look() -> bool:
            now = time.monotonic()
            if now - state["looked"] >= _LOOK:
                state["looked"] = now
                _subscribe(node, wanted, writer, told)
            if now - state["told"] >= _TELL:
                state["told"] = now
                told(f"{now - begin:.0f} s, {sum(writer.counts.values())} messages")
            return writer.error is not None or (seconds is not None and now - begin > seconds)

        ros.spin(look)
    for name in sorted(wanted):
        told(f"nobody published '{name}'; it is not in the bag")
    if writer.error is not None:
        raise writer.error
    return writer.counts


def _subscribe(node: Any, wanted: set[str], writer: BagWriter, told: Callable[[str], None]) -> None:
    """To those of ``wanted`` that somebody publishes now, which are taken out of it."""
    from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

    for name in sorted(wanted):
        publishers = [info for info in node.get_publishers_info_by_topic(name) if info.node_name != node.get_name()]
        if not publishers:
            continue
        wanted.discard(name)
        type_ = publishers[0].topic_type
        if not writer.knows(type_):
            told(f"'{name}' carries {type_}, which is not known here; it is left out")
            continue
        reliable = all(info.qos_profile.reliability == ReliabilityPolicy.RELIABLE for info in publishers)
        latched = all(info.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for info in publishers)

        def take(data: bytes, name: str = name, type_: str = type_) -> None:
            if writer.error is None:
                writer.write(Message(name, type_, time.time_ns(), data))

        node.create_subscription(message_type(type_), name, take, Quality(reliable, _DEPTH, latched).to_ros(), raw=True)
        told(f"recording '{name}' ({type_})")


def replay(
    ros: Ros,
    path: Path,
    topics: Sequence[str],
    *,
    rate: float = 1.0,
    keep_stamps: bool = False,
    told: Callable[[str], None] = print,
) -> dict[str, int]:
    """Publish the messages of a bag, at their times from each other; messages of each topic.

    Header stamps are moved to now, for whoever watches their ages; ``keep_stamps`` leaves them.

    Raises:
        BagError: The bag cannot be read, has none of the topics, or somebody else publishes one of them.
    """
    node = ros.node("robopolicy_replay")
    counts: dict[str, int] = {}
    with open_bag(path) as bag:
        chosen = _chosen(bag, topics)
        found = time.monotonic() + _OTHERS
        ros.spin(lambda: time.monotonic() > found)  # a node that is new knows of nobody yet
        publishers = {name: _publisher(node, bag, name) for name in chosen}
        end = time.monotonic() + _DISCOVERY
        ros.spin(lambda: time.monotonic() > end or all(p.get_subscription_count() for p in publishers.values()))
        for name in chosen:
            _alone(node, name, own=1)
        stamped = {name: bag.stamped(name) and not keep_stamps for name in chosen}
        begin, wall = time.monotonic(), time.time_ns()
        for message in bag.messages(chosen):
            due = begin + (message.came - bag.start) * 1e-9 / rate
            while (left := due - time.monotonic()) > 0 and not ros.stopping.wait(min(left, 0.1)):
                pass
            if ros.stopping.is_set():
                break
            # The age that a stamp had when it came, it shall have now.
            shift = wall + int((message.came - bag.start) / rate) - message.came
            publishers[message.topic].publish(restamped(message.data, shift) if stamped[message.topic] else message.data)
            counts[message.topic] = counts.get(message.topic, 0) + 1
    told(f"{sum(counts.values())} messages of {len(counts)} topics")
    return counts


def _chosen(bag: Bag, topics: Sequence[str]) -> set[str]:
    chosen = {name if name.startswith("/") else f"/{name}" for name in topics} & set(bag.types)
    if not chosen:
        raise BagError(f"the bag has {', '.join(sorted(bag.types)) or 'no topics'}; name some of them with --topic")
    return chosen


def _alone(node: Any, name: str, own: int = 0) -> None:
    """Raises BagError when somebody else publishes on the topic, beside ``own`` of ours: two masters make an arm jump."""
    if len(found := node.get_publishers_info_by_topic(name)) > own:
        others = [info for info in found if info.node_name != node.get_name()]
        who = node_of((others or found)[0])
        raise BagError(f"'{name}' is published by {who} already; end it, or replay in another ROS_DOMAIN_ID")


def _publisher(node: Any, bag: Bag, name: str) -> Any:
    _alone(node, name)
    latched = bag.types[name] in _LATCHED  # receives from it who wants the last one, and who does not
    return node.create_publisher(message_type(bag.types[name]), name, Quality(True, 1 if latched else _DEPTH, latched).to_ros())
