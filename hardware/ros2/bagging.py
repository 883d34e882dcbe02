"""Bags and live topics: record what comes, as it comes; replay what was, now."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hardware.ros2.bagfile import Bag, BagError, BagWriter, Message, Storage, open_bag, restamped
from hardware.ros2.contract import DEADMAN, ESTOP, NODE_TOPICS, Quality, message_type, robot_topics
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
_PATIENCE = 15.0  # [s] beyond its seconds that a recording waits for its first message
_LATCHED = ("std_msgs/msg/Bool", "std_msgs/msg/String")  # states, of which the last one holds
_MEASURED = ("state", "gripper_state", "success")  # keys of topics, beside inputs
_HANDS = (ESTOP, DEADMAN)  # in any namespace, as permits


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
    ``seconds`` are those after the first message: on a busy computer it takes seconds to find a publisher.

    Raises:
        BagError: The bag cannot be written (any more), what was written until a second before is in it; or there are ``seconds``
            and nothing has come for 15 s more, and there is no bag.
    """
    node = ros.node("robopolicy_bag", namespace=namespace or None)
    wanted = {node.resolve_topic_name(name) for name in topics}
    with BagWriter(out, storage, reserve) as writer:
        state = {"looked": -_LOOK, "told": time.monotonic()}

        def look() -> bool:
            now = time.monotonic()
            if now - state["looked"] >= _LOOK:
                state["looked"] = now
                _subscribe(node, wanted, writer, told)
            if writer.counts:
                state.setdefault("first", now)
            passed = now - state.get("first", now)
            if now - state["told"] >= _TELL:
                state["told"] = now
                told(f"{passed:.0f} s, {sum(writer.counts.values())} messages" if writer.counts else "no message yet")
            if seconds is not None and not writer.counts and now - began > seconds + _PATIENCE:
                return True
            return writer.error is not None or (seconds is not None and passed > seconds)

        began = time.monotonic()
        ros.spin(look)
    for name in sorted(wanted):
        told(f"nobody published '{name}'; it is not in the bag")
    if writer.error is not None:
        raise writer.error
    if seconds is not None and not writer.counts and not ros.stopping.is_set():
        shutil.rmtree(out)
        raise BagError(
            f"no message has come within {seconds + _PATIENCE:g} s, and there is no bag; start the driver, or check --namespace "
            "and ROS_DOMAIN_ID"
        )
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
    profile: RosProfile,
    topics: Sequence[str] = (),
    *,
    namespace: str = "",
    commands: bool = False,
    rate: float = 1.0,
    keep_stamps: bool = False,
    told: Callable[[str], None] = print,
) -> dict[str, int]:
    """Publish the messages of a bag, at their times from each other; messages of each topic.

    Only what the profile reads: measurements and inputs. ``topics`` are some of them, and with ``commands`` any others, too; but
    never an emergency stop or a deadman, which are a person's, or a permit, which is the arm's. Header stamps are moved to now,
    for whoever watches their ages; ``keep_stamps`` leaves them.

    Raises:
        BagError: The bag cannot be read or has nothing of that, a topic is not to be replayed, or somebody else publishes it.
    """
    counts: dict[str, int] = {}
    with open_bag(path) as bag:
        chosen = choose(bag.types, profile, topics, namespace=namespace, commands=commands, told=told)
        node = ros.node("robopolicy_replay")
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


def choose(
    types: Mapping[str, str],
    profile: RosProfile,
    topics: Sequence[str] = (),
    *,
    namespace: str = "",
    commands: bool = False,
    told: Callable[[str], None] = print,
) -> set[str]:
    """Those topics of a bag that may be replayed, see :func:`replay`; ``types``: those it has. Tells which are left out, and why.

    Raises:
        BagError: One that was asked for must not be, or none is left.
    """
    prefix = f"/{namespace.strip('/')}".rstrip("/")

    def full(name: str) -> str:
        return name if name.startswith("/") else f"{prefix}/{name}"

    permits = [f"/{permit.topic.strip('/')}" for permit in (profile.permits or {}).values()]

    def never(name: str) -> str:
        if name.split("/")[-1] in _HANDS:
            return "it speaks for a person's hand, and no recording may; it is never replayed"
        if any(name.endswith(permit) for permit in permits):
            return "it is a permit, and no recording may say that an arm takes commands; it is never replayed"
        return ""

    robot, asked = robot_topics(profile), {full(name) for name in topics}
    sent = {full(topic.name) for topic in robot if topic.direction == "out"}
    measured = [topic for topic in robot if topic.key in _MEASURED or topic.key.startswith("input.")]
    read = {full(topic.name): topic.type for topic in measured if full(topic.name) not in sent}

    def why(name: str) -> str:
        """It is not replayed; empty: it is."""
        if reason := never(name):
            return reason
        if commands and name in asked:
            return ""
        if name not in read:
            return "the profile does not read it, it may command an arm, past the safety filter"
        type_ = types.get(name, read[name])
        return "" if type_ == read[name] else f"it carries {type_}, the profile reads {read[name]}"

    for name in sorted(asked):
        if reason := why(name):
            mend = "" if never(name) else "; say --commands if nothing can be hit"
            raise BagError(f"'{name}': {reason}{mend}")
        if name not in types:
            told(f"'{name}' is not in the bag")
    found = {name for name in types if name in asked or not asked}
    for name in sorted(name for name in found if why(name)):
        told(f"'{name}' is left out: {why(name)}")
    if not (chosen := {name for name in found if not why(name)}):
        raise BagError(
            f"the bag has {', '.join(sorted(types)) or 'no topics'}; the profile reads nothing of that: give the right "
            "--profile, or the --namespace it was recorded in"
        )
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
