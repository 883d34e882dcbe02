"""``Heard``: what a robot's topics say, into a :class:`hardware.ros2.recording.Recording`; and commands as coordinates.

Subscriptions, readers and refusals are those of :class:`hardware.ros2.robot.RosRobot`, so what is recorded is what a policy on
the same topics would observe, and what it would refuse is not recorded either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hardware.ros2.contract import COMMAND, Quality, message_type, robot_topics
from hardware.ros2.joints import near
from hardware.ros2.profile import POSE, RosProfile
from hardware.ros2.recording import COMMANDED, EXECUTED, STATE, Recording, State
from hardware.ros2.robot import RosRobot
from hardware.ros2.runtime import RosClock, RosError
from robopolicy.deploy.safety import Stamp
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.robot import Measured, RobotModel

# Coordinates before the safety filter, by name: JointState as in ~/shadow, where somebody publishes them.
COMMANDED_TOPIC = "robopolicy_policy/commanded"
_DEPTH = 20  # messages that may wait: a recorder wants all of them, not the newest


class Heard:
    """Subscribes to a robot's topics, commands included, and feeds a recording.

    Args:
        profile: Of the robot.
        node: Anything with rclpy's methods of nodes.
        clock: Of stamps; the recording's times are on it.
        recording: What is fed.
        commanded: Topic of what was wanted before the safety filter.

    Raises:
        ConfigError: Velocities are commanded, which say no coordinates, and executed ones are wanted.
    """

    def __init__(
        self, profile: RosProfile, node: Any, clock: RosClock, recording: Recording, commanded: str = COMMANDED_TOPIC
    ) -> None:
        self._clock, self._tracks, self._recording = clock, recording.tracks, recording
        self._model = _Measuring(recording.model)
        self._numbers: dict[str, int] = {}
        self._met = False
        self.robot = RosRobot(profile, _Overheard(node, self.poll), clock, model=self._model, enabled=False)
        self._commands = CommandReader(profile)
        if recording.config.action == "executed":
            self._commands.check()
        for topic in robot_topics(profile, recording.model.inputs):
            if topic.key == "command":
                self._listen(node, topic.type, topic.name, self._command)
            elif topic.key == "gripper":
                self._listen(node, topic.type, topic.name, self._commands.gripper)
        self._listen(node, "sensor_msgs/msg/JointState", commanded, self._wanted)

    def poll(self) -> None:
        """Hand on what is new in the robot's slots. Pictures are decoded in another thread: call it at least every period."""
        recording = self._recording
        met, self._met = self._met, bool(self.robot.success)
        recording.success |= self._met and not met  # what was met before this episode is not its doing
        for name, slot in self.robot.slots.items():
            latest = slot.latest
            if latest is None or self._numbers.get(name) == latest.number:
                continue
            if name in self._tracks and name != STATE:
                self._tracks[name].add(latest.value, latest.stamp)
            elif (measured := self._measure()) is None:
                continue  # the first pictures have not come yet
            elif name == STATE:
                self._tracks[STATE].add(State(measured.positions, measured.velocities), latest.stamp)
            self._numbers[name] = latest.number

    def _measure(self) -> Measured | None:
        try:
            self.robot.observe()
        except RosError:
            return None
        return self._model.measured

    def _command(self, message: Any) -> None:
        newest = self._tracks[STATE].newest
        if newest is not None and (value := self._commands.read(message, newest.value.positions)) is not None:
            self._tracks[EXECUTED].add(value, Stamp(self._clock.now()))

    def _wanted(self, message: Any) -> None:
        values = dict(zip(message.name, message.position, strict=False))
        if values.keys() >= set(self._model.names):
            value = np.array([values[name] for name in self._model.names])
            if np.isfinite(value).all():
                self._tracks[COMMANDED].add(value, Stamp(self._clock.now(), self._clock.made(message.header.stamp)))

    def _listen(self, node: Any, type_: str, topic: str, callback: Callable[[Any], None]) -> None:
        quality = Quality(reliable=COMMAND.reliable, depth=_DEPTH).to_ros()
        node.create_subscription(message_type(type_), topic, callback, quality)

    def close(self) -> None:
        self.robot.close()


class CommandReader:
    """Commands of a profile's controllers as coordinates ``[n]``: what :class:`hardware.ros2.outputs.Outputs` undoes.

    A gripper with a topic of its own is at its last command; before the first, where it is measured.
    """

    def __init__(self, profile: RosProfile) -> None:
        self._type, self._names, self._gripper = profile.command.type, profile.names, profile.gripper
        self._columns = [self._names.index(name) for name in profile.command.joints]
        joints = [profile.state.joints.get(name) for name in profile.command.joints]
        self._joint_names = [
            joint.names[0] if joint else name for joint, name in zip(joints, profile.command.joints, strict=True)
        ]
        self._scale = np.array([joint.scale if joint else 1.0 for joint in joints])
        self._offset = np.array([joint.offset if joint else 0.0 for joint in joints])
        self._width: float | None = None

    def check(self) -> None:
        """Raises ConfigError where commands say no coordinates."""
        if self._type in ("velocity", "twist"):
            raise ConfigError(
                f"the profile commands by '{self._type}', which does not say where the arm shall be; record with action:=measured"
            )

    def gripper(self, message: Any) -> None:
        """A command of the gripper's own topic."""
        if self._gripper is not None and np.isfinite(message.data):
            self._width = float(message.data) * self._gripper.scale + self._gripper.offset

    def read(self, message: Any, measured: np.ndarray) -> np.ndarray | None:
        """Coordinates ``[n]``; what the command leaves out is as ``measured``. None for what no controller would take."""
        values = self._values(message, measured)
        if values is None or len(values) != len(self._columns) or not np.isfinite(values).all():
            return None
        coordinates = measured.copy()
        coordinates[self._columns] = values
        if self._gripper is not None and self._width is not None:
            coordinates[self._names.index(self._gripper.coordinate)] = self._width
        return coordinates

    def _values(self, message: Any, measured: np.ndarray) -> np.ndarray | None:
        if self._type == "position":
            data = np.array(message.data, np.float64)
            return self._offset + self._scale * data if len(data) == len(self._scale) else None
        if self._type == "trajectory":
            names = list(message.joint_names)
            if not message.points or set(self._joint_names) - set(names):
                return None
            positions = np.array(message.points[-1].positions, np.float64)
            if len(positions) != len(names):
                return None
            return self._offset + self._scale * positions[[names.index(name) for name in self._joint_names]]
        if self._type == "pose":
            p, q = message.pose.position, message.pose.orientation
            if not np.isfinite([p.x, p.y, p.z, q.x, q.y, q.z, q.w]).all() or not any((q.x, q.y, q.z, q.w)):
                return None
            before = measured[[self._names.index(name) for name in POSE[3:]]]
            return np.array([p.x, p.y, p.z, *near(Rotation.from_quat([q.x, q.y, q.z, q.w]).as_rotvec(), before)])
        return None


class _Measuring:
    """A robot's model that keeps what was measured instead of observing it."""

    def __init__(self, model: RobotModel) -> None:
        self._model = model
        self.names, self.inputs, self.kinematics = model.names, model.inputs, model.kinematics
        self.action_feature = model.action_feature
        self.observation_features: Mapping[str, Feature] = model.observation_features
        self.measured: Measured | None = None

    def reset(self, positions: np.ndarray) -> None:
        pass

    def observe(self, measured: Measured) -> dict[str, np.ndarray]:
        self.measured = measured
        return {}

    def targets(self, action: np.ndarray) -> np.ndarray:
        return self._model.targets(action)

    def action_of(self, positions: np.ndarray) -> np.ndarray:
        return self._model.action_of(positions)


class _Overheard:
    """A node whose subscriptions keep more messages, and call ``after`` behind each."""

    def __init__(self, node: Any, after: Callable[[], None]) -> None:
        self._node, self._after = node, after

    def create_subscription(self, type_: Any, topic: str, callback: Callable[[Any], None], quality: Any) -> Any:
        def take(message: Any) -> None:
            callback(message)
            self._after()

        quality.depth = _DEPTH
        return self._node.create_subscription(type_, topic, take, quality)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)
