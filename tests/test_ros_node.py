"""The policy's lifecycle node: what it refuses and says why, what it sends and when it stops; over real ROS."""

import inspect
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rig import HOME, JOINTS, PROFILE, Driver, Rig, save_policy
from ros import Sandbox
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray

from hardware.ros2.contract import COMMAND, LATCHED, SIGNAL
from hardware.ros2.parameters import NodeConfig, descriptor
from hardware.ros2.policy_node import NAME, PolicyNode

PERIOD = 1.0 / PROFILE.rate


class Stand:
    """A configured node, its driver, and two checkpoints."""

    def __init__(self, ros: Sandbox, folder: Path) -> None:
        save_policy(folder / "first")
        save_policy(folder / "second", ahead=(0.45, 0.1, 0.2, 0.0, 0.06))
        self.ros, self.folder, self.driver = ros, folder, Driver()
        self.rig = Rig(ros, checkpoint=str(folder / "first"), inference="thread", ready_timeout=5.0)

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


@pytest.fixture(scope="module")
def bench(ros_module: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    stand = Stand(ros_module, tmp_path_factory.mktemp("policies"))
    yield stand
    stand.close()


@pytest.fixture
def stand(bench: Stand) -> Iterator[Stand]:
    """Inactive, the arm at home, nothing sent."""
    bench.driver.alive = True
    bench.driver.put()
    if bench.rig.node.lifecycle == "unconfigured":
        assert bench.rig.to("configure"), bench.rig.node.refused
    bench.driver.commands.clear()
    yield bench
    if bench.rig.node.lifecycle == "active":
        assert bench.rig.to("deactivate")
    bench.rig.call("reset")


@pytest.fixture
def active(stand: Stand) -> Stand:
    assert stand.rig.to("activate")
    stand.driver.commands.clear()
    return stand


@pytest.fixture
def running(active: Stand) -> Stand:
    active.ros.until(lambda: active.rig.call("start") == (True, "policy begins"), what="a start")  # states may be late
    active.ros.until(lambda: len(active.driver.commands) > 20, what="commands")
    return active


# ---- parameters ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NodeConfig.model_fields)
def test_every_parameter_says_what_it_is_and_what_it_may_be(name: str) -> None:
    found = descriptor(name)
    assert len(found.description) > 15
    kind = NodeConfig.model_fields[name].annotation
    assert kind not in (int, float) or found.additional_constraints.startswith("from ")


def test_parameters_out_of_range_are_refused_and_named(stand: Stand) -> None:
    assert "speed_scale out of range Min: 0.01, Max: 1.0" in stand.rig.set(speed_scale=0.0)[0]
    assert "speed_scale out of range" in stand.rig.set(speed_scale=float("nan"))[0]
    assert "rate out of range" in stand.rig.set(rate=5000.0)[0]
    assert "'live' or 'shadow', found 'off'" in stand.rig.set(mode="off")[0]
    assert "Wrong parameter type" in stand.rig.set(replan=1.5)[0]
    assert stand.rig.set(ready_timeout=5) == []  # a whole number where one with a fraction may be


def test_a_parameter_of_the_command_line_out_of_range_ends_the_program_with_one_line(ros: Sandbox) -> None:
    process = ros.start("hardware.ros2.policy_node", rate=5000.0)
    assert process.wait(60) == 2
    assert "rate" in process.output()
    assert "Traceback" not in process.output()


def test_attributes_of_the_node_do_not_overwrite_those_of_rclpy(stand: Stand) -> None:
    """`_clock` or `_state` of ours would replace rclpy's without a word."""
    import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    plain = LifecycleNode("plain", context=context)
    theirs = set(vars(plain)) | set(dir(LifecycleNode))
    plain.destroy_node()
    context.try_shutdown()
    ours = set(re.findall(r"self\.(\w+)(?=(?:, self\.\w+)*(?:: [^=\n]+)? = )", inspect.getsource(PolicyNode)))
    assert {"deployment", "_time", "_messages"} <= ours  # the search finds something
    assert not ours & theirs


# ---- configure, activate -------------------------------------------------------------------------------------------------------


def test_configure_without_a_driver_names_the_topic_and_the_mend(stand: Stand) -> None:
    assert stand.rig.to("cleanup")
    stand.driver.alive = False
    stand.rig.set(ready_timeout=0.3)
    assert not stand.rig.to("configure")
    told = stand.rig.until(lambda told: "refused" in told["refused"])
    assert told["lifecycle"] == "unconfigured"
    assert "nothing has come on '/joint_states'" in told["refused"]
    stand.driver.alive = True
    stand.rig.set(ready_timeout=5.0)
    assert stand.rig.to("configure")
    assert stand.rig.until(lambda told: told["lifecycle"] == "inactive")["refused"] == ""


def test_configure_waits_for_nothing_once_the_program_is_to_end(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stand.rig.to("cleanup")
    stand.driver.alive = False
    stand.rig.set(ready_timeout=500.0)
    ending = threading.Event()
    monkeypatch.setattr(stand.rig.node, "_ending", ending)
    threading.Timer(0.3, ending.set).start()
    assert not stand.rig.to("configure")  # within less than the 30 s that this waits
    stand.rig.set(ready_timeout=5.0)


def test_configure_checks_the_names_of_joints(stand: Stand) -> None:
    assert stand.rig.to("cleanup")
    names, stand.driver.names = stand.driver.names, [name.replace("joint4", "elbow") for name in stand.driver.names]
    stand.rig.set(ready_timeout=0.5)
    stand.ros.spin(0.1)
    assert not stand.rig.to("configure")
    assert "joint4" in stand.rig.node.refused
    stand.driver.names = names
    stand.rig.set(ready_timeout=5.0)


def test_configure_of_what_is_no_checkpoint_says_so(stand: Stand) -> None:
    assert stand.rig.to("cleanup")
    assert stand.rig.set(checkpoint=str(stand.folder / "nowhere")) == []  # nothing is loaded before configure
    assert not stand.rig.to("configure")
    assert "nowhere" in stand.rig.node.refused
    assert stand.rig.node.lifecycle == "unconfigured"
    stand.rig.set(checkpoint=str(stand.folder / "first"))


def test_a_policy_of_another_robot_is_refused_before_the_robot_is_waited_for(stand: Stand) -> None:
    assert stand.rig.to("cleanup")
    stand.rig.set(profile="ur5e", ready_timeout=500.0)  # nobody publishes a UR5e's topics
    assert not stand.rig.to("configure")
    assert "qpos" in stand.rig.node.refused
    assert "deploy a policy that was trained for this robot" in stand.rig.node.refused
    stand.rig.set(profile="virtual", ready_timeout=5.0)


def test_what_nobody_foresaw_in_a_transition_is_said_and_leaves_the_node_usable(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rclpy swallows exceptions of transitions."""

    def broken() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(stand.rig.node, "_activate", broken)
    assert not stand.rig.to("activate")
    assert stand.rig.node.refused == "activate failed: ZeroDivisionError: by zero"
    assert stand.rig.node.lifecycle == "unconfigured"  # by way of error processing
    assert stand.rig.node.robot is None
    monkeypatch.undo()
    assert stand.rig.to("configure", "activate")


def test_nothing_is_sent_before_somebody_starts(active: Stand) -> None:
    active.ros.spin(0.3)
    assert active.rig.told[-1]["mode"] == "idle"
    assert active.sent() == []
    assert active.rig.call("stop")[0]
    active.ros.spin(0.2)
    assert active.sent() == []


def test_the_first_command_is_where_the_arm_is_whatever_the_order_of_its_joints(running: Stand) -> None:
    """A stripped gear: the first action must not jump. Joint states come in an order of their own."""
    commands = np.array(running.sent())
    assert np.abs(commands[0] - HOME[: len(JOINTS)]).max() < 0.005
    speed = np.abs(np.diff(commands, axis=0)).max(axis=0) / PERIOD
    assert (speed < 1.3 * 0.5 * np.array([2.2] * 4 + [2.6] * 3)).all()
    assert np.abs(commands[-1] - commands[0]).max() > 0  # and it does move


# ---- starting ------------------------------------------------------------------------------------------------------------------


def test_start_while_inactive_says_what_to_do(stand: Stand) -> None:
    assert stand.rig.call("start") == (False, "the node is inactive; configure and activate it first")


def test_a_start_outside_the_limits_is_refused_and_names_the_joint(active: Stand) -> None:
    active.driver.put(joint4=2.95)
    active.ros.spin(0.1)
    ok, message = active.rig.call("start")
    assert not ok
    assert "joint4: 2.95, limit 2.8" in message
    assert message in active.rig.until(lambda told: "joint4" in told["refused"])["refused"]
    assert "joint4" in active.diagnosis("node").message
    active.ros.spin(0.1)
    assert active.sent() == []


def test_a_start_unlike_the_training_data_is_refused_and_names_the_joint(active: Stand) -> None:
    active.driver.put(joint1=-2.5)  # within the limits, and nowhere near a demonstration
    active.ros.spin(0.1)
    ok, message = active.rig.call("start")
    assert not ok
    assert "start_unfamiliar qpos joint1: -2.5" in message
    assert active.sent() == []


def test_a_second_master_on_the_command_topic_is_refused(active: Stand) -> None:
    other = active.ros.node.create_publisher(Float64MultiArray, PROFILE.command.topic, COMMAND.to_ros())
    active.ros.until(lambda: active.rig.node.robot.rivals(), what="discovery of the other")  # type: ignore[union-attr]
    ok, message = active.rig.call("start")
    assert active.diagnosis("node").message.startswith("active: 2 nodes publish on")  # also of one that comes later
    active.ros.node.destroy_publisher(other)
    assert not ok
    assert "2 nodes publish on '/forward_position_controller/commands'" in message
    active.ros.until(lambda: not active.rig.node.robot.rivals(), what="its end")  # type: ignore[union-attr]
    assert active.rig.call("start")[0]


def test_a_second_master_that_comes_while_the_arm_moves_stops_it(running: Stand) -> None:
    other = running.ros.node.create_publisher(Float64MultiArray, PROFILE.command.topic, COMMAND.to_ros())
    cause = running.rig.mode("stopped")["cause"]
    assert cause.startswith("2 nodes publish on '/forward_position_controller/commands': ")
    assert f"{NAME}_io" in cause
    assert running.ros.node.get_name() in cause
    running.still()
    running.ros.node.destroy_publisher(other)
    running.ros.until(lambda: not running.rig.node.robot.rivals(), what="its end")  # type: ignore[union-attr]
    running.ros.spin(0.5)
    assert running.rig.told[-1]["mode"] == "stopped"  # a person starts it again


def test_joint_states_of_ours_from_a_second_node_stop_the_arm_and_those_of_others_do_not(running: Stand) -> None:
    """Grippers publish on joint_states, too."""
    second = running.ros.node.create_publisher(JointState, "joint_states", SIGNAL.to_ros())

    def publish(names: list[str]) -> None:
        message = JointState(name=names, position=[0.1] * len(names))
        message.header.stamp = running.ros.node.get_clock().now().to_msg()
        second.publish(message)

    def say(names: list[str], seconds: float) -> None:
        timer = running.ros.node.create_timer(0.02, lambda: publish(names))
        running.ros.spin(seconds)
        running.ros.node.destroy_timer(timer)

    say(["another_gripper"], 1.0)
    assert running.rig.told[-1]["mode"] == "running"
    timer = running.ros.node.create_timer(0.02, lambda: publish(list(PROFILE.joint_names)))
    running.rig.mode("stopped")
    running.ros.until(lambda: "where our joints are" in running.diagnosis("node").message, what="diagnostics")
    ok, message = running.rig.call("start")
    running.ros.node.destroy_timer(timer)
    running.ros.node.destroy_publisher(second)
    assert not ok
    assert message.startswith("2 nodes say on '/joint_states' where our joints are: ")
    assert "/driver" in message


def test_enable_starts_and_stops(active: Stand) -> None:
    assert active.rig.enable(True) == (True, "policy begins")
    active.ros.spin(0.03)
    assert active.rig.told[-1]["source"] == "policy"  # said with the answer, not with the next diagnostics
    active.rig.mode("running")
    assert active.rig.enable(False)[0]
    assert active.rig.mode("stopped")["cause"] == "disabled"
    active.still()


def test_home_goes_there_and_says_so(active: Stand) -> None:
    active.driver.put(joint1=0.1)
    active.ros.spin(0.1)
    assert active.rig.call("home") == (True, "home begins")
    assert active.rig.until(lambda told: told["cause"] == "home reached")
    assert abs(active.sent()[-1][0]) < 1e-3
    assert active.diagnosis("control").level == b"\x00"  # nothing is wrong


# ---- stopping ------------------------------------------------------------------------------------------------------------------


def test_a_stop_decelerates_and_goes_on_sending_the_held_position(running: Stand) -> None:
    """Forward controllers have no timeout: what holds the arm is said again and again."""
    assert running.rig.call("stop")[0]
    running.still()
    assert running.rig.mode("stopped")["cause"] == "asked"
    count = len(running.sent())
    running.ros.spin(0.5)
    assert len(running.sent()) > count + 10


def test_stale_joint_states_hold_the_arm_and_diagnostics_say_so(running: Stand) -> None:
    running.driver.alive = False
    told = running.rig.mode("holding")
    assert told["cause"].startswith("stale")
    running.still()
    entry = running.diagnosis("inputs")
    assert entry.level == b"\x02"
    assert "state is" in entry.message
    assert running.rig.mode("stopped")["cause"].startswith("stale")  # too long for going on by itself
    assert running.diagnosis("control").level == b"\x02"
    running.driver.alive = True
    running.ros.spin(0.5)
    assert running.rig.told[-1]["mode"] == "stopped"  # only a person starts it again
    assert running.rig.call("start")[0]


def test_an_emergency_stop_latches_until_reset_and_then_start(running: Stand) -> None:
    """Restart after a pause must not happen by itself."""
    rig = running.rig
    assert rig.call("estop")[0]
    running.still()
    assert rig.mode("estopped")["cause"] == "estop asked"
    assert rig.call("start") == (False, "estopped (asked): reset first, then start")
    assert rig.enable(True)[0] is False
    assert rig.call("home")[0] is False
    assert rig.call("reset")[0]
    rig.mode("stopped")
    rest = running.sent()[-1]
    running.ros.spin(0.3)
    np.testing.assert_array_equal(running.sent()[-1], rest)
    assert rig.call("start")[0]


def test_an_emergency_stop_outlives_deactivate_cleanup_and_configure(running: Stand) -> None:
    rig = running.rig
    assert rig.call("estop")[0]
    assert rig.to("deactivate", "cleanup", "configure", "activate")
    assert rig.mode("estopped")
    assert rig.call("start")[0] is False
    assert rig.call("reset")[0]
    assert rig.call("start")[0]


@pytest.mark.parametrize("quality", [SIGNAL.to_ros(), LATCHED.to_ros(), qos_profile_sensor_data], ids=["cli", "latched", "fast"])
def test_the_emergency_stop_topic_is_heard_whatever_its_publisher_promises(running: Stand, quality: QoSProfile) -> None:
    """A mismatch of quality of service is silent."""
    button = running.ros.node.create_publisher(Bool, "estop", quality)
    running.ros.until(lambda: button.get_subscription_count() >= 1, what="discovery")
    running.ros.spin(0.2)
    for _ in range(3):
        button.publish(Bool(data=True))
    running.rig.mode("estopped")
    ok, message = running.rig.call("reset")
    assert not ok
    assert f"{running.ros.node.get_name()} still says pressed on '/estop'" in message
    for _ in range(3):
        button.publish(Bool(data=True))
        button.publish(Bool(data=False))  # a press is heard though its release follows; a button that is let go releases nothing
    running.ros.spin(0.2)
    assert running.rig.told[-1]["mode"] == "estopped"
    running.ros.node.destroy_publisher(button)
    assert running.rig.call("reset")[0]


def test_a_button_that_is_gone_while_pressed_keeps_the_stop(active: Stand) -> None:
    button = active.ros.node.create_publisher(Bool, "estop", LATCHED.to_ros())
    active.ros.until(lambda: button.get_subscription_count() >= 1, what="discovery")
    button.publish(Bool(data=True))
    active.rig.mode("estopped")
    active.ros.node.destroy_publisher(button)
    active.ros.until(lambda: "nobody publishes it any more" in active.rig.call("reset")[1], what="the end of the button")
    again = active.ros.node.create_publisher(Bool, "estop", LATCHED.to_ros())
    again.publish(Bool(data=False))
    active.ros.until(lambda: active.rig.call("reset")[0], what="a release")
    active.ros.node.destroy_publisher(again)


def test_a_reset_alone_moves_nothing_though_the_node_starts_by_itself(stand: Stand) -> None:
    assert stand.rig.set(autostart=True) == []
    assert stand.rig.call("estop")[0]
    assert stand.rig.to("activate")
    stand.ros.spin(1.2)  # it would try once a second
    assert stand.rig.call("reset")[0]
    stand.ros.spin(1.5)
    assert stand.sent() == []
    assert stand.rig.call("start")[0]
    stand.rig.mode("running")
    assert stand.rig.set(autostart=False) == []


def test_it_starts_by_itself_once_and_only_once(stand: Stand) -> None:
    """Whoever else starts it meanwhile, and whatever stops it then: a person starts it again."""
    stand.driver.alive = False
    stand.ros.spin(0.3)
    assert stand.rig.set(autostart=True) == []
    assert stand.rig.to("activate")
    stand.rig.until(lambda told: "autostart refused" in told["refused"])
    stand.driver.alive = True
    stand.ros.until(lambda: stand.rig.call("start")[0] or stand.rig.told[-1]["source"] == "policy", what="a start")
    stand.rig.mode("running")
    stand.driver.alive = False
    stand.rig.mode("stopped")
    stand.driver.alive = True
    stand.ros.spin(2.2)
    assert stand.rig.told[-1]["mode"] == "stopped"
    assert stand.rig.set(autostart=False) == []


def test_a_stop_waits_for_no_start_that_waits_for_its_plan(active: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active.rig.node.deployment._policy, "ready", lambda now: False)
    assert active.rig.call("start") == (True, "policy begins")
    begin = time.monotonic()
    assert active.rig.enable(False)[0]
    assert time.monotonic() - begin < 0.5
    active.rig.mode("stopped")


def test_an_emergency_stop_while_inactive_counts(stand: Stand) -> None:
    assert stand.rig.call("estop")[0]
    assert stand.rig.to("activate")
    assert stand.rig.call("start") == (False, "estopped (asked): reset first, then start")


def test_deactivate_ends_the_policy_first_then_comes_to_rest_then_is_silent(running: Stand) -> None:
    """A stop that is sent while the policy still runs is followed by a stale action."""
    running.ros.spin(0.5)
    assert running.rig.to("deactivate")
    running.ros.spin(0.2)
    commands = np.array(running.sent())
    speed = np.linalg.norm(np.diff(commands, axis=0), axis=1) / PERIOD
    assert speed.max() > 0.02
    assert speed[-1] < 0.2 * speed[-50:].max()
    count = len(commands)
    running.ros.spin(0.3)
    assert len(running.sent()) == count


def test_after_an_activation_control_begins_where_the_arm_is(running: Stand) -> None:
    """Others may have moved it while the node was inactive."""
    assert running.rig.to("deactivate")
    running.ros.until(running.silent, what="the last command")  # on a busy computer it comes late, and the driver heeds it
    running.driver.put(joint1=0.4)
    running.ros.spin(0.1)
    running.driver.commands.clear()
    assert running.rig.to("activate")
    running.ros.until(lambda: running.rig.call("start") == (True, "policy begins"), what="a start")
    running.ros.until(lambda: len(running.sent()) > 3)
    assert abs(running.sent()[0][0] - 0.4) < 0.005


@pytest.fixture
def watched(stand: Stand) -> Iterator[Stand]:
    """Active, by a profile in which a cube that lies still without noise is a dead sensor."""
    profile = stand.folder / "noisy.yaml"
    profile.write_text("base: virtual\ninputs: {cube: {stuck: 0.3}}\n")
    assert stand.rig.to("cleanup")
    assert stand.rig.set(profile=str(profile)) == []
    stand.driver.noise = 1e-9
    assert stand.rig.to("configure", "activate")
    yield stand
    stand.driver.noise = 0.0
    assert stand.rig.to("deactivate", "cleanup")
    assert stand.rig.set(profile="virtual") == []


def test_a_sensor_that_says_the_same_for_ever_holds_the_arm(watched: Stand) -> None:
    """Its stamps are new."""
    watched.ros.until(lambda: watched.rig.call("start") == (True, "policy begins"), what="a start")
    watched.rig.mode("running")
    watched.driver.noise = 0.0
    watched.rig.until(lambda told: told["mode"] == "holding" and told["cause"].startswith("stuck cube: "))
    assert watched.rig.mode("stopped")["cause"].startswith("stuck cube: ")
    watched.still()
    ok, message = watched.rig.call("start")
    assert not ok
    assert message.startswith("stuck cube: ")
    assert "restart that sensor" in message


# ---- deadman, shadow, swap -----------------------------------------------------------------------------------------------------


def test_the_deadman_lets_it_move_and_stops_it(stand: Stand) -> None:
    assert stand.rig.set(deadman=True) == []
    assert stand.rig.to("activate")
    ok, message = stand.rig.call("start")
    assert not ok
    assert "deadman" in message
    hand = stand.ros.node.create_publisher(Bool, "deadman", SIGNAL.to_ros())
    timer = stand.ros.node.create_timer(0.03, lambda: hand.publish(Bool(data=True)))
    stand.ros.until(lambda: "deadman" in stand.diagnosis("control").message or _pressed(stand), what="the deadman to be seen")
    stand.ros.until(lambda: stand.rig.call("start")[0], what="a start")
    stand.rig.mode("running")
    timer.cancel()  # the hand is gone, and says nothing
    assert "deadman" in stand.rig.until(lambda told: told["mode"] == "stopped")["cause"]
    stand.still()
    stand.ros.node.destroy_timer(timer)
    stand.ros.node.destroy_publisher(hand)
    assert stand.rig.to("deactivate")
    assert stand.rig.set(deadman=False) == []


def _pressed(stand: Stand) -> bool:
    return {value.key: value.value for value in stand.diagnosis("control").values}["deadman"] == "pressed"


def test_in_shadow_mode_nothing_is_sent_and_everything_is_shown(stand: Stand) -> None:
    assert "cleanup first" in stand.rig.set(mode="shadow")[0]
    assert stand.rig.to("cleanup")
    assert stand.rig.set(mode="shadow") == []
    assert stand.rig.to("configure", "activate")
    assert stand.ros.node.get_publishers_info_by_topic(f"/{PROFILE.command.topic}") == []  # there is not even a publisher
    ok, message = stand.rig.call("start")
    assert ok
    assert "shadow mode: nothing is sent" in message
    assert stand.rig.until(lambda told: told["mode"] == "running")["drives"] == "shadow"
    shown = stand.ros.messages(JointState, f"{NAME}/shadow", 60)
    assert shown[0].name == list(PROFILE.names)
    assert np.abs(np.diff([message.position for message in shown], axis=0)).max() > 0
    assert stand.sent() == []
    assert stand.rig.to("deactivate", "cleanup")
    assert stand.rig.set(mode="live") == []


def test_what_the_policy_wanted_is_published_to_who_listens(running: Stand) -> None:
    """A recorder stores both what was commanded and what was executed."""
    wanted = running.ros.messages(JointState, f"{NAME}/commanded", 10)
    assert wanted[0].name == list(PROFILE.names)
    assert np.abs(np.array(wanted[-1].position[:7]) - running.sent()[-1]).max() > 1e-6


def test_a_checkpoint_is_swapped_while_inactive_and_only_then(running: Stand) -> None:
    rig, second = running.rig, str(running.folder / "second")
    assert rig.set(checkpoint=second) == ["checkpoint: the node is active; deactivate it first"]
    assert rig.to("deactivate")
    (running.folder / "torn").mkdir()
    refused = rig.set(checkpoint=str(running.folder / "torn"))
    assert "The policy of before stays" in refused[0]
    assert rig.set(checkpoint=second) == []
    assert rig.until(lambda told: told["checkpoint"] == second)["lifecycle"] == "inactive"
    running.driver.put()
    running.ros.spin(0.1)
    assert rig.to("activate")
    assert rig.call("start")[0]
    running.ros.until(lambda: running.sent()[-1][0] > 0.1, what="the way that the second one goes")
    assert rig.to("deactivate")
    assert rig.set(checkpoint=str(running.folder / "first")) == []


# ---- what dies -----------------------------------------------------------------------------------------------------------------


def test_an_exception_in_control_stops_the_arm_and_is_said(running: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(running.rig.node.robot, "observe", broken)
    assert "ZeroDivisionError" in running.rig.mode("stopped")["cause"]
    running.still()
    entry = running.diagnosis("control")
    assert entry.level == b"\x02"
    assert "ZeroDivisionError" in entry.message


def test_the_death_of_the_inference_process_stops_the_arm(stand: Stand) -> None:
    assert stand.rig.set(inference="process") == []
    assert stand.rig.to("activate")
    assert stand.rig.call("start")[0]
    stand.ros.until(lambda: len(stand.sent()) > 10, what="commands")
    planner: Any = stand.rig.node.deployment._planner  # type: ignore[union-attr]
    os.kill(planner.pid, signal.SIGKILL)
    told = stand.rig.mode("stopped")
    assert "killed by SIGKILL" in told["cause"]
    assert stand.diagnosis("inference").level == b"\x02"
    stand.still()
    assert stand.rig.to("deactivate")
    assert not stand.rig.to("activate")
    assert "cleanup and configure" in stand.rig.node.refused
    assert stand.rig.to("cleanup")
    assert stand.rig.set(inference="thread") == []


def test_the_death_of_an_inference_process_that_nobody_asks_is_said_at_once(stand: Stand) -> None:
    assert stand.rig.set(inference="process") == []
    assert stand.rig.to("activate")
    planner: Any = stand.rig.node.deployment._planner  # type: ignore[union-attr]
    os.kill(planner.pid, signal.SIGKILL)
    told = stand.rig.until(lambda told: "inference process" in told["refused"])
    assert "killed by SIGKILL" in told["refused"]
    assert "deactivate, cleanup and configure" in told["refused"]
    ok, message = stand.rig.call("start")
    assert not ok
    assert "killed by SIGKILL" in message
    assert stand.rig.to("deactivate", "cleanup")
    assert stand.rig.set(inference="thread") == []


def test_ctrl_c_brings_the_arm_to_rest_before_the_program_ends(ros: Sandbox, tmp_path: Path) -> None:
    """rclpy's own handler ends the context at once: the last commands would not be sent.

    Also: it starts by itself where it is told so, under another name and in a namespace, and leaves no process behind.
    """
    save_policy(tmp_path / "policy")
    driver = Driver("left")
    try:
        process = ros.start(
            "hardware.ros2.policy_node", node="mover", namespace="left", checkpoint=tmp_path / "policy", autostart=True
        )
        ros.until(lambda: len(driver.commands) > 100 and _speed(driver)[-5:].min() > 0.02, 90, what="an arm that moves")
        assert {"mover", "mover_io"} <= set(ros.node.get_node_names())
        child = int(
            subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()[0]
        )
        process.send(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        driver.close()
    speed = _speed(driver)
    assert speed[-1] < 0.2 * speed.max()
    assert "shutdown: done" in process.output()
    assert "Traceback" not in process.output()
    assert not Path(f"/proc/{child}").exists()


def _speed(driver: Driver) -> np.ndarray:
    """Of all commands that came, each against the one before [rad/s]."""
    return np.asarray(np.linalg.norm(np.diff([command for _, command in list(driver.commands)], axis=0), axis=1) / PERIOD)
