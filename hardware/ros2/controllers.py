"""The controllers of the virtual arm: subscriptions that take commands as ros2_control does, and refuse what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hardware.ros2.contract import Quality, message_type
from hardware.ros2.profile import RosProfile
from hardware.ros2.runtime import RosClock
from robopolicy.errors import ConfigError
from sim.driver import CommandError, Driver

TRAJECTORY_TOPIC = "joint_trajectory_controller/joint_trajectory"
_QUALITY = Quality(reliable=True, depth=100)  # reliable as the controllers; none is lost while this process is held up


class Controllers:
    """What a profile commands, carried out by a driver. A profile of positions may send trajectories, too.

    Args:
        node: Spun by its owner.
        driver: Of the arm.
        profile: Topics and joints.
        clock: Of stamps.

    Raises:
        ConfigError: The profile sends something else than positions or trajectories.
    """

    def __init__(self, node: Any, driver: Driver, profile: RosProfile, clock: RosClock) -> None:
        self._logger, self._driver, self._clock = node.get_logger(), driver, clock
        command, gripper = profile.command, profile.gripper
        if command.type not in ("position", "trajectory"):
            raise ConfigError(f"the virtual arm takes position and trajectory commands, the profile sends {command.type}")
        names = list(driver.world.names)
        self._joints, self._columns = command.joints, np.array([names.index(name) for name in command.joints])

        def listen(type_: str, topic: str, take: Callable[[Any], None]) -> None:
            node.create_subscription(message_type(type_), topic, lambda message: self._take(take, message), _QUALITY.to_ros())

        if command.type == "position":
            listen("std_msgs/msg/Float64MultiArray", command.topic, self._stream)
        topic = command.topic if command.type == "trajectory" else TRAJECTORY_TOPIC
        listen("trajectory_msgs/msg/JointTrajectory", topic, self._follow)
        if gripper is not None and gripper.type == "float64":
            scale, offset = gripper.scale, gripper.offset
            listen("std_msgs/msg/Float64", gripper.topic, lambda message: driver.grip(scale * message.data + offset))

    def _stream(self, message: Any) -> None:
        self._driver.stream(self._columns, np.array(message.data))

    def _follow(self, message: Any) -> None:
        """As joint_trajectory_controller: joints by name, all of them; a stamp of 0 is now; the last point stands still."""
        expected, found = list(self._joints), list(message.joint_names)
        if sorted(found) != sorted(expected):
            raise self._driver.refusal(f"trajectory for {', '.join(found) or 'no joints'}; expected {', '.join(expected)}")
        if any(len(point.positions) != len(found) for point in message.points):
            raise self._driver.refusal(f"a point of a trajectory has not {len(found)} positions")
        if message.points and any(abs(v) > 1e-9 for v in message.points[-1].velocities):
            raise self._driver.refusal("the last point of a trajectory must have no velocity")
        begin = 0.0 if (made := self._clock.made(message.header.stamp)) is None else made - self._clock.now()
        times = [begin + point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec for point in message.points]
        columns = self._columns[[expected.index(name) for name in found]]
        self._driver.follow(columns, np.array(times), np.array([list(point.positions) for point in message.points]))

    def _take(self, take: Callable[[Any], None], message: Any) -> None:
        before = self._driver.reflex
        try:
            take(message)
        except CommandError as error:
            self._logger.warning(str(error), throttle_duration_sec=1.0)
        if self._driver.reflex and not before:
            self._logger.error(f"reflex: {self._driver.reflex}; the arm stands until ~/reset_reflex")
