"""The policy's node over real ROS: emergency stops and their buttons, second masters, permits, and sensors that are stuck."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rig import PROFILE, Stand
from ros import Sandbox
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray

from hardware.ros2.contract import COMMAND, LATCHED, SIGNAL
from hardware.ros2.policy_node import NAME


class Buttons:
    """Nodes with a button for the emergency stop each."""

    def __init__(self, ros: Sandbox) -> None:
        self._ros, self._nodes, self._beats = ros, dict[str, Any](), list[Any]()

    def open(self, name: str) -> Any:
        """Its publisher, once it is heard."""
        self._nodes[name] = node = rclpy.create_node(name, context=self._ros.node.context)
        publisher = node.create_publisher(Bool, "estop", LATCHED.to_ros())
        self._ros.until(lambda: publisher.get_subscription_count() >= 1, what="discovery")
        return publisher

    def beat(self, name: str) -> None:
        """Another that says all the time that it is not pressed, while the test's own node is spun."""
        publisher = self.open(name)
        self._beats.append(self._ros.node.create_timer(0.05, lambda: publisher.publish(Bool(data=False))))

    def close(self, name: str) -> None:
        self._nodes.pop(name).destroy_node()

    def close_all(self) -> None:
        for timer in self._beats:  # before what they publish with: the next test spins the same node
            self._ros.node.destroy_timer(timer)
        for name in list(self._nodes):
            self.close(name)


@pytest.fixture
def buttons(active: Stand) -> Iterator[Buttons]:
    opened = Buttons(active.ros)
    yield opened
    opened.close_all()


# ---- emergency stop ------------------------------------------------------------------------------------------------------------


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
    running.start()


def test_an_emergency_stop_outlives_deactivate_cleanup_and_configure(running: Stand) -> None:
    rig = running.rig
    assert rig.call("estop")[0]
    assert rig.to("deactivate", "cleanup", "configure", "activate")
    assert rig.mode("estopped")
    assert rig.call("start")[0] is False
    assert rig.call("reset")[0]
    running.start()


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


def test_a_button_that_is_gone_while_pressed_is_released_by_its_own_node_only(active: Stand, buttons: Buttons) -> None:
    """Another panel says all the time that it is not pressed."""
    buttons.beat("panel")
    buttons.open("pendant").publish(Bool(data=True))
    active.rig.mode("estopped")
    assert "/pendant still says pressed" in active.rig.call("reset")[1]
    buttons.close("pendant")
    active.ros.until(lambda: "/pendant said pressed on '/estop' and is gone" in active.rig.call("reset")[1], what="its end")
    active.ros.spin(0.3)
    assert not active.rig.call("reset")[0]
    buttons.open("pendant").publish(Bool(data=False))
    active.ros.until(lambda: active.rig.call("reset")[0], what="a release")


def test_a_button_that_never_comes_back_is_forgotten_by_a_cleanup_and_the_stop_stays(active: Stand, buttons: Buttons) -> None:
    buttons.open("pendant").publish(Bool(data=True))
    active.rig.mode("estopped")
    buttons.close("pendant")
    active.ros.until(lambda: "deactivate, cleanup and configure the node" in active.rig.call("reset")[1], what="its end")
    assert active.rig.to("deactivate", "cleanup", "configure", "activate")
    assert active.rig.mode("estopped")
    assert active.rig.call("start") == (False, "estopped (topic estop): reset first, then start")
    assert active.rig.call("reset")[0]
    active.start()


def test_a_reset_alone_moves_nothing_though_the_node_starts_by_itself(stand: Stand) -> None:
    stand.rig.arm(at_once=False)
    assert "autostart is off; to go on: activate, start" in stand.rig.call("estop")[1]
    assert stand.rig.to("activate")
    assert stand.rig.call("reset")[0]
    stand.rig.node._next_step = 0.0
    stand.ros.spin(1.2)  # it would do its next step twice
    assert stand.sent() == []
    stand.start()
    stand.rig.mode("running")


def test_an_emergency_stop_while_inactive_counts(stand: Stand) -> None:
    assert stand.rig.call("estop")[0]
    assert stand.rig.to("activate")
    assert stand.rig.call("start") == (False, "estopped (asked): reset first, then start")


# ---- second masters ------------------------------------------------------------------------------------------------------------


def test_a_second_master_on_the_command_topic_is_refused(active: Stand) -> None:
    other = active.ros.node.create_publisher(Float64MultiArray, PROFILE.command.topic, COMMAND.to_ros())
    active.ros.until(lambda: active.rig.node.robot.rivals(), what="discovery of the other")  # type: ignore[union-attr]
    ok, message = active.rig.call("start")
    assert active.diagnosis("node").message.startswith("active: 2 nodes publish on")  # also of one that comes later
    active.ros.node.destroy_publisher(other)
    assert not ok
    assert "2 nodes publish on '/forward_position_controller/commands'" in message
    active.ros.until(lambda: not active.rig.node.robot.rivals(), what="its end")  # type: ignore[union-attr]
    active.start()


def test_a_second_master_that_comes_while_the_arm_moves_stops_it(running: Stand) -> None:
    other = running.ros.node.create_publisher(Float64MultiArray, PROFILE.command.topic, COMMAND.to_ros())
    cause = running.rig.mode("stopped")["cause"]
    assert cause.startswith("2 nodes publish on '/forward_position_controller/commands': ")
    assert f"{NAME}_io" in cause
    assert running.ros.node.get_name() in cause
    assert running.rig.until(lambda told: told["muted"] == cause)["mode"] == "stopped"
    running.ros.until(running.silent, what="the last command")
    assert np.ptp(running.sent()[-2:], axis=0).max() < 1e-3, "down to where it rests"
    running.ros.node.destroy_publisher(other)
    running.ros.until(lambda: not running.rig.node.robot.rivals(), what="its end")  # type: ignore[union-attr]
    running.ros.spin(0.5)
    assert running.silent()
    assert running.rig.told[-1]["mode"] == "stopped"  # a person starts it again


def test_a_node_that_stands_is_silent_when_a_second_master_comes_and_starts_where_the_arm_is(running: Stand) -> None:
    """Else the arm jumps between the one that moves it and what is held here."""
    assert running.rig.call("stop")[0]
    running.still()
    other = running.ros.node.create_publisher(Float64MultiArray, PROFILE.command.topic, COMMAND.to_ros())
    told = running.rig.until(lambda told: bool(told["muted"]))
    assert told["mode"] == "stopped"
    assert told["cause"] == told["muted"]
    assert running.rig.call("estop")[0]
    assert running.rig.mode("estopped")["muted"] == told["muted"]
    running.ros.until(running.silent, what="the last command")
    entry = running.diagnosis("control")
    assert entry.level == b"\x02"
    assert "estop asked; nothing is sent until the next ~/start" in entry.message
    assert running.rig.call("reset")[0]
    assert "2 nodes publish on" in running.rig.call("start")[1]
    running.driver.put(joint1=0.1)  # by the other
    running.ros.node.destroy_publisher(other)
    running.ros.until(lambda: not running.rig.node.robot.rivals(), what="its end")  # type: ignore[union-attr]
    running.ros.spin(0.1)
    assert running.silent()
    count = len(running.sent())
    running.start()
    running.ros.until(lambda: len(running.sent()) > count, what="a command")
    assert abs(running.sent()[count][0] - 0.1) < 0.005
    assert running.rig.mode("running")["muted"] == ""


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


# ---- permits -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def permitted(stand: Stand) -> Iterator[tuple[Stand, Any]]:
    """By a profile that needs the driver's program to run; and who says whether it does. It has said nothing yet."""
    profile = stand.folder / "permitted.yaml"
    profile.write_text("base: virtual\npermits: {program: {topic: driver/runs, mend: press play}}\n")
    assert stand.rig.to("cleanup")
    assert stand.rig.set(profile=str(profile)) == []
    permit = stand.ros.node.create_publisher(Bool, "driver/runs", LATCHED.to_ros())
    yield stand, permit
    stand.ros.node.destroy_publisher(permit)
    for lifecycle, transition in (("active", "deactivate"), ("inactive", "cleanup")):
        assert stand.rig.node.lifecycle != lifecycle or stand.rig.to(transition)
    assert stand.rig.set(profile="virtual", ready_timeout=5.0) == []


def test_an_arm_that_takes_no_commands_is_stopped_and_begins_again_where_it_is(permitted: tuple[Stand, Any]) -> None:
    """Its program ends, somebody moves it, its program runs again: what was held must not be carried out."""
    stand, permit = permitted
    permit.publish(Bool(data=False))
    says = "permit 'program': '/driver/runs' says false; press play"
    assert stand.rig.to("configure", "activate")
    for name in ("start", "home"):
        assert stand.rig.call(name) == (False, says)
    assert stand.sent() == []
    permit.publish(Bool(data=True))
    stand.ros.until(lambda: not stand.rig.node.robot.denied(), what="the permit")  # type: ignore[union-attr]
    stand.start()
    stand.rig.mode("running")
    permit.publish(Bool(data=False))
    assert stand.rig.mode("stopped")["cause"] == says
    stand.ros.until(stand.silent, what="the last command")
    stand.driver.put(joint1=0.15)  # less than `tracking` from what was held
    count = len(stand.sent())
    permit.publish(Bool(data=True))
    stand.ros.until(lambda: not stand.rig.node.robot.denied(), what="the permit")  # type: ignore[union-attr]
    assert stand.silent()  # a person starts it again
    assert stand.rig.told[-1]["mode"] == "stopped"
    assert len(stand.sent()) == count
    stand.start()
    stand.ros.until(lambda: len(stand.sent()) > count, what="a command")
    np.testing.assert_allclose(stand.sent()[count][0], 0.15, atol=0.005)


def test_an_arm_that_is_held_is_let_go_when_its_permit_ends(permitted: tuple[Stand, Any]) -> None:
    """Nothing moves it, and yet it would jump to what is held."""
    stand, permit = permitted
    permit.publish(Bool(data=True))
    assert stand.rig.to("configure", "activate")
    stand.start()
    assert stand.rig.call("stop")[0]
    stand.still()
    stand.ros.node.destroy_publisher(permit)
    stand.rig.until(lambda told: told["cause"].startswith("permit 'program': nobody publishes '/driver/runs'; "))
    stand.ros.until(stand.silent, what="the last command")


def test_autostart_waits_for_the_first_word_of_a_permit(
    permitted: tuple[Stand, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its driver may come after the one of the joints. Who waits is told for what, once."""
    monkeypatch.setattr("hardware.ros2.policy_node._PATIENCE", 0.1)
    stand, permit = permitted
    assert stand.rig.set(ready_timeout=0.3) == []
    assert not stand.rig.to("configure")  # nobody's may go on without it
    waits = "configure waits for the robot, 0.3 s at most: permit 'program': nothing has come on '/driver/runs'; press play"
    assert waits in capfd.readouterr().err
    assert "permit 'program': nothing has come on '/driver/runs'; press play" in stand.rig.node.refused
    stand.rig.arm()
    stand.rig.until(lambda told: "nothing has come on '/driver/runs'" in told["refused"] and told["autostart"] == "waits")
    assert "waits for the robot" not in capfd.readouterr().err
    permit.publish(Bool(data=True))
    stand.rig.mode("running")


def test_who_presses_play_does_not_start_the_arm(permitted: tuple[Stand, Any]) -> None:
    stand, permit = permitted
    permit.publish(Bool(data=False))
    stand.rig.arm()
    told = stand.rig.until(lambda told: told["autostart"] not in ("", "waits"))
    assert told["autostart"].startswith("autostart is off: permit 'program': '/driver/runs' says false; press play; ")
    permit.publish(Bool(data=True))
    stand.ros.until(lambda: not stand.rig.node.robot.denied(), what="the permit")  # type: ignore[union-attr]
    stand.ros.spin(1.2)  # it would do its next step twice
    assert stand.sent() == []
    stand.start()


# ---- stuck sensors -------------------------------------------------------------------------------------------------------------


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
    watched.start()
    watched.rig.mode("running")
    watched.driver.noise = 0.0
    watched.rig.until(lambda told: told["mode"] == "holding" and told["cause"].startswith("stuck cube: "))
    assert watched.rig.mode("stopped")["cause"].startswith("stuck cube: ")
    watched.still()
    message = watched.refused()
    assert message.startswith("stuck cube: ")
    assert "restart that sensor" in message
