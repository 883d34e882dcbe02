"""``OwnRosRobot``: a robot over ROS 2 for programs that know nothing of ROS: it brings its own context, node and thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hardware.ros2.contract import DEADMAN, ESTOP, LATCHED, SENSOR, SIGNAL, message_type
from hardware.ros2.joints import make_model
from hardware.ros2.profile import RosProfile, load_profile
from hardware.ros2.robot import RosRobot
from hardware.ros2.runtime import Ros, RosClock, RosError
from robopolicy.deploy.clock import Clock

_LOOK = 0.1  # [s] between looks for second masters
_PRESSES = 10  # messages of the emergency stop that may wait


class OwnRosRobot(RosRobot):
    """The same with a context, node and thread of its own.

    Args:
        profile: Of the arm.
        task: That a model is set in which takes one, with ``task_args``.
        namespace: Of the arm's topics.

    Raises:
        RosError: There is no ROS, or the arm is not ready in time.
    """

    def __init__(self, profile: RosProfile, task: str | None = None, namespace: str = "", **task_args: Any) -> None:
        self._ros = Ros(signals=False)
        self._ros.__enter__()
        try:
            node = self._ros.node("robopolicy_robot", namespace=namespace)
            super().__init__(profile, node, RosClock(), make_model(profile, task, task_args))
            self._ros.spin_in_thread()
            self.ready()
        except BaseException:
            self._ros.close()
            raise

    def reset(self, seed: int | None = None) -> None:
        if self._ros.fault is not None:
            raise RosError(f"no message is received any more, the thread of ROS died of {self._ros.fault!r}")
        super().reset(seed)

    def hear(self, request: Callable[..., Any]) -> None:
        """As :meth:`robopolicy.robot.RealRobot.hear`: the topics that the policy node hears, too, second masters and permits."""
        from rclpy.event_handler import SubscriptionEventCallbacks

        flag, silent = message_type("std_msgs/msg/Bool"), SubscriptionEventCallbacks(use_default_callbacks=False)

        def on_estop(message: Any) -> None:
            if message.data:
                request("estop", why=f"topic {ESTOP}")

        def look() -> None:
            if denied := self.denied():
                request("mute", why=denied[0])
            if rivals := self.rivals():
                request("mute" if self.masters() else "stop", why=f"rival: {rivals[0]}")

        for quality in (SIGNAL, LATCHED, SENSOR):  # an emergency stop is heard whatever its publisher promises
            deep = quality._replace(depth=_PRESSES).to_ros()
            made = self.node.create_subscription(flag, ESTOP, on_estop, deep, event_callbacks=silent)
            self._keep(made, self.node.destroy_subscription)
        pressed = self.node.create_subscription(
            flag, DEADMAN, lambda message: request("deadman", pressed=bool(message.data)), SENSOR.to_ros()
        )
        self._keep(pressed, self.node.destroy_subscription)
        self._keep(self.node.create_timer(_LOOK, look), self.node.destroy_timer)

    def close(self) -> None:
        super().close()
        self._ros.close()


def make(task: str, clock: Clock, *, profile: str = "virtual", namespace: str = "", **task_args: Any) -> OwnRosRobot:
    """A robot by the name or file of its profile, for ``robopolicy eval --robot ros2 --robot-arg profile=virtual``.

    ``clock`` is ignored: topics have the machine's time. A model that takes a task gets the policy's.
    """
    return OwnRosRobot(load_profile(profile), task, namespace, **task_args)
