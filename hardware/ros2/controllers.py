"""The controllers of the virtual arm: subscriptions that take commands as ros2_control does, and refuse what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hardware.ros2.contract import Quality, message_type
from hardware.ros2.profile import RosProfile
from hardware.ros2.runtime import RosClock, RosError
from hardware.ros2.trajectories import WATCH, Trajectories, TrajectoryGoals
from robopolicy.errors import ConfigError
from sim.driver import CommandError, Driver

TRAJECTORY_TOPIC = "joint_trajectory_controller/joint_trajectory"
FOLLOW = "follow_joint_trajectory"  # the action, beside the topic
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
        self._trajectories = Trajectories(driver, command.joints, self._age)
        self._columns = self._trajectories.columns

        def listen(type_: str, topic: str, take: Callable[[Any], None]) -> None:
            node.create_subscription(message_type(type_), topic, lambda message: self._take(take, message), _QUALITY.to_ros())

        if command.type == "position":
            listen("std_msgs/msg/Float64MultiArray", command.topic, self._stream)
        topic = command.topic if command.type == "trajectory" else TRAJECTORY_TOPIC
        listen("trajectory_msgs/msg/JointTrajectory", topic, self._follow)
        self._serve(node, "/".join([*topic.split("/")[:-1], FOLLOW]))
        if gripper is not None and gripper.type == "float64":
            scale, offset = gripper.scale, gripper.offset
            listen("std_msgs/msg/Float64", gripper.topic, lambda message: driver.grip(scale * message.data + offset))

    def _stream(self, message: Any) -> None:
        self._driver.stream(self._columns, np.array(message.data))

    def _follow(self, message: Any) -> None:
        self._driver.follow(*self._trajectories.read(message))

    def _age(self, stamp: Any) -> float | None:
        made = self._clock.made(stamp)
        return None if made is None else self._clock.now() - made

    def _serve(self, node: Any, name: str) -> None:
        """The action of trajectories, where its messages are installed."""
        try:
            action = message_type("control_msgs/action/FollowJointTrajectory")
        except RosError as error:
            self._logger.info(f"{name} is not served: {error}")
            return
        goals = TrajectoryGoals(self._driver, self._trajectories, action, self._clock.stamp, self._logger.warning)
        self._server = serve_goals(node, action, name, goals)
        self._logger.info(f"serves {name}")

    def _take(self, take: Callable[[Any], None], message: Any) -> None:
        before = self._driver.reflex
        try:
            take(message)
        except CommandError as error:
            self._logger.warning(str(error), throttle_duration_sec=1.0)
        if self._driver.reflex and not before:
            self._logger.error(f"reflex: {self._driver.reflex}; the arm stands until ~/reset_reflex")


def serve_goals(node: Any, action: Any, name: str, goals: TrajectoryGoals) -> Any:
    """An action server for goals that a timer ends: nothing waits for them.

    rclpy's way is an execute callback that waits. In our one thread it would stop everything else; a coroutine that awaits is
    polled without rest by EventsExecutor.
    """
    from rclpy.action import ActionServer, CancelResponse, GoalResponse

    class Server(ActionServer):
        def notify_execute(self, goal_handle: Any, execute_callback: Any) -> None:
            """A goal was accepted, and is called executing; its result is handed over when it has ended."""
            goals.start(goal_handle, lambda result: ActionServer.notify_execute(self, goal_handle, lambda _: result))

    def asked(request: Any) -> GoalResponse:
        try:
            goals.check(request)
        except CommandError as error:
            node.get_logger().warning(f"goal rejected, {error.code}: {error}")
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT

    def cancelled(handle: Any) -> CancelResponse:
        return CancelResponse.ACCEPT if goals.cancel(handle) else CancelResponse.REJECT

    node.create_timer(1.0 / WATCH, goals.update)
    return Server(node, action, name, lambda _: None, goal_callback=asked, cancel_callback=cancelled)
