"""The recorder node over real DDS, beside a driver: what comes is stored, and what is stored stays, whatever happens."""

import itertools
import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ros import Process, Sandbox

from robopolicy import cli
from robopolicy.data.check import check
from robopolicy.data.episodes import Episodes

_numbers = itertools.count()
PROFILE = """
model: {{args: {{rate: 20.0}}}}
limits:
  rate: 100.0
  coordinates:
    - {{name: j1, unit: rad, lower: -3, upper: 3, velocity: 2, acceleration: 10, jerk: 100}}
    - {{name: j2, unit: rad, lower: -3, upper: 3, velocity: 2, acceleration: 10, jerk: 100}}
    - {{name: grip, unit: m, lower: 0.0, upper: 0.1, velocity: 0.2, acceleration: 2, jerk: 20, margin: 0.0}}
rate: 100.0
state: {{joints: {{j1: j1, j2: j2, grip: {{names: [left, right]}}}}}}
command: {{joints: [j1, j2]}}
gripper: {{coordinate: grip, topic: gripper/command}}
inputs: {{front: {{type: {camera}, topic: front/image, size: [12, 16]}}}}
success: arm/success
"""


class Driver:
    """Joint states and commands at 100 Hz, a picture at 25 Hz, in a thread. ``camera`` and ``commands`` can be switched off."""

    def __init__(self, ros: Sandbox) -> None:
        import rclpy

        from hardware.ros2 import messages
        from hardware.ros2.contract import COMMAND, LATCHED, STATE_OUT, message_type
        from hardware.ros2.runtime import RosClock

        self.camera = self.commands = True
        self._m, self._clock = messages, RosClock()
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=ros.domain)
        self._node = node = rclpy.create_node("driver", context=self._context)

        def publisher(type_: str, topic: str, quality: Any) -> Any:
            return node.create_publisher(message_type(type_), topic, quality.to_ros())

        self._state = publisher("sensor_msgs/msg/JointState", "joint_states", STATE_OUT)
        self._image = publisher("sensor_msgs/msg/Image", "front/image", STATE_OUT)
        self._command = publisher("std_msgs/msg/Float64MultiArray", "forward_position_controller/commands", COMMAND)
        self._gripper = publisher("std_msgs/msg/Float64", "gripper/command", COMMAND)
        self._success = publisher("std_msgs/msg/Bool", "arm/success", LATCHED)
        self._bool, self._float = message_type("std_msgs/msg/Bool"), message_type("std_msgs/msg/Float64")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def say_success(self, value: bool) -> None:
        self._success.publish(self._bool(data=value))

    def _run(self) -> None:
        tick, begin = 0, time.monotonic()
        while not self._ended.wait(max(0.0, begin + tick / 100 - time.monotonic())):
            at = tick / 100
            q = np.array([np.sin(at), np.cos(at), 0.02 + 0.01 * np.sin(3 * at)])
            stamp = self._clock.stamp()
            names, positions = ["right", "j2", "left", "other", "j1"], np.array([q[2] / 2, q[1], q[2] / 2, 9.0, q[0]])
            self._state.publish(self._m.joint_state(names, positions, np.zeros(5), stamp))
            if tick % 4 == 0 and self.camera:
                self._image.publish(self._m.image(np.full((12, 16, 3), tick // 4 % 250, np.uint8), stamp))
            if self.commands:
                self._command.publish(self._m.float_array(q[:2] + 0.05))
                self._gripper.publish(self._float(data=float(q[2] + 0.005)))
            tick += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._node.destroy_node()
        self._context.try_shutdown()


class Recorder:
    """The node's process, and its services."""

    def __init__(self, ros: Sandbox, out: Path, profile: Path, **parameters: Any) -> None:
        self.ros, self.out = ros, out
        self.name = f"recorder{next(_numbers)}"  # one that was killed is still found for a while
        self.process: Process = ros.start(
            "hardware.ros2.recorder", node=self.name, profile=str(profile), out=str(out), **{"reserve": 0.0, **parameters}
        )

    def call(self, name: str) -> Any:
        from std_srvs.srv import Trigger

        return self.ros.call(Trigger, f"{self.name}/{name}")

    def start(self) -> str:
        """Begin, as soon as the inputs are there."""
        message: str = self.ros.until(lambda: (r := self.call("start")).success and r.message, 30.0, "a start")
        return message

    def state(self) -> dict[str, Any]:
        from std_msgs.msg import String

        from hardware.ros2.contract import LATCHED

        value: dict[str, Any] = json.loads(self.ros.message(String, f"{self.name}/state", qos=LATCHED.to_ros()).data)
        return value

    def record(self, seconds: float) -> None:
        """An episode."""
        self.start()
        self.ros.spin(seconds)
        assert self.call("stop").success

    def end(self) -> None:
        self.process.send(signal.SIGINT)
        assert self.process.wait(15) == 0, self.process.output()


@pytest.fixture(scope="module")
def driver(ros_module: Sandbox) -> Iterator[Driver]:
    made = Driver(ros_module)
    yield made
    made.close()


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "two.yaml"
    path.write_text(PROFILE.format(camera="image"))
    return path


def test_what_a_driver_says_is_stored_and_trains(ros_module: Sandbox, driver: Driver, profile: Path, tmp_path: Path) -> None:
    recorder = Recorder(ros_module, tmp_path / "set.zarr", profile)
    assert "recording episode 0" in recorder.start()
    ros_module.spin(1.0)
    driver.say_success(True)
    ros_module.spin(1.0)
    answer = recorder.call("stop")
    assert answer.success, answer.message
    assert answer.message.startswith("episode 0: ")
    assert not recorder.call("stop").success
    recorder.start()
    ros_module.spin(0.6)
    assert "discarded" in recorder.call("discard").message
    for _ in range(2):
        recorder.record(0.8)
    assert recorder.state()["episode"] == 3
    recorder.end()

    store = Episodes.open(recorder.out)
    assert len(store) == 3
    assert store.attrs["recorded"]["0"]["success"] is True
    stored = store.episode(0)
    assert 20 <= len(stored["action"]) <= 60
    np.testing.assert_array_equal(stored["qpos"], stored["joint_positions"].astype(np.float32))
    np.testing.assert_allclose(np.hypot(*stored["joint_positions"][:, :2].T), 1.0, atol=1e-9)  # one message, by name
    np.testing.assert_allclose(np.hypot(*(stored["executed"][:, :2] - 0.05).T), 1.0, atol=1e-9)
    assert np.abs(stored["executed"][:, 2] - stored["joint_positions"][:, 2] - 0.005).max() < 0.01
    np.testing.assert_array_equal(stored["action"], stored["executed"].astype(np.float32))
    assert len(np.unique(stored["front"][:, 0, 0, 0])) > 10
    # Side by side by header stamps: the picture is of the same moment as the angle, to a period of each.
    ages = stored["timestamp"] - stored["stamps"][:, :2]
    assert np.median(ages[:, 0]) < 0.02
    assert np.median(ages[:, 1]) < 0.06
    assert [p for p in check(recorder.out) if p.severity == "error"] == []
    config = tmp_path / "train.yaml"
    config.write_text(f"""
name: recorded
data: {{path: {recorder.out}, observations: [qpos], val_fraction: 0}}
policy: {{n_obs_steps: 2, horizon: 8, n_action_steps: 4, path: {{type: flow}}, prediction: flow, net: {{type: mlp, width: 16}}}}
train: {{steps: 2, batch_size: 4, checkpoint_every: 2}}
""")
    assert cli.main(["train", str(config), "--out", str(tmp_path / "run")]) == 0


def test_kill_9_loses_the_open_episode_alone_and_ctrl_c_none(
    ros_module: Sandbox, driver: Driver, profile: Path, tmp_path: Path
) -> None:
    recorder = Recorder(ros_module, tmp_path / "set.zarr", profile, block=4)
    recorder.record(0.7)
    recorder.start()
    ros_module.spin(1.0)
    recorder.process.kill()
    assert len(Episodes.open(recorder.out)) == 1
    assert [p for p in check(recorder.out) if p.severity == "error"] == []
    again = Recorder(ros_module, tmp_path / "set.zarr", profile)
    assert "recording episode 1" in again.start()
    ros_module.spin(1.0)
    again.end()  # Ctrl-C in the middle of an episode
    assert "the recorder ended" in again.process.output()
    store = Episodes.open(recorder.out)
    assert len(store) == 2
    assert len(store.episode(1)["action"]) > 5
    assert check(recorder.out) == [p for p in check(recorder.out) if p.severity == "warning"]


def test_a_full_disk_and_a_dead_camera_are_told_and_cost_nothing_else(
    ros_module: Sandbox, driver: Driver, profile: Path, tmp_path: Path
) -> None:
    recorder = Recorder(ros_module, tmp_path / "set.zarr", profile, block=4)
    recorder.record(0.7)
    # The camera dies in the middle: told at once, and in the answer; what was recorded is kept.
    recorder.start()
    ros_module.spin(0.5)
    driver.camera = False
    ros_module.until(lambda: recorder.state()["stale"] == ["front"], 10.0, "the word that the camera is stale")
    answer = recorder.call("stop")
    assert answer.success
    assert "'front' was stale in" in answer.message
    refused = recorder.call("start")
    assert not refused.success
    assert "'front' came last" in refused.message
    driver.camera = True
    # No file may be larger than this, as on a full disk: the episode is lost, and that is said; those before are whole.
    recorder.start()
    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    told = ros_module.until(lambda: "LOST" in (s := recorder.state())["note"] and s, 20.0, "the word that the disk is full")
    assert "2 committed episodes are intact" in told["note"]
    assert not told["recording"]
    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    recorder.record(0.7)
    recorder.end()
    assert len(Episodes.open(recorder.out)) == 3
    assert [p for p in check(recorder.out) if p.severity == "error"] == []


def test_starting_by_itself_waits_for_room_on_the_disk(
    ros_module: Sandbox, driver: Driver, profile: Path, tmp_path: Path
) -> None:
    recorder = Recorder(ros_module, tmp_path / "set.zarr", profile, autostart=True, reserve=1e9)
    ros_module.until(lambda: "MB are free" in recorder.state()["note"], 30.0, "the word that there is no room")
    ros_module.spin(0.3)
    recorder.end()


def test_without_inputs_it_says_what_is_missing_and_wrong_parameters_end_it(
    ros_module: Sandbox, driver: Driver, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(PROFILE.format(camera="compressed"))
    recorder = Recorder(ros_module, tmp_path / "set.zarr", other)
    answer = recorder.call("start")
    assert not answer.success
    ros_module.until(lambda: "expected sensor_msgs/msg/CompressedImage" in recorder.call("start").message, 10.0, "the reason")
    second = Recorder(ros_module, tmp_path / "set.zarr", other)
    assert second.process.wait(20) == 2
    assert "written by another process" in second.process.output()
    recorder.end()
