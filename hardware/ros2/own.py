"""``OwnRosRobot``: a robot over ROS 2 for programs that know nothing of ROS: it brings its own context, node and thread."""

from __future__ import annotations

from typing import Any

from hardware.ros2.joints import make_model
from hardware.ros2.profile import RosProfile, load_profile
from hardware.ros2.robot import RosRobot
from hardware.ros2.runtime import Ros, RosClock
from robopolicy.deploy.clock import Clock


class OwnRosRobot(RosRobot):
    """The same with a context, node and thread of its own: what programs that know nothing of ROS use."""

    def __init__(self, profile: RosProfile, task: str | None = None, **task_args: Any) -> None:
        self._ros = Ros(signals=False)
        self._ros.__enter__()
        try:
            node = self._ros.node("robopolicy_robot")
            super().__init__(profile, node, RosClock(), make_model(profile, task, task_args))
            self._ros.spin_in_thread()
            self.ready()
        except BaseException:
            self._ros.close()
            raise

    def close(self) -> None:
        super().close()
        self._ros.close()


def make(task: str, clock: Clock, *, profile: str = "virtual", **task_args: Any) -> OwnRosRobot:
    """A robot by the name of its profile, for ``robopolicy eval --robot ros2 --robot-arg profile=virtual``.

    ``clock`` is ignored: topics have the machine's time. A model that takes a task gets the policy's.
    """
    return OwnRosRobot(load_profile(profile), task, **task_args)
