"""The policy's lifecycle node: what it refuses and says why, what it sends and when it stops; over real ROS."""

import inspect
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rclpy.lifecycle import LifecycleNode
from rig import HOME, JOINTS, PROFILE, Driver, Stand, save_policy
from ros import Sandbox
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool

from hardware.ros2.contract import SIGNAL
from hardware.ros2.parameters import NodeConfig, descriptor
from hardware.ros2.policy_node import NAME, PolicyNode

PERIOD = 1.0 / PROFILE.rate


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
    assert stand.rig.call("start") == (False, "the node is inactive; to go on: activate, start")


def test_a_start_outside_the_limits_is_refused_and_names_the_joint(active: Stand) -> None:
    active.driver.put(joint4=2.95)
    active.ros.spin(0.1)
    message = active.refused()
    assert "joint4: 2.95, limit 2.8" in message
    assert message in active.rig.until(lambda told: "joint4" in told["refused"])["refused"]
    assert "joint4" in active.diagnosis("node").message
    active.ros.spin(0.1)
    assert active.sent() == []


def test_a_start_without_states_says_why_they_are_refused(active: Stand) -> None:
    """An age alone sends people to cables and clocks."""
    active.driver.put(joint2=float("nan"))
    clock, slot = active.rig.node._time, active.rig.node.robot.slots["state"]  # type: ignore[union-attr]
    active.ros.until(lambda: slot.age(clock.now()) > 0.2, what="age")
    ok, message = active.rig.call("start")
    assert not ok
    assert re.fullmatch(r"stale state: \S+, limit 0.15 \(messages are refused: .*position of joint2\)", message)
    active.rig.until(lambda told: told["refused"] == f"start refused: {message}")
    active.driver.put()
    active.start()


def test_a_start_unlike_the_training_data_is_refused_and_names_the_joint(active: Stand) -> None:
    active.driver.put(joint1=-2.5)  # within the limits, and nowhere near a demonstration
    active.ros.spin(0.1)
    assert "start_unfamiliar qpos joint1: -2.5" in active.refused()
    assert active.sent() == []


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
    running.rig.until(lambda told: told["mode"] == "holding" and told["cause"].startswith("stale"))
    running.still()
    entry = running.diagnosis("inputs")
    assert entry.level == b"\x02"
    assert "state is" in entry.message
    assert running.rig.mode("stopped")["cause"].startswith("stale")  # too long for going on by itself
    assert running.diagnosis("control").level == b"\x02"
    running.driver.alive = True
    running.ros.spin(0.5)
    assert running.rig.told[-1]["mode"] == "stopped"  # only a person starts it again
    running.start()


def test_it_starts_by_itself_once_and_only_once(stand: Stand) -> None:
    """Whoever else starts it meanwhile, and whatever stops it then: a person starts it again."""
    stand.driver.alive = False
    stand.ros.spin(0.3)
    stand.rig.arm()
    stand.rig.until(lambda told: told["refused"].startswith("autostart waits: stale"))
    stand.driver.alive = True
    stand.rig.mode("running")
    assert stand.rig.told[-1]["refused"] == ""
    stand.driver.alive = False
    stand.rig.mode("stopped")
    stand.driver.alive = True
    stand.ros.spin(1.2)  # it would do its next step twice
    assert stand.rig.told[-1]["mode"] == "stopped"
    assert stand.rig.to("deactivate", "activate")
    stand.driver.commands.clear()
    stand.ros.spin(1.2)
    assert stand.sent() == []


def test_what_a_configure_waits_for_is_told_once_though_it_changes(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """How many messages were refused, say."""
    monkeypatch.setattr("hardware.ros2.policy_node._PATIENCE", 0.1)
    assert stand.rig.to("cleanup")
    stand.driver.put(joint2=np.nan)
    stand.ros.spin(0.3)
    assert stand.rig.set(ready_timeout=0.6) == []
    capfd.readouterr()
    assert not stand.rig.to("configure")
    said = capfd.readouterr().err
    assert said.count("configure waits for the robot, 0.6 s at most: nothing has come on '/joint_states'; ") == 1
    assert "the robot is not ready after 0.6 s: nothing has come on '/joint_states'; " in said
    stand.driver.put()
    assert stand.rig.set(ready_timeout=5.0) == []


def test_a_stop_while_it_configures_by_itself_is_kept(stand: Stand) -> None:
    assert stand.rig.to("cleanup")
    stand.driver.alive = False
    assert stand.rig.set(ready_timeout=60.0) == []
    stand.rig.arm()
    stand.ros.until(lambda: stand.rig.node.lifecycle == "configuring", what="a configure by itself")
    said = "the node is configuring: nothing moves; autostart is off; to go on: activate, start"
    assert stand.rig.call("stop") == (True, said)
    said = "autostart is off: stop (asked); to go on: activate, start"
    stand.rig.until(lambda told: told["lifecycle"] == "configuring" and told["refused"] == said)  # at once
    stand.driver.alive = True
    stand.rig.until(lambda told: told["lifecycle"] == "inactive" and told["refused"] == said, 60)
    assert said in stand.diagnosis("node").message
    assert stand.rig.set(ready_timeout=5.0) == []
    stand.ros.spin(1.2)
    assert stand.rig.node.lifecycle == "inactive"
    assert stand.rig.to("activate")
    stand.start()
    stand.rig.until(lambda told: told["refused"] == "")


@pytest.mark.parametrize(
    ("there", "refused"), [({"joint1": 2.0}, "start_unfamiliar .* or go home"), ({"joint2": np.nan}, "stale state.* refused: .*")]
)
def test_a_refusal_ends_autostart_so_that_mending_it_moves_nothing(stand: Stand, there: Any, refused: str) -> None:
    stand.driver.put(**there)
    stand.ros.spin(0.3)
    stand.rig.arm()
    told = stand.rig.until(lambda told: told["autostart"] not in ("", "waits"))
    assert re.fullmatch(f"autostart is off: {refused}; to go on: start", told["autostart"])
    assert told["refused"] == told["autostart"]
    stand.driver.put()
    stand.ros.spin(1.2)
    assert stand.sent() == []
    assert stand.rig.told[-1]["lifecycle"] == "active"
    stand.start()


def test_messages_that_are_refused_end_autostart_at_configure_too(stand: Stand) -> None:
    assert stand.rig.to("cleanup")
    stand.driver.put(joint2=np.nan)
    assert stand.rig.set(ready_timeout=0.3) == []
    stand.rig.arm()
    told = stand.rig.until(lambda told: told["autostart"] not in ("", "waits"))
    assert "autostart is off: configure refused: " in told["autostart"]
    assert "messages were refused, the last for its" in told["autostart"]
    stand.driver.put()
    assert stand.rig.set(ready_timeout=5.0) == []
    stand.ros.spin(1.2)
    assert stand.rig.node.lifecycle == "unconfigured"


def test_an_error_ends_autostart(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand.rig.node, "_activate", lambda: 1 // 0)
    stand.rig.arm()
    stand.rig.until(lambda told: "autostart is off: activate failed: ZeroDivisionError" in told["refused"])
    monkeypatch.undo()
    stand.ros.spin(1.2)
    assert stand.rig.node.lifecycle == "unconfigured"


def test_a_transition_that_is_asked_for_ends_autostart_though_it_is_refused(stand: Stand) -> None:
    stand.rig.arm(at_once=False)
    assert not stand.rig.to("deactivate")  # it is inactive
    assert not stand.rig.node.requests.armed


def test_autostart_counts_when_the_node_starts_and_is_not_set_later(stand: Stand) -> None:
    assert stand.rig.to("cleanup")
    said = stand.rig.set(autostart=True)
    assert said == ["autostart counts when the node starts, and is not set later; configure, activate, start"]
    assert stand.rig.set(autostart=False) == []  # as it is: of a file of parameters
    assert not stand.rig.node.requests.armed


def test_a_stop_waits_for_no_start_that_waits_for_its_plan(active: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active.rig.node.deployment._policy, "ready", lambda now: False)
    assert active.rig.call("start") == (True, "policy begins")
    begin = time.monotonic()
    assert active.rig.enable(False)[0]
    assert time.monotonic() - begin < 0.5
    active.rig.mode("stopped")


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
    running.start()
    running.ros.until(lambda: len(running.sent()) > 3)
    assert abs(running.sent()[0][0] - 0.4) < 0.005


# ---- deadman, shadow, swap -----------------------------------------------------------------------------------------------------


def test_the_deadman_lets_it_move_and_stops_it(stand: Stand) -> None:
    assert stand.rig.set(deadman=True) == []
    assert stand.rig.to("activate")
    assert "deadman" in stand.refused()
    hand = stand.ros.node.create_publisher(Bool, "deadman", SIGNAL.to_ros())
    timer = stand.ros.node.create_timer(0.03, lambda: hand.publish(Bool(data=True)))
    stand.ros.until(lambda: _pressed(stand), what="the deadman to be seen")
    stand.start()
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
    assert "shadow mode: nothing is sent" in stand.start()
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
    running.start()
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
    stand.start()
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
    assert stand.diagnosis("inference").message == "nothing planned yet"
    planner: Any = stand.rig.node.deployment._planner  # type: ignore[union-attr]
    os.kill(planner.pid, signal.SIGKILL)
    told = stand.rig.until(lambda told: "inference process" in told["refused"])
    assert stand.rig.call("stop")[0]
    entry = stand.diagnosis("inference")
    assert entry.level == b"\x02"
    assert "killed by SIGKILL" in entry.message
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
