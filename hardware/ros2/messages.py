"""Messages to arrays and back. The readers take messages as they are, and raise :class:`Rejected` for what cannot be trusted.

A large ``uint8[]`` is set as ``array.array("B")``: rclpy takes that as it is, 0.5 ms for a 640x480 image; given a numpy array it
looks at each byte, 115 to 256 ms.
"""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from hardware.ros2.contract import message_type
from hardware.ros2.profile import Input, Joints

CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "rgba8": 4, "bgra8": 4}
_TO_RGB = {"bgr8": cv2.COLOR_BGR2RGB, "mono8": cv2.COLOR_GRAY2RGB, "rgba8": cv2.COLOR_RGBA2RGB, "bgra8": cv2.COLOR_BGRA2RGB}
_OFF_UNIT = 1e-2  # norms of quaternions this far from 1 are no rotations


class Rejected(Exception):
    """A message that says nothing one can use.

    Attributes:
        kind: What is wrong, for counters: names, length, not_finite, encoding, size, frame, quaternion.
        detail: What was found and expected.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


# ---- joint states --------------------------------------------------------------------------------------------------------------


class JointReader:
    """Coordinates out of joint states. Joints are matched by name, their order is the driver's; other joints are ignored.

    Args:
        joints: Coordinate -> the joints that it is made of.
    """

    def __init__(self, joints: Mapping[str, Joints]) -> None:
        self._joints = dict(joints)
        self._needed = [name for value in self._joints.values() for name in value.names]
        self._scale = np.array([value.scale for value in self._joints.values()])
        self._offset = np.array([value.offset for value in self._joints.values()])
        self._order: list[str] | None = None
        self._sum = np.zeros((0, 0))

    def __call__(self, message: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Positions ``[n]`` and velocities ``[n]``, None where the driver gives none. Raises Rejected."""
        names = message.name
        if names != self._order:
            self._match(names)
        columns = self._columns
        positions = np.asarray(message.position, np.float64)
        if len(positions) != len(names):
            raise Rejected("length", f"{len(positions)} positions for {len(names)} names")
        positions = positions[columns]
        if not np.isfinite(positions).all():
            raise Rejected("not_finite", f"position of {self._needed[int(np.argmin(np.isfinite(positions)))]}")
        velocities = np.asarray(message.velocity, np.float64)
        if len(velocities) not in (0, len(names)):
            raise Rejected("length", f"{len(velocities)} velocities for {len(names)} names")
        given = len(velocities) > 0 and bool(np.isfinite(velocities[columns]).all())  # NaN: an interface that the driver has not
        return (
            self._offset + self._scale * np.add.reduceat(positions, self._starts),
            self._scale * np.add.reduceat(velocities[columns], self._starts) if given else None,
        )

    def _match(self, names: Sequence[str]) -> None:
        missing = [name for name in self._needed if name not in names]
        if missing:
            raise Rejected("names", f"{', '.join(missing)} missing; found {', '.join(names) or 'none'}")
        if len(set(names)) < len(names):
            raise Rejected("names", f"a joint occurs twice in {', '.join(names)}")
        self._columns = np.array([names.index(name) for name in self._needed])
        counts = [len(value.names) for value in self._joints.values()]
        self._starts = np.cumsum([0, *counts[:-1]])
        self._order = list(names)


def joint_state(names: Sequence[str], positions: np.ndarray, velocities: np.ndarray | None, stamp: Any, frame: str = "") -> Any:
    """``sensor_msgs/JointState``."""
    message = message_type("sensor_msgs/msg/JointState")()
    message.header.stamp, message.header.frame_id = stamp, frame
    message.name = list(names)
    message.position = array.array("d", np.asarray(positions, np.float64).tobytes())
    if velocities is not None:
        message.velocity = array.array("d", np.asarray(velocities, np.float64).tobytes())
    return message


# ---- commands ------------------------------------------------------------------------------------------------------------------


def float_array(values: np.ndarray) -> Any:
    """``std_msgs/Float64MultiArray``."""
    return message_type("std_msgs/msg/Float64MultiArray")(data=array.array("d", np.asarray(values, np.float64).tobytes()))


def trajectory(names: Sequence[str], positions: np.ndarray, duration: float) -> Any:
    """``trajectory_msgs/JointTrajectory`` of one point, to be reached in ``duration`` [s] from when it comes (stamp 0).

    No velocities: zero ones would stop the arm at every point, others are refused at the last point.
    """
    message = message_type("trajectory_msgs/msg/JointTrajectory")(joint_names=list(names))
    point = message_type("trajectory_msgs/msg/JointTrajectoryPoint")(positions=array.array("d", positions.tobytes()))
    point.time_from_start.sec, point.time_from_start.nanosec = int(duration), round(duration % 1 * 1e9)
    message.points = [point]
    return message


def pose(position: np.ndarray, quat_xyzw: np.ndarray, stamp: Any, frame: str) -> Any:
    """``geometry_msgs/PoseStamped``."""
    message = message_type("geometry_msgs/msg/PoseStamped")()
    message.header.stamp, message.header.frame_id = stamp, frame
    p, q = message.pose.position, message.pose.orientation
    p.x, p.y, p.z = (float(value) for value in position)
    q.x, q.y, q.z, q.w = (float(value) for value in quat_xyzw)
    return message


def twist(linear: np.ndarray, angular: np.ndarray, stamp: Any, frame: str) -> Any:
    """``geometry_msgs/TwistStamped``."""
    message = message_type("geometry_msgs/msg/TwistStamped")()
    message.header.stamp, message.header.frame_id = stamp, frame
    message.twist.linear.x, message.twist.linear.y, message.twist.linear.z = (float(value) for value in linear)
    message.twist.angular.x, message.twist.angular.y, message.twist.angular.z = (float(value) for value in angular)
    return message


def read_pose(message: Any, frame: str | None = None) -> np.ndarray:
    """``[7]``: position [m] and quaternion xyzw. Raises Rejected."""
    if frame is not None and message.header.frame_id != frame:
        raise Rejected("frame", f"pose in frame '{message.header.frame_id}', expected '{frame}'")
    p, q = message.pose.position, message.pose.orientation
    value = np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
    if not np.isfinite(value).all():
        raise Rejected("not_finite", "pose")
    if abs(float(np.linalg.norm(value[3:])) - 1.0) > _OFF_UNIT:
        raise Rejected("quaternion", f"norm {float(np.linalg.norm(value[3:])):.3g}, expected 1")
    return value


# ---- images --------------------------------------------------------------------------------------------------------------------


def image(picture: np.ndarray, stamp: Any, frame: str = "", encoding: str = "rgb8") -> Any:
    """``sensor_msgs/Image`` of an RGB picture ``[H, W, 3]`` uint8."""
    if encoding == "bgr8":
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    elif encoding == "mono8":
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    message = message_type("sensor_msgs/msg/Image")(height=picture.shape[0], width=picture.shape[1], encoding=encoding)
    message.header.stamp, message.header.frame_id = stamp, frame
    message.step = picture.shape[1] * CHANNELS[encoding]
    message.data = _bytes(picture)
    return message


def compressed(picture: np.ndarray, stamp: Any, frame: str = "", quality: int = 90) -> Any:
    """``sensor_msgs/CompressedImage``, JPEG, of an RGB picture ``[H, W, 3]`` uint8."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    message = message_type("sensor_msgs/msg/CompressedImage")(format="jpeg")
    message.header.stamp, message.header.frame_id = stamp, frame
    message.data = _bytes(data)
    return message


def read_image(message: Any, source: Input) -> np.ndarray:
    """RGB picture ``[H, W, 3]`` uint8 of an Image or CompressedImage; may be a view of the message. Raises Rejected."""
    picture = _decode(message) if source.type == "compressed" else _unpack(message, source.encoding)
    if source.size is not None and picture.shape[:2] != tuple(source.size):
        raise Rejected("size", f"image of {picture.shape[0]}x{picture.shape[1]}, expected {source.size[0]}x{source.size[1]}")
    if source.resize is not None and picture.shape[:2] != tuple(source.resize):
        picture = cv2.resize(picture, (source.resize[1], source.resize[0]), interpolation=cv2.INTER_AREA)
    return picture


def _unpack(message: Any, encoding: str) -> np.ndarray:
    if message.encoding != encoding:
        raise Rejected("encoding", f"image in '{message.encoding}', expected '{encoding}'; say so in the profile if it is right")
    height, width, step, channels = message.height, message.width, message.step, CHANNELS[encoding]
    if step < width * channels or len(message.data) != step * height or height * width == 0:
        raise Rejected("length", f"{len(message.data)} bytes for {height} rows of {step} bytes and {width} pixels")
    rows = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, : width * channels]  # rows may be padded
    picture = rows.reshape(height, width, channels)
    return cv2.cvtColor(picture, _TO_RGB[encoding]) if encoding in _TO_RGB else picture


def _decode(message: Any) -> np.ndarray:
    data = np.frombuffer(message.data, np.uint8)
    try:
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    except cv2.error:
        picture = None
    if picture is None:
        raise Rejected("length", f"compressed image of {len(data)} bytes cannot be decoded (format '{message.format}')")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _bytes(values: np.ndarray) -> array.array[int]:
    data: array.array[int] = array.array("B")
    data.frombytes(np.ascontiguousarray(values).data.cast("B"))
    return data
