"""``virtual_arm``: a simulated arm behind the topics, units and times of a real driver, in real time; with faults on request.

    python -m hardware.ros2.virtual_arm --ros-args -p profile:=virtual -p seed:=100000

The profile says which topics there are, so everything that runs on a real arm runs on this one. Services: ``~/reset`` begins the
episode of parameter ``seed``; ``~/reset_reflex``; ``~/clear_faults``; ``~/record`` gives, as JSON, the worst of what the arm
did (:class:`sim.driver.Record`), and ``~/clear_record`` begins it anew. Faults are parameters, ``faults.STREAM.FAULT``
(:mod:`hardware.ros2.faults`). Physics has a thread, and cameras have one: only what somebody subscribes to is drawn.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from hardware.ros2 import streams
from hardware.ros2.contract import LATCHED, STATE_OUT, Quality, message_type
from hardware.ros2.controllers import Controllers
from hardware.ros2.fault_parameters import FaultParameters, describe
from hardware.ros2.faults import STREAMS, Reading
from hardware.ros2.joints import make_model
from hardware.ros2.profile import Input, RosProfile, load_profile
from hardware.ros2.runtime import Ros, RosClock
from hardware.ros2.streams import Stream
from robopolicy.config import Config, parse
from robopolicy.deploy.clock import Ticker
from robopolicy.errors import ConfigError, RobopolicyError
from sim.driver import LOOKAHEAD, Driver
from sim.virtual import WORLDS, World, make_world

_CAMERAS = Quality(reliable=False)
_DELIVERED = 0.05  # [s]: for messages to be with who listens
_EYES = 20.0  # [s]: for cameras to be made
_FLUSH = 0.01  # [s]: how finely the delays of pictures are kept


class VirtualArmConfig(Config):
    """The node's parameters, beside ``faults.*``."""

    profile: str = pydantic.Field("virtual", description="topics, joints and limits: a name of hardware/ros2/profiles, or a file")
    task: str = pydantic.Field("", description="what the arm stands in front of; empty: the profile's task, else lift")
    seed: int = pydantic.Field(0, ge=0, le=2**31 - 1, description="of the episode that ~/reset begins; may change at any time")
    state_rate: float = pydantic.Field(200.0, ge=1, le=500, description="of joint states [Hz]")
    pose_rate: float = pydantic.Field(100.0, ge=1, le=500, description="of the poses of objects [Hz]")
    cameras: bool = pydantic.Field(True, description="publish pictures; drawn only while somebody subscribes")
    camera_rate: float = pydantic.Field(15.0, ge=1, le=60, description="of each camera [Hz]")
    image_height: int = pydantic.Field(240, ge=16, le=1080, description="of pictures [px]")
    image_width: int = pydantic.Field(320, ge=16, le=1920, description="of pictures [px]")
    lookahead: float = pydantic.Field(LOOKAHEAD, ge=0, le=0.2, description="streamed targets are reached in so long [s]")
    fault_seed: int = pydantic.Field(0, ge=0, description="of the faults that happen by chance")
    record_path: str = pydantic.Field("", description="file that ~/record, and the end, write the record to; empty: none")


class VirtualArm:
    """The node's insides.

    Args:
        node: Spun by its owner.
        config: See :class:`VirtualArmConfig`.
        clock: Of physics and stamps.
    """

    def __init__(self, node: Any, config: VirtualArmConfig, clock: RosClock) -> None:
        self.node, self.config, self._clock = node, config, clock
        self.profile = load_profile(config.profile)
        self.world = _world(self.profile, config.task)
        kinematics = self.world.kinematics or make_model(self.profile).kinematics
        self.driver = Driver(
            self.world,
            self.profile.safety,
            clock,
            rate=self.profile.rate,
            lookahead=config.lookahead,
            kinematics=kinematics,
        )
        self.streams: dict[str, list[Stream]] = {name: [] for name in STREAMS}
        self._cameras: dict[str, list[tuple[Stream, Input]]] = {}
        self._poses: dict[str, Stream] = {}
        self._ended = threading.Event()
        self.fault: BaseException | None = None
        self._publish()
        self._faults = FaultParameters(node, self.streams, clock)
        Controllers(node, self.driver, self.profile, clock)
        self._serve()
        self._seeing = threading.Event()
        self._physics_thread = threading.Thread(target=self._guarded, args=(self._physics,), name="physics")
        pictures = threading.Thread(target=self._guarded, args=(self._pictures,), name="cameras")
        self._threads = [pictures] if self._cameras else []

    def start(self) -> None:
        """The episode of parameter ``seed`` begins now."""
        for thread in self._threads:
            thread.start()
        if self._cameras:  # first: making them may hold the interpreter for a second
            self._seeing.wait(_EYES)
        self.driver.reset(self.config.seed)
        self._physics_thread.start()

    def close(self) -> None:
        """End the threads, and write the record."""
        self._ended.set()
        for thread in (*self._threads, self._physics_thread):
            if thread.is_alive():
                thread.join()
        self._write(self.driver.report())
        self.world.close()

    # ---- topics --------------------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        profile = self.profile
        if missing := sorted(set(profile.joint_names) - set(self.world.joint_names)):
            raise ConfigError(
                f"the profile wants joint '{missing[0]}'; the simulated arm has {', '.join(self.world.joint_names)}"
            )
        self._state = self._stream("state", "sensor_msgs/msg/JointState", profile.state.topic, streams.joint_state, STATE_OUT)
        for name, source in profile.inputs.items():
            if source.type == "pose" and name in self.world.poses():
                self._poses[name] = self._stream("poses", "geometry_msgs/msg/PoseStamped", source.topic, streams.pose, STATE_OUT)
            elif source.type != "pose" and name in self.world.cameras and self.config.cameras:
                self._add_camera(name, source)
        self._success = self.node.create_publisher(
            message_type("std_msgs/msg/Bool"), profile.success or "~/success", LATCHED.to_ros()
        )
        self._told: bool | None = None

    def _stream(self, kind: str, type_: str, topic: str, make: Callable[[Reading, Any], Any], quality: Quality) -> Stream:
        publisher = self.node.create_publisher(message_type(type_), topic, quality.to_ros())
        seed = self.config.fault_seed + 1000 * sum(len(made) for made in self.streams.values())
        self.streams[kind].append(Stream(publisher, make, seed, self._clock))
        return self.streams[kind][-1]

    def _add_camera(self, name: str, source: Input) -> None:
        """Raw and compressed pictures, as cameras' drivers have them, whichever the profile reads."""
        raw = source.topic.removesuffix("/compressed")
        topics = {raw: "image", f"{raw}/compressed": "compressed", source.topic: source.type}
        for topic, kind in topics.items():
            if kind == "compressed":
                stream = self._stream("camera", "sensor_msgs/msg/CompressedImage", topic, streams.compressed, _CAMERAS)
            else:
                size = self.config.image_height, self.config.image_width
                stream = self._stream("camera", "sensor_msgs/msg/Image", topic, streams.raw(*size), _CAMERAS)
            entry = source.model_copy(update={"type": kind})
            self._cameras.setdefault(name, []).append((stream, entry))

    # ---- services and parameters ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        trigger = message_type("std_srvs/srv/Trigger")

        def offer(name: str, does: Callable[[], str]) -> None:
            def answer(_: Any, response: Any) -> Any:
                try:
                    response.message, response.success = does(), True
                except RobopolicyError as error:
                    response.message, response.success = str(error), False
                except Exception as error:  # of the physics: who asked is told, and the arm lives on
                    self.node.get_logger().error(traceback.format_exc())
                    response.message, response.success = f"{type(error).__name__}: {error}", False
                return response

            self.node.create_service(trigger, f"~/{name}", answer)

        offer("reset", self._reset)
        offer("reset_reflex", lambda: self._done(self.driver.reset_reflex, "takes commands again"))
        offer("clear_faults", lambda: self._done(self._faults.clear, "no faults"))
        offer("record", lambda: self._write(self.driver.report()))
        offer("clear_record", lambda: self._done(self._clear_record, "begun anew"))

    @staticmethod
    def _done(does: Callable[[], None], said: str) -> str:
        does()
        return said

    def _reset(self) -> str:
        seed = int(self.node.get_parameter("seed").value)
        self.driver.reset(seed)
        self._told = None  # said again, whatever it is: who waits for the reset waits for this
        rates = [self.config.state_rate, self.config.pose_rate, *[self.config.camera_rate] * self.config.cameras]
        time.sleep(2 / min(rates) + _DELIVERED)  # who is answered finds the arm and the objects where they are now
        return f"episode of seed {seed}"

    def _write(self, report: dict[str, Any]) -> str:
        text = json.dumps(report | {"faults": self._faults.counted(), "faults_set_at": self._faults.set_at}, indent=2)
        if self.config.record_path:
            Path(self.config.record_path).write_text(text + "\n")
        return text

    def _clear_record(self) -> None:
        self.driver.clear_record()
        self._faults.clear_counters()

    # ---- threads -------------------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # the main thread ends the node with it
            self.fault = error
            self._seeing.set()

    def _physics(self) -> None:
        ticker, names = Ticker(self._clock, self.world.timestep), tuple(self.world.joint_names)
        next_state = next_pose = self._clock.now()
        while not self._ended.is_set():
            now = ticker.wait().start
            self.driver.advance()
            state, poses = now >= next_state, now >= next_pose
            if state or poses:
                snapshot = self.driver.snapshot()
            if state:
                next_state = max(next_state + 1 / self.config.state_rate, now - 1 / self.config.state_rate)
                self._state.push(snapshot.time, np.stack(snapshot.joints), names)
                self._tell()
            if poses:
                next_pose = max(next_pose + 1 / self.config.pose_rate, now - 1 / self.config.pose_rate)
                for name, stream in self._poses.items():
                    stream.push(snapshot.time, snapshot.poses[name], (streams.FRAME,))
            for stream in (self._state, *self._poses.values()):
                stream.flush()

    def _tell(self) -> None:
        if self.world.success is not self._told:
            self._told = self.world.success
            self._success.publish(message_type("std_msgs/msg/Bool")(data=self._told))

    def _pictures(self) -> None:
        height, width = self.config.image_height, self.config.image_width
        eyes = {name: self.world.eye(name, height, width) for name in self._cameras}
        self._seeing.set()
        ticker, due = Ticker(self._clock, _FLUSH), self._clock.now()
        while not self._ended.is_set():
            now = ticker.wait().start
            if now >= due:
                due = max(due + 1 / self.config.camera_rate, now)
                for name, outlets in self._cameras.items():
                    wanted = [(stream, source) for stream, source in outlets if stream.publisher.get_subscription_count() > 0]
                    if wanted:
                        snapshot = self.driver.snapshot()
                        picture = eyes[name](snapshot.picture)
                        for stream, source in wanted:
                            stream.push(snapshot.time, *streams.packed(picture, source))
            for outlets in self._cameras.values():
                for stream, _ in outlets:
                    stream.flush()


def _world(profile: RosProfile, task: str) -> World:
    """The one with the profile's coordinates."""
    for name, world in WORLDS.items():
        if getattr(world, "names", None) == profile.names:
            return make_world(name, task or profile.model.args.get("task", ""))
    raise ConfigError(f"no simulated arm has the profile's coordinates {', '.join(profile.names)}; take 'virtual' or 'panda'")


def main(argv: Sequence[str] | None = None) -> int:
    """The node, until Ctrl-C."""
    with Ros(list(sys.argv if argv is None else argv)) as ros:
        from rclpy.exceptions import ParameterException

        node = ros.node("virtual_arm")
        clock = RosClock()
        try:
            for name, field in VirtualArmConfig.model_fields.items():
                node.declare_parameter(name, field.default, describe(VirtualArmConfig, name, read_only=name != "seed"))
            values = {name: node.get_parameter(name).value for name in VirtualArmConfig.model_fields}
            arm = VirtualArm(node, parse(VirtualArmConfig, values, where="parameters"), clock)
        except (RobopolicyError, ParameterException) as error:
            node.get_logger().fatal(str(error))
            return 2
        arm.start()
        node.get_logger().info(f"{', '.join(arm.world.names)} at {1 / arm.world.timestep:g} Hz of physics")
        try:
            ros.spin(until=lambda: arm.fault is not None)
        finally:
            arm.close()
        if arm.fault is not None:
            node.get_logger().fatal(f"{type(arm.fault).__name__}: {arm.fault}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
