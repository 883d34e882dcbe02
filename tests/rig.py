"""A policy node in this process, and a driver that does what tests tell it: both over real ROS. Fixtures: conftest.py."""

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.qos import QoSProfile
from ros import Sandbox
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64, Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger

from hardware.ros2.contract import COMMAND, LATCHED, STATE_OUT
from hardware.ros2.policy_node import NAME, PolicyNode
from hardware.ros2.profile import load_profile
from hardware.ros2.runtime import Ros, RosClock
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.clock import SystemClock, Ticker
from robopolicy.policy import Policy, PolicyConfig
from sim.arm.robot import SimArm

PROFILE = load_profile("virtual")
HOME = PROFILE.home_positions
assert HOME is not None
JOINTS = PROFILE.command.joints
CUBE = (0.45, 0.05, 0.02)


def save_policy(folder: Path, ahead: tuple[float, ...] = (0.5, 0.0, 0.15, 0.0, 0.06), **provenance: Any) -> Policy:
    """A policy of the task lift that was never trained: it goes ``ahead``, wherever it is; home is familiar to it."""
    arm, rng = SimArm("lift", SystemClock()), np.random.default_rng(0)
    arm.reset(0)
    values = arm.observe().values
    normalizers = {name: Normalizer.fit(value + rng.uniform(-1.0, 1.0, (500, value.size))) for name, value in values.items()}
    normalizers["action"] = Normalizer.fit(np.array(ahead) + np.linspace(-1e-3, 1e-3, 200)[:, None])
    net = {"horizon": 16, "n_action_steps": 4, "net": {"type": "mlp", "width": 16, "depth": 1}}
    config = parse(PolicyConfig, {**net, "sampler": {"type": "euler", "num_steps": 1}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(config, arm.observation_features, arm.action_feature, normalizers)
    arm.close()
    policy.save(folder, {"task": {"name": "lift", "args": {}}, **provenance})
    return policy.eval()


class Driver:
    """Joint states in an order of its own, a cube, and position controllers that are where they were told to be at once.

    Attributes:
        positions: Of the coordinates ``[8]``.
        names: Published, in this order.
        commands: What came, with its time of arrival.
        alive: Whether states are published.
        noise: Of the cube's pose [m].
    """

    def __init__(self, namespace: str = "") -> None:
        self.ros = Ros(signals=False).__enter__()
        node = self.ros.node("driver", namespace=namespace)
        self.positions = HOME.copy()
        self.names = ["right_finger", "joint7", "joint2", "left_finger", *JOINTS[2:6], "joint1"]
        self.commands: list[tuple[float, np.ndarray]] = []
        self.alive, self.noise = True, 0.0
        self._state = node.create_publisher(JointState, "joint_states", STATE_OUT.to_ros())
        self._cube = node.create_publisher(PoseStamped, "objects/cube/pose", STATE_OUT.to_ros())
        node.create_subscription(Float64MultiArray, PROFILE.command.topic, self._take, COMMAND.to_ros())
        node.create_subscription(Float64, "gripper/command", self._grip, COMMAND.to_ros())
        self.ros.spin_in_thread()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.ros.stop()
        self._thread.join()
        self.ros.close()

    def put(self, **coordinates: float) -> None:
        """The arm at home, and these elsewhere."""
        self.positions = HOME.copy()
        for name, value in coordinates.items():
            self.positions[PROFILE.names.index(name)] = value

    def _run(self) -> None:
        clock, ticker = RosClock(), Ticker(SystemClock(), 0.01)
        while not self.ros.stopping.is_set():
            ticker.wait()
            if not self.alive:
                continue
            known = dict(zip(PROFILE.names, self.positions.tolist(), strict=True))
            known["left_finger"] = known["right_finger"] = known["gripper_width"] / 2
            message = JointState(name=self.names, position=[known.get(name, 0.0) for name in self.names])
            message.velocity = [0.0] * len(self.names)  # tests move it by hand
            message.header.stamp = clock.stamp()
            self._state.publish(message)
            cube = PoseStamped()
            cube.header.stamp, cube.header.frame_id = message.header.stamp, "world"
            cube.pose.position.x, cube.pose.position.y, cube.pose.position.z = CUBE
            cube.pose.position.z += self.noise * random.random()
            cube.pose.orientation.w = 1.0
            self._cube.publish(cube)

    def _take(self, message: Float64MultiArray) -> None:
        joints = np.array(message.data)
        self.commands.append((time.monotonic(), joints))
        self.positions = np.append(joints, self.positions[7])

    def _grip(self, message: Float64) -> None:
        self.positions = np.append(self.positions[:7], message.data)


class Rig:
    """The node, spun as its program does, but in threads."""

    def __init__(self, ros: Sandbox, **settings: Any) -> None:
        self.ros, self._stack = ros, ExitStack()
        arguments = ["--ros-args"]
        for key, value in settings.items():
            arguments += ["-p", f"{key}:={json.dumps(value)}"]
        self._main = self._stack.enter_context(Ros(arguments, signals=False))
        self._messages = self._stack.enter_context(Ros(arguments, signals=False))
        self.node: PolicyNode = self._main.node(NAME, PolicyNode, messages=self._messages)
        self._messages.spin_in_thread()
        self._main.spin_in_thread()
        self.told: list[dict[str, str]] = []
        ros.node.create_subscription(String, f"{NAME}/state", lambda m: self.told.append(json.loads(m.data)), LATCHED.to_ros())

    def close(self) -> None:
        self._main.stop()
        assert self._main._thread is not None
        self._main._thread.join()  # transitions belong to that thread
        assert self._main.fault is None
        self.node.shutdown()
        self._stack.close()

    def to(self, *transitions: str) -> bool:
        """Lifecycle services: whether the last one worked."""
        return [self.ros.change_state(NAME, transition) for transition in transitions][-1]

    def call(self, name: str) -> tuple[bool, str]:
        answer = self.ros.call(Trigger, f"{NAME}/{name}")
        return answer.success, answer.message

    def enable(self, on: bool) -> tuple[bool, str]:
        answer = self.ros.call(SetBool, f"{NAME}/enable", SetBool.Request(data=on))
        return answer.success, answer.message

    def arm(self, at_once: bool = True) -> None:
        """As if the node had just started with ``autostart:=true``, in the state it is in. ``at_once`` False: its first step is
        left out."""
        self.node._next_step = 0.0 if at_once else np.inf
        self.node.requests.armed = True

    def set(self, **values: Any) -> list[str]:
        """Why they were refused; [] when they were taken."""
        return self.ros.set(NAME, **values)

    def until(self, condition: Callable[[dict[str, str]], bool], seconds: float = 20.0) -> dict[str, str]:
        """The first of ~/state that is so."""
        self.ros.until(lambda: self.told and condition(self.told[-1]), seconds, f"a state; the last was {self.told[-1:]}")
        return self.told[-1]

    def mode(self, mode: str) -> dict[str, str]:
        return self.until(lambda told: told["mode"] == mode)


class Stand:
    """A configured node, its driver, and two checkpoints."""

    def __init__(self, ros: Sandbox, folder: Path) -> None:
        save_policy(folder / "first")
        save_policy(folder / "second", ahead=(0.45, 0.1, 0.2, 0.0, 0.06))
        self.ros, self.folder, self.driver = ros, folder, Driver()
        self.rig = Rig(ros, checkpoint=str(folder / "first"), inference="thread", ready_timeout=5.0)

    def start(self) -> str:
        """What ~/start says when it is granted; asked again where a busy computer delivers states late."""

        def granted() -> str:
            ok, message = self.rig.call("start")
            assert message.startswith("policy begins" if ok else "stale"), message
            return message if ok else ""

        return str(self.ros.until(granted, what="a start"))

    def refused(self) -> str:
        """Why ~/start is refused; asked again where a busy computer delivers states late."""

        def why() -> str:
            ok, message = self.rig.call("start")
            assert not ok
            return "" if message.startswith("stale") else message

        return str(self.ros.until(why, what="a refusal"))

    def sent(self) -> list[np.ndarray]:
        return [command for _, command in self.driver.commands]

    def still(self) -> None:
        """Until the set point rests; it goes on being sent."""
        self.ros.until(lambda: len(self.sent()) > 20 and np.ptp(self.sent()[-20:], axis=0).max() < 1e-9, what="rest")

    def silent(self) -> bool:
        """Whether no command comes for a while."""
        count = len(self.sent())
        self.ros.spin(0.3)
        return len(self.sent()) == count

    def diagnosis(self, name: str) -> Any:
        array = self.ros.message(DiagnosticArray, "/diagnostics", qos=QoSProfile(depth=10))
        return next(status for status in array.status if status.name == f"{NAME}: {name}")

    def close(self) -> None:
        self.rig.close()
        self.driver.close()
