"""What leaves for the controllers: position targets as the messages that a profile says they take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hardware.ros2 import messages
from hardware.ros2.profile import Gripper, RosProfile
from hardware.ros2.runtime import RosClock

Send = Callable[[Any], None]  # a publisher's publish

_SILENCE = 3  # periods without a command, after which velocities are zero


class Outputs:
    """Targets to messages. Velocities come from the targets' differences, corrected by the position error; zero ends them.

    The correction is added behind the safety filter: it stays within the limits' velocities, and drives no arm back that somebody
    has moved away. Threads: control sends, that of the topics watches, whoever ends it closes.

    Args:
        profile: Of the arm.
        clock: Of stamps, and of silence.
        command: Publishes what the controller takes.
        gripper: Publishes what the gripper takes; None: it has no topic.
    """

    def __init__(self, profile: RosProfile, clock: RosClock, command: Send, gripper: Send | None) -> None:
        self.profile, self._clock, self._command = profile, clock, command
        names, how = profile.names, profile.command
        self._columns = np.array([names.index(name) for name in how.joints])
        joints = [profile.state.joints.get(name) for name in how.joints]
        self._joint_names = [joint.names[0] if joint else name for joint, name in zip(joints, how.joints, strict=True)]
        self._scale = np.array([joint.scale if joint else 1.0 for joint in joints])
        self._offset = np.array([joint.offset if joint else 0.0 for joint in joints])
        self._send = {
            "position": self._position,
            "trajectory": self._trajectory,
            "pose": self._pose,
            "velocity": self._velocity,
            "twist": self._twist,
        }[how.type]
        limits = [profile.safety.coordinates[names.index(name)] for name in how.joints]
        self._fastest = profile.safety.scale.velocity * np.array([c.velocity for c in limits])
        if how.type == "twist":  # turns about one axis move three rotation vector's entries, none faster than their norm
            self._fastest = np.repeat([np.linalg.norm(self._fastest[:3]), np.linalg.norm(self._fastest[3:])], 3)
        self._tracking = np.array([np.inf if c.tracking is None else c.tracking for c in limits])
        self._lock, self._closed = threading.Lock(), False
        self._last: np.ndarray | None = None
        self._sent_at = -np.inf
        self._moving = False
        self._gripper: OnChange | None = None
        if gripper is not None and profile.gripper is not None:
            self._width = names.index(profile.gripper.coordinate)
            self._gripper = OnChange(profile.gripper, gripper)

    def send(self, positions: np.ndarray, measured: np.ndarray | None) -> None:
        """Targets ``[n]`` for now; ``measured [n]`` corrects velocities, so give None when it is old: the arm would drift."""
        with self._lock:
            if self._closed:
                return
            self._sent_at = self._clock.now()
            self._send(positions[self._columns], None if measured is None else measured[self._columns])
            if self._gripper is not None:
                self._gripper.send(float(positions[self._width]))

    def stop(self) -> None:
        """Servos hold their last target by themselves; velocity controllers never end, so they are sent zero, once.

        What is sent later would go between the commands of who has the arm then.
        """
        with self._lock:
            self._halt()

    def watch(self) -> None:
        """Called now and then: commands that no longer come must not leave a velocity behind."""
        with self._lock:
            if self._moving and self._clock.now() - self._sent_at > _SILENCE / self.profile.rate:
                self._halt()

    def close(self) -> None:
        """The same as :meth:`stop`, and nothing is sent any more: publishers may go."""
        with self._lock:
            self._halt()
            self._closed = True

    def _halt(self) -> None:
        self._last = None
        if self._moving and not self._closed:
            zero = np.zeros(len(self._columns))
            self._command(messages.float_array(zero) if self.profile.command.type == "velocity" else self._twisted(zero))
            self._moving = False  # only now: what could not be sent is tried again

    def _position(self, target: np.ndarray, measured: np.ndarray | None) -> None:
        self._command(messages.float_array((target - self._offset) / self._scale))

    def _trajectory(self, target: np.ndarray, measured: np.ndarray | None) -> None:
        values = (target - self._offset) / self._scale
        self._command(messages.trajectory(self._joint_names, values, self.profile.command.duration))

    def _pose(self, target: np.ndarray, measured: np.ndarray | None) -> None:
        quaternion = Rotation.from_rotvec(target[3:]).as_quat()
        self._command(messages.pose(target[:3], quaternion, self._clock.stamp(), self.profile.command.frame))

    def _velocity(self, target: np.ndarray, measured: np.ndarray | None) -> None:
        before = target if self._last is None else self._last
        self._last, self._moving = target.copy(), True
        rate = self._corrected(target - before, None if measured is None else target - measured)
        self._command(messages.float_array(rate / self._scale))

    def _twist(self, target: np.ndarray, measured: np.ndarray | None) -> None:
        before = target if self._last is None else self._last
        self._last, self._moving = target.copy(), True
        self._command(self._twisted(self._corrected(_way(before, target), None if measured is None else _way(measured, target))))

    def _corrected(self, step: np.ndarray, error: np.ndarray | None) -> np.ndarray:
        """The velocity of a step of one period, and back to where the arm should be."""
        rate = step * self.profile.rate
        if error is not None and (np.abs(error) <= self._tracking).all():  # False for NaN
            rate += self.profile.command.gain * error
        return np.clip(rate, -self._fastest, self._fastest)

    def _twisted(self, rate: np.ndarray) -> Any:
        return messages.twist(rate[:3], rate[3:], self._clock.stamp(), self.profile.command.frame)


def _way(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """From one pose ``[6]`` to another: a shift [m], and a turn about an axis of the base frame [rad]."""
    turn = (Rotation.from_rotvec(end[3:]) * Rotation.from_rotvec(start[3:]).inv()).as_rotvec()
    return np.concatenate([end[:3] - start[:3], turn])


class OnChange:
    """A gripper's targets, sent when they have changed enough, and when they come to rest: grippers are no servos.

    Drivers of grippers carry out one command after the other; some block while a stream comes.
    """

    def __init__(self, gripper: Gripper, publish: Send) -> None:
        self._gripper, self._publish = gripper, publish
        self._sent: float | None = None
        self._last: float | None = None

    def send(self, target: float) -> None:
        rests = target == self._last
        self._last = target
        changed = self._sent is None or abs(target - self._sent) > self._gripper.hysteresis
        if changed or (rests and target != self._sent):
            self._sent = target
            value = (target - self._gripper.offset) / self._gripper.scale
            self._publish(messages.message_type("std_msgs/msg/Float64")(data=value))
