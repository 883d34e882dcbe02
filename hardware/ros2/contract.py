"""The topics and services of the project as data: what nodes create, ``robopolicy doctor ros`` checks, and docs/ros2.md lists.

Names are relative: they follow the node's namespace, one for each arm, and remappings. Only messages that every ROS 2 has:
std_msgs, sensor_msgs, geometry_msgs, trajectory_msgs, diagnostic_msgs, std_srvs, lifecycle_msgs.

Subscriptions to sensors are best effort, which receives from reliable publishers as well; commands are reliable, because the
controllers' subscriptions are, and a reliable subscription receives nothing from a best-effort publisher.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from hardware.ros2.profile import RosProfile
from hardware.ros2.runtime import RosError, require


class Quality(NamedTuple):
    """Quality of service: what is promised about delivery. History is always KEEP_LAST.

    Attributes:
        reliable: Lost messages are sent again.
        depth: Messages that wait.
        latched: Late subscriptions get the last message (TRANSIENT_LOCAL).
    """

    reliable: bool
    depth: int = 1
    latched: bool = False

    def to_ros(self) -> Any:
        """As ``rclpy.qos.QoSProfile``."""
        from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

        return QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=self.depth,
            reliability=ReliabilityPolicy.RELIABLE if self.reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if self.latched else DurabilityPolicy.VOLATILE,
        )

    def __str__(self) -> str:
        return f"{'reliable' if self.reliable else 'best effort'}, last {self.depth}{', latched' if self.latched else ''}"


SENSOR = Quality(reliable=False)  # subscriptions to sensors: newest only
STATE_OUT = Quality(reliable=True, depth=10)  # what joint_state_broadcaster publishes with: also reliable subscriptions match
COMMAND = Quality(reliable=True)
SIGNAL = Quality(reliable=True)
LATCHED = Quality(reliable=True, latched=True)
DIAGNOSTICS = Quality(reliable=True, depth=10)

_WORDS = 10  # of a permit that may wait: a false is heard though a true follows at once

DEADMAN, ESTOP, DIAGNOSTICS_TOPIC = "deadman", "estop", "/diagnostics"

_TYPES = {
    "image": "sensor_msgs/msg/Image",
    "compressed": "sensor_msgs/msg/CompressedImage",
    "pose": "geometry_msgs/msg/PoseStamped",
}
_COMMANDS = {
    "position": "std_msgs/msg/Float64MultiArray",
    "velocity": "std_msgs/msg/Float64MultiArray",
    "trajectory": "trajectory_msgs/msg/JointTrajectory",
    "pose": "geometry_msgs/msg/PoseStamped",
    "twist": "geometry_msgs/msg/TwistStamped",
}
_JOINT_STATE = "sensor_msgs/msg/JointState"


class Topic(NamedTuple):
    """One topic, as the policy node sees it.

    Attributes:
        key: What it is to us: ``state``, ``command``, ``gripper``, ``gripper_state``, ``input.NAME``, ``permit.NAME``, ...
        name: Relative (or absolute) name.
        type: Of the messages, as ROS writes it.
        direction: ``in``: we subscribe. ``out``: we publish.
        quality: Ours. A publisher of the other side must offer at least as much as we ask for, and the other way around.
        what: One line, for people.
    """

    key: str
    name: str
    type: str
    direction: Literal["in", "out"]
    quality: Quality
    what: str


class Service(NamedTuple):
    """One service that we offer (``out``: call it at us) or call (``in``)."""

    name: str
    type: str
    what: str


def robot_topics(profile: RosProfile, inputs: Iterable[str] | None = None) -> tuple[Topic, ...]:
    """Topics between the policy and the arm of a profile; ``inputs``: names of those needed, None: all of the profile's."""
    state, command, gripper = profile.state, profile.command, profile.gripper
    state_type = _TYPES["pose"] if state.type == "pose" else _JOINT_STATE
    topics = [Topic("state", state.topic, state_type, "in", SENSOR, "measured positions, matched by name")]
    if gripper is not None and gripper.state_topic is not None:
        topics.append(Topic("gripper_state", gripper.state_topic, _JOINT_STATE, "in", SENSOR, "measured gripper"))
    for name in profile.inputs if inputs is None else inputs:
        source = profile.inputs[name]
        what = "pose" if source.type == "pose" else "camera"
        topics.append(Topic(f"input.{name}", source.topic, _TYPES[source.type], "in", SENSOR, f"{what} '{name}'"))
    for name, permit in (profile.permits or {}).items():
        quality = (LATCHED if permit.latched else SENSOR)._replace(depth=_WORDS)
        topics.append(Topic(f"permit.{name}", permit.topic, "std_msgs/msg/Bool", "in", quality, f"permit '{name}'"))
    topics.append(Topic("command", command.topic, _COMMANDS[command.type], "out", COMMAND, "what the controller carries out"))
    if gripper is not None and gripper.type == "float64":
        topics.append(Topic("gripper", gripper.topic, "std_msgs/msg/Float64", "out", COMMAND, "the gripper's target, on change"))
    if profile.success is not None:
        topics.append(Topic("success", profile.success, "std_msgs/msg/Bool", "in", LATCHED, "the goal has been met"))
    return tuple(topics)


# Of the policy node, beside the robot's; `~` is the node's own name.
NODE_TOPICS = (
    Topic("estop", ESTOP, "std_msgs/msg/Bool", "in", SIGNAL, "true: emergency stop, latched; false lifts nothing, see ~/reset"),
    Topic("deadman", DEADMAN, "std_msgs/msg/Bool", "in", SENSOR, "pressed; needed several times a second with deadman:=true"),
    Topic("node_state", "~/state", "std_msgs/msg/String", "out", LATCHED, "mode, source and cause, on change"),
    Topic("commanded", "~/commanded", _JOINT_STATE, "out", SIGNAL, "what was wanted, before the safety filter"),
    Topic("shadow", "~/shadow", _JOINT_STATE, "out", SIGNAL, "in shadow mode: what would have been sent"),
    Topic("diagnostics", DIAGNOSTICS_TOPIC, "diagnostic_msgs/msg/DiagnosticArray", "out", DIAGNOSTICS, "10 times a second"),
)
NODE_SERVICES = (
    Service("~/start", "std_srvs/srv/Trigger", "let the policy move the arm; refused with the reason"),
    Service("~/stop", "std_srvs/srv/Trigger", "decelerate and hold"),
    Service("~/home", "std_srvs/srv/Trigger", "go to the profile's home"),
    Service("~/estop", "std_srvs/srv/Trigger", "emergency stop, latched"),
    Service("~/reset", "std_srvs/srv/Trigger", "lift the emergency stop; start is a call of its own"),
    Service("~/enable", "std_srvs/srv/SetBool", "start, or stop"),
)


def message_type(name: str) -> Any:
    """The class behind ``package/msg/Name`` or ``package/srv/Name``. Raises RosError where it is not installed."""
    package, kind, cls = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind}"), cls)
    except (ImportError, AttributeError) as error:
        require()
        raise RosError(f"there is no message {name} here ({error}); install the ROS package {package}") from error
