"""The virtual arm over real ROS: a driver's topics, units and times; commands, reflexes, resets, faults, the record."""

import json
import logging
import signal
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ros import Process, Sandbox

from hardware.ros2.contract import COMMAND, LATCHED, message_type
from hardware.ros2.faults import Faults
from hardware.ros2.virtual_arm import VirtualArm

JOINTS = [f"joint{i}" for i in range(1, 8)]
STATE, TRIGGER = message_type("sensor_msgs/msg/JointState"), message_type("std_srvs/srv/Trigger")
ARRAY, BOOL = message_type("std_msgs/msg/Float64MultiArray"), message_type("std_msgs/msg/Bool")
COMMANDS = "forward_position_controller/commands"


class Arm:
    """The node in a process, and what tests do with it."""

    def __init__(self, ros: Sandbox) -> None:
        self.ros = ros
        self.process: Process = ros.start("hardware.ros2.virtual_arm", seed=100_000, image_height=48, image_width=64)
        self.process.wait_for_output("Hz of physics")
        self.publisher = ros.node.create_publisher(ARRAY, COMMANDS, COMMAND.to_ros())

    def state(self) -> Any:
        return self.ros.message(STATE, "joint_states")

    def joints(self) -> np.ndarray:
        return np.array(self.state().position)

    def service(self, name: str) -> str:
        answer = self.ros.call(TRIGGER, f"virtual_arm/{name}")
        assert answer.success, answer.message
        return str(answer.message)

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.service("record"))
        return found

    def reset(self, seed: int = 100_000) -> np.ndarray:
        """To an episode without faults: where its joints begin."""
        self.service("clear_faults")
        assert self.ros.set("virtual_arm", seed=seed) == []
        assert f"seed {seed}" in self.service("reset")
        self.service("clear_record")
        return self.joints()[:7]

    def move(self, begin: np.ndarray, by: float, steps: int = 30) -> None:
        """Joint 1, at 100 Hz."""
        self.ros.until(lambda: self.publisher.get_subscription_count() > 0, what="somebody who takes commands")
        for k in range(1, steps + 1):
            self.publisher.publish(ARRAY(data=(begin + by * k / steps * np.eye(7)[0]).tolist()))
            self.ros.spin(0.01)


@pytest.fixture(scope="module")
def arm(ros_module: Sandbox) -> Arm:
    return Arm(ros_module)


def test_states_are_those_of_a_driver(arm: Arm) -> None:
    begin = arm.reset()
    first, *_, last = arm.ros.messages(STATE, "joint_states", 40)
    assert first.name == [*JOINTS, "left_finger", "right_finger"]
    assert len(first.position) == len(first.velocity) == len(first.effort) == 9
    assert np.array(first.position)[:7] == pytest.approx(begin, abs=1e-6), "it stands"
    stamps = [stamp * 1e-9 for stamp in _stamps([first, last])]
    now = arm.ros.node.get_clock().now().nanoseconds * 1e-9
    assert stamps[0] < stamps[1] < now + 0.05
    assert now - stamps[1] < 5.0
    infos = arm.ros.node.get_publishers_info_by_topic("joint_states")
    assert [info.qos_profile.reliability.name for info in infos] == ["RELIABLE"], "as joint_state_broadcaster"


def test_seeds_are_the_simulation_s(arm: Arm) -> None:
    from sim.arm.lift import Lift

    task = Lift()
    task.reset(seed=123_456)
    assert arm.reset(123_456) == pytest.approx(task.positions[:7], abs=1e-9)
    pose = arm.ros.message(message_type("geometry_msgs/msg/PoseStamped"), "objects/cube/pose")
    position = pose.pose.position
    assert [position.x, position.y, position.z] == pytest.approx(task.poses()["cube"][:3], abs=1e-3), "it settles a little"
    assert pose.header.frame_id == "world"


def test_streamed_positions_move_it_and_a_jump_trips_its_reflex(arm: Arm) -> None:
    begin = arm.reset()
    arm.move(begin, 0.1)
    arm.ros.until(lambda: abs(arm.joints()[0] - begin[0] - 0.1) < 5e-3, 5.0, "the arm at its target")
    record = arm.record()
    assert record["commands"] == 30
    assert record["reflexes"] == 0
    assert 0.05 < record["velocity"]["worst"] < 1.0
    assert record["velocity"]["of"] == "joint1"
    arm.publisher.publish(ARRAY(data=(begin + 0.5).tolist()))
    arm.ros.until(lambda: arm.record()["reflex"], 5.0, "the reflex")
    arm.process.wait_for_output("the arm stands until ~/reset_reflex")
    stands = arm.joints()
    arm.move(begin, 0.0, steps=5)
    assert arm.joints() == pytest.approx(stands, abs=5e-3)
    arm.service("reset_reflex")
    arm.move(stands[:7], -0.1)
    arm.ros.until(lambda: abs(arm.joints()[0] - stands[0] + 0.1) < 5e-3, 5.0, "the arm at its target")


def test_commands_that_no_controller_takes_are_refused(arm: Arm) -> None:
    begin = arm.reset()
    arm.publisher.publish(ARRAY(data=[0.0] * 6))
    arm.publisher.publish(ARRAY(data=[float("nan")] * 7))
    arm.ros.until(lambda: arm.record()["refused"] == 2, 5.0, "two refusals")
    arm.process.wait_for_output("6 values for 7 joints")
    assert arm.joints()[:7] == pytest.approx(begin, abs=1e-3)


def test_trajectories_and_the_gripper(arm: Arm) -> None:
    begin = arm.reset()
    trajectory = message_type("trajectory_msgs/msg/JointTrajectory")(joint_names=JOINTS[::-1])
    point = message_type("trajectory_msgs/msg/JointTrajectoryPoint")(positions=(begin + 0.05)[::-1].tolist())
    point.time_from_start.nanosec = 300_000_000
    trajectory.points = [point]
    topic = "joint_trajectory_controller/joint_trajectory"
    publisher = arm.ros.node.create_publisher(type(trajectory), topic, COMMAND.to_ros())
    grip = arm.ros.node.create_publisher(message_type("std_msgs/msg/Float64"), "gripper/command", COMMAND.to_ros())
    arm.ros.until(lambda: publisher.get_subscription_count() and grip.get_subscription_count(), what="the controllers")
    publisher.publish(trajectory)
    grip.publish(message_type("std_msgs/msg/Float64")(data=0.06))
    arm.ros.until(lambda: np.abs(arm.joints()[:7] - begin - 0.05).max() < 5e-3, 5.0, "the end of the trajectory")
    arm.ros.until(lambda: np.abs(arm.joints()[7:] - 0.03).max() < 2e-3, 5.0, "two fingers, each half the width")
    point.velocities = [0.1] * 7
    publisher.publish(trajectory)
    arm.ros.until(lambda: arm.record()["refused"] == 1, 5.0, "the refusal of a moving end")
    ragged = type(point)(positions=[0.0] * 6)
    trajectory.points = [point, ragged]
    publisher.publish(trajectory)
    arm.ros.until(lambda: arm.record()["refused"] == 2, 5.0, "the refusal of a point that is too short")


def test_success_is_said_after_every_reset(arm: Arm) -> None:
    arm.reset()
    said: list[bool] = []
    subscription = arm.ros.node.create_subscription(
        BOOL, "virtual_arm/success", lambda message: said.append(message.data), LATCHED.to_ros()
    )
    arm.ros.until(lambda: said, 5.0, "the latched success")
    count = len(said)
    arm.service("reset")
    arm.ros.until(lambda: len(said) > count, 5.0, "success again")
    assert not any(said)
    arm.ros.node.destroy_subscription(subscription)


def test_a_reset_is_answered_when_the_pose_of_before_is_past(arm: Arm) -> None:
    """Who types `arm reset; reset; start` begins where the arm is then."""
    begin = arm.reset()
    heard: list[list[float]] = []
    subscription = arm.ros.node.create_subscription(STATE, "joint_states", lambda m: heard.append(m.position), 10)
    arm.move(begin, 0.3)
    arm.ros.until(lambda: heard and heard[-1][0] > begin[0] + 0.2, 5.0, "the arm elsewhere")
    arm.service("reset")
    assert heard[-1][:7] == pytest.approx(begin, abs=1e-3)
    arm.ros.node.destroy_subscription(subscription)


@pytest.mark.parametrize("kind", ["sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"])
def test_cameras_are_drawn_for_who_looks(arm: Arm, kind: str) -> None:
    from hardware.ros2.messages import read_image
    from hardware.ros2.profile import Input

    arm.reset()
    compressed = "Compressed" in kind
    topic = "front/image_raw/compressed" if compressed else "front/image_raw"
    message = arm.ros.message(message_type(kind), topic)
    picture = read_image(message, Input(type="compressed" if compressed else "image", topic=topic, size=(48, 64)))
    assert picture.std() > 10, "it shows something"
    assert message.header.stamp.sec > 0


FAULTS = {
    "drop": (1.0, lambda before, after: not after),
    "duplicate": (1.0, lambda before, after: len(set(_stamps(after))) <= len(after) / 2 + 1),
    "reorder": (1.0, lambda before, after: _stamps(after) != sorted(_stamps(after))),
    "nan": (1.0, lambda before, after: all(np.isnan(m.position).any() for m in after)),
    "freeze": (True, lambda before, after: len(set(_stamps(after))) == 1),
    "wrong_names": (1.0, lambda before, after: all(m.name[0] == "not_joint1" for m in after)),
    "wrong_length": (1.0, lambda before, after: all(len(m.position) == 8 for m in after)),
    "clock_jump": (-5.0, lambda before, after: max(_stamps(after)) < min(_stamps(before))),
}


def _stamps(messages: list[Any]) -> list[int]:
    return [m.header.stamp.sec * 1_000_000_000 + m.header.stamp.nanosec for m in messages]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_come_by_parameter_and_go_by_service(arm: Arm, fault: str) -> None:
    arm.reset()
    value, expected = FAULTS[fault]
    before = arm.ros.messages(STATE, "joint_states", 3)
    assert arm.ros.set("virtual_arm", **{f"faults.state.{fault}": value}) == []
    after: list[Any] = []
    subscription = arm.ros.node.create_subscription(STATE, "joint_states", after.append, 10)
    arm.ros.until(lambda: arm.record()["faults"]["state"].get(fault, 0) > 60, 10.0, "faults in the record")
    arm.ros.node.destroy_subscription(subscription)
    assert expected(before, after[-20:]), fault
    arm.service("clear_faults")
    assert len(set(_stamps(arm.ros.messages(STATE, "joint_states", 5)))) == 5


def test_delayed_states_are_old_when_they_come(arm: Arm) -> None:
    arm.reset()
    assert arm.ros.set("virtual_arm", **{"faults.state.delay": 0.3}) == []
    ages: list[float] = []
    subscription = arm.ros.node.create_subscription(
        STATE, "joint_states", lambda message: ages.append((time.time_ns() - _stamps([message])[0]) * 1e-9), 10
    )
    arm.ros.until(lambda: len(ages) > 20 and min(ages[-10:]) > 0.29, 10.0, "states that are old")
    arm.ros.node.destroy_subscription(subscription)
    arm.service("clear_faults")
    assert arm.record()["faults"]["state"].get("delay", 0) > 10


def test_stuck_values_have_new_stamps(arm: Arm) -> None:
    begin = arm.reset()
    arm.ros.set("virtual_arm", **{"faults.state.stuck": True})
    arm.move(begin, 0.05)
    assert arm.joints()[0] == pytest.approx(begin[0], abs=1e-3)
    arm.service("clear_faults")
    arm.ros.until(lambda: arm.joints()[0] > begin[0] + 0.04, 5.0, "what it really does")


def test_impossible_faults_are_refused_and_parameters_are_described(arm: Arm) -> None:
    assert arm.ros.set("virtual_arm", **{"faults.state.drop": 2.0}) != []
    assert "read-only" in arm.ros.set("virtual_arm", state_rate=100.0)[0]
    assert "-3" in arm.ros.set("virtual_arm", seed=-3)[0]
    arm.reset()
    names = arm.ros.call(message_type("rcl_interfaces/srv/ListParameters"), "virtual_arm/list_parameters").result.names
    for kind in ("state", "camera", "poses"):
        assert {f"faults.{kind}.{name}" for name in Faults.model_fields} <= set(names)


def test_physics_keeps_up_more_or_less(arm: Arm) -> None:
    """Loosely: the machine that runs tests may be busy."""
    arm.reset()
    arm.ros.spin(1.0)
    record = arm.record()
    assert record["steps"] > 40
    assert 0.1 < record["real_time_factor"] <= 1.0


def test_robosuite_s_panda_stands_behind_the_same_topics(ros: Sandbox) -> None:
    ros.start("hardware.ros2.virtual_arm", profile="panda", cameras=False)
    first = ros.message(STATE, "joint_states", 60.0)
    assert first.name == [*(f"panda_joint{i}" for i in range(1, 8)), "panda_finger_joint1", "panda_finger_joint2"]
    publisher = ros.node.create_publisher(ARRAY, COMMANDS, COMMAND.to_ros())
    ros.until(lambda: publisher.get_subscription_count() > 0, what="somebody who takes commands")
    goal = np.array(first.position[:7]) + 0.03
    publisher.publish(ARRAY(data=goal.tolist()))
    ros.until(
        lambda: np.abs(np.array(ros.message(STATE, "joint_states").position[:7]) - goal).max() < 5e-3, 10.0, "the arm there"
    )
    record = json.loads(ros.call(TRIGGER, "virtual_arm/record").message)
    assert record["table"]["worst"] < 0, "above it"
    assert record["reflexes"] == 0


def test_ctrl_c_ends_it_and_the_record_is_kept(ros: Sandbox) -> None:
    path = ros.folder / "record.json"
    process = ros.start("hardware.ros2.virtual_arm", record_path=str(path), cameras=False)
    ros.messages(STATE, "joint_states", 2)  # the first comes before physics has been stepped
    process.send(signal.SIGINT)
    assert process.wait(10.0) == 0
    assert json.loads(path.read_text())["steps"] > 0


def test_what_cannot_be_is_said_in_one_line(ros: Sandbox) -> None:
    processes = [ros.start("hardware.ros2.virtual_arm", **wrong) for wrong in ({"profile": "virtul"}, {"seed": -3})]
    for process, said in zip(processes, ("no profile 'virtul'", "value: -3"), strict=True):
        assert process.wait(30.0) == 2
        assert said in process.output()
        assert "Traceback" not in process.output()


def test_a_service_that_fails_says_why_and_the_arm_lives_on() -> None:
    answers: dict[str, Any] = {}
    arm = VirtualArm.__new__(VirtualArm)
    arm.node = SimpleNamespace(
        create_service=lambda kind, name, answer: answers.update({name: answer}),
        get_parameter=lambda name: SimpleNamespace(value=5),
        get_logger=lambda: logging.getLogger("test"),
    )

    def broken(seed: int) -> None:
        raise ValueError(f"no episode {seed}")

    arm.driver = SimpleNamespace(reset=broken)  # type: ignore[assignment]
    arm._faults = SimpleNamespace(clear=list)  # type: ignore[assignment]
    arm.driver.reset_reflex = arm.driver.report = list  # type: ignore[method-assign,assignment]
    arm._serve()
    answer = answers["~/reset"](None, TRIGGER.Response())
    assert (answer.success, answer.message) == (False, "ValueError: no episode 5")
