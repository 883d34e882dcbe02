"""RosRobot against a driver in the same process, over real DDS; and a policy evaluated on it and on the simulated arm."""

import re
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ros import Sandbox

from hardware.ros2 import messages
from hardware.ros2.contract import LATCHED, SENSOR, SIGNAL, STATE_OUT, Quality, message_type, robot_topics
from hardware.ros2.own import OwnRosRobot
from hardware.ros2.permits import Word
from hardware.ros2.profile import Permit, RosProfile, load_profile
from hardware.ros2.robot import RosRobot
from hardware.ros2.runtime import Ros, RosClock, RosError
from hardware.ros2.topics import UNKNOWN
from robopolicy.deploy.clock import FakeClock
from sim.arm.robot import SimArm

PROFILE = load_profile("virtual")
ORDER = [8, 3, 1, 2, 0, 6, 5, 4, 7]  # a driver's own
CUBE = np.array([0.5, 0.1, 0.02, 0.0, 0.0, 0.6, 0.8])


class Driver:
    """The least that a driver does: joint states and a pose at 100 Hz, commands kept, resets counted."""

    def __init__(self, ros: Ros, profile: RosProfile = PROFILE, reset: bool = True) -> None:
        assert profile.home_positions is not None
        self.clock, self.profile = RosClock(), profile
        self.joints = np.append(profile.home_positions[:7], [0.03, 0.04])
        self.speeds = np.arange(9.0)
        self.names = list(profile.joint_names)
        self.silent, self.refuses = False, ""
        self.commands: list[np.ndarray] = []
        self.widths: list[float] = []
        self.seeds: list[int] = []
        self.node = ros.node("driver")
        for topic in robot_topics(profile, ["cube"]):
            kind = message_type(topic.type)
            if topic.key == "command":
                self.node.create_subscription(kind, topic.name, lambda m: self.commands.append(np.array(m.data)), 10)
            elif topic.key == "gripper":
                self.node.create_subscription(kind, topic.name, lambda m: self.widths.append(m.data), 10)
        state, pose, flag = "sensor_msgs/msg/JointState", "geometry_msgs/msg/PoseStamped", "std_msgs/msg/Bool"
        self.state = self.node.create_publisher(message_type(state), profile.state.topic, STATE_OUT.to_ros())
        self.pose = self.node.create_publisher(message_type(pose), "objects/cube/pose", SENSOR.to_ros())
        self.success = self.node.create_publisher(message_type(flag), "virtual_arm/success", LATCHED.to_ros())
        self.node.create_timer(0.01, self.publish)
        if reset:
            arm = ros.node("virtual_arm")
            arm.declare_parameter("seed", 0)
            arm.create_service(message_type("std_srvs/srv/Trigger"), "virtual_arm/reset", self.reset)
            self.arm = arm

    def publish(self) -> None:
        if self.silent:
            return
        stamp = self.clock.stamp()
        names = [self.names[i] for i in ORDER]
        self.state.publish(messages.joint_state(names, self.joints[ORDER], self.speeds[ORDER], stamp))
        self.pose.publish(messages.pose(CUBE[:3], CUBE[3:], stamp, "world"))

    def tell(self, success: bool) -> None:
        self.success.publish(message_type("std_msgs/msg/Bool")(data=success))

    def reset(self, request: Any, response: Any) -> Any:
        self.seeds.append(self.arm.get_parameter("seed").value)
        response.success, response.message = not self.refuses, self.refuses
        if response.success:
            self.joints[0] = 0.1
            self.tell(False)
        return response


@pytest.fixture
def both(ros: Sandbox) -> Iterator[tuple[Driver, RosRobot]]:
    with Ros(signals=False) as own:
        driver = Driver(own)
        robot = RosRobot(PROFILE, own.node("robot"), RosClock())
        own.spin_in_thread()
        robot.ready()
        yield driver, robot
        robot.close()


def until(condition: Any, what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def test_it_sees_what_the_simulated_arm_sees(both: tuple[Driver, RosRobot]) -> None:
    """Same features, same values, whoever carries the messages; joints by name, two fingers as one width."""
    driver, robot = both
    state = robot.state()
    np.testing.assert_allclose(state.positions, [*driver.joints[:7], 0.07])
    assert state.stamp.made is not None
    assert 0 <= robot.clock.now() - state.stamp.made < 5.0
    sample = robot.observe()
    assert sample.stamps.keys() == {"cube"}  # the cameras of the profile are not subscribed to: nothing reads them
    assert sample.time <= min(state.stamp.made + 1.0, robot.clock.now())
    arm = SimArm("lift", FakeClock())
    assert robot.observation_features == arm.observation_features
    assert robot.action_feature == arm.action_feature
    np.testing.assert_allclose(sample.values["cube_pos"], CUBE[:3], atol=1e-6)
    np.testing.assert_allclose(sample.values["gripper_width"], [0.07], atol=1e-6)
    np.testing.assert_allclose(sample.values["qvel"], np.arange(7.0))
    arm.close()


def test_commands_reach_the_controller_in_its_order_and_the_gripper_on_its_own(both: tuple[Driver, RosRobot]) -> None:
    driver, robot = both
    target = np.arange(8.0) / 100
    for width in (0.05, 0.05, 0.0501, 0.02):
        target[7] = width
        robot.command(target)
        time.sleep(0.02)
    until(lambda: len(driver.commands) == 4 and len(driver.widths) == 2, f"{len(driver.commands)} commands, {driver.widths}")
    np.testing.assert_allclose(driver.commands[-1], target[:7])
    assert driver.widths == [0.05, 0.02]
    assert robot.problems() == robot.rivals() == []
    other = driver.node.create_publisher(message_type("std_msgs/msg/Float64MultiArray"), PROFILE.command.topic, 1)
    until(lambda: robot.rivals(), "a second master on the command topic was not noticed")
    assert "2 nodes publish on '/forward_position_controller/commands': " in robot.rivals()[0]
    assert "/driver" in robot.rivals()[0]
    assert "/robot" in robot.rivals()[0]
    unknown = SimpleNamespace(node_name="_NODE_NAME_UNKNOWN_", node_namespace="_NODE_NAMESPACE_UNKNOWN_")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robot.node, "get_publishers_info_by_topic", lambda path: [unknown])
        assert "commands': a node that is not known by name yet; two masters" in robot.rivals()[0]
    driver.node.destroy_publisher(other)


def test_what_cannot_be_trusted_makes_the_state_old_and_it_comes_back(both: tuple[Driver, RosRobot]) -> None:
    driver, robot = both
    slot, limit = robot.slots["state"], robot.limits.freshness.state

    def old() -> bool:
        return slot.age(robot.clock.now()) > limit

    until(lambda: not old(), "fresh at first")
    for spoil, mend, kind in [
        (lambda: driver.names.__setitem__(2, "elbow"), lambda: driver.names.__setitem__(2, "joint3"), "names"),
        (lambda: driver.joints.__setitem__(2, np.nan), lambda: driver.joints.__setitem__(2, 0.0), "not_finite"),
        (lambda: setattr(driver, "silent", True), lambda: setattr(driver, "silent", False), None),
    ]:
        spoil()
        until(old, f"{kind}: what came was taken for good")
        assert kind is None or slot.rejected[kind] > 0
        assert np.isfinite(robot.state().positions).all()
        mend()
        until(lambda: not old(), f"{kind}: it did not recover")


def test_an_episode_begins_by_the_simulators_service(both: tuple[Driver, RosRobot]) -> None:
    driver, robot = both
    driver.tell(True)
    until(lambda: robot.success, "success was not heard")
    robot.reset(200_123)
    assert driver.seeds == [200_123]
    assert robot.success is False
    assert robot.state().positions[0] == 0.1  # measured after the reset, not before
    driver.refuses = "no episode 200123"
    with pytest.raises(RosError, match="refused: no episode 200123"):
        robot.reset(1)
    driver.arm.destroy_node()


def test_no_episode_begins_while_the_goal_is_said_to_be_met(ros: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a reset service somebody puts the objects back: a detector that still sees the last goal is waited for."""
    monkeypatch.setattr("hardware.ros2.robot.ANSWER", 0.5)
    real = PROFILE.model_copy(update={"reset": None})
    with Ros(signals=False) as own:
        driver = Driver(own, real, reset=False)
        robot = RosRobot(real, own.node("robot"), RosClock())
        own.spin_in_thread()
        robot.ready()
        robot.reset()  # nobody has said anything
        driver.tell(True)
        until(lambda: robot.success, "success was not heard")
        with pytest.raises(RosError, match=r"still says after 0.5 s that the goal is met.* put the objects back"):
            robot.reset()
        threading.Timer(0.2, driver.tell, [False]).start()
        robot.reset()
        assert robot.success is False
        robot.close()


def test_who_stops_the_arm_is_heard_as_by_the_policy_node(ros: Sandbox) -> None:
    """Buttons of any quality, the deadman, and a second master."""
    flag, heard = message_type("std_msgs/msg/Bool"), list[tuple[str, dict[str, Any]]]()

    def quiet() -> bool:  # what was sent before has come
        heard.clear()
        time.sleep(0.2)
        return not heard

    with Ros(signals=False) as other:
        driver = Driver(other)
        other.spin_in_thread()
        robot = OwnRosRobot(PROFILE)
        robot.hear(lambda name, **arguments: heard.append((name, arguments)))
        try:
            for quality in (SIGNAL, LATCHED, SENSOR):
                until(quiet, "the button before is still heard")
                button = driver.node.create_publisher(flag, "estop", quality.to_ros())
                until(lambda button=button: button.publish(flag(data=True)) or heard, f"{quality} was not heard")
                assert heard[0] == ("estop", {"why": "topic estop"})
                driver.node.destroy_publisher(button)
            deadman = driver.node.create_publisher(flag, "deadman", SENSOR.to_ros())
            for pressed in (True, False):
                said = ("deadman", {"pressed": pressed})
                until(lambda said=said: deadman.publish(flag(data=said[1]["pressed"])) or said in heard, "no deadman was heard")
            assert not [name for name, _ in heard if name in ("stop", "mute")]
            message = message_type(next(topic.type for topic in robot.topics if topic.key == "command"))
            second = driver.node.create_publisher(message, PROFILE.command.topic, 1)
            until(lambda: [name for name, _ in heard if name == "mute"], "a second master was not noticed")
            assert heard[-1][1]["why"].startswith("rival: 2 nodes publish on '/forward_position_controller/commands': ")
            driver.node.destroy_publisher(second)
        finally:
            robot.close()


# ---- permits -----------------------------------------------------------------------------------------------------------------

PERMITTED = PROFILE.model_copy(update={"permits": {"program": Permit(topic="driver/runs", mend="press play")}})


YES, NO = (SimpleNamespace(data=value) for value in (True, False))


def publisher(gid: bytes, name: str, type_: str = "std_msgs/msg/Bool", quality: Quality = LATCHED) -> Any:
    """As discovery has it."""
    quality_ = quality.to_ros()
    return SimpleNamespace(endpoint_gid=gid, node_name=name, node_namespace="/", topic_type=type_, qos_profile=quality_)


def test_a_permit_is_what_every_publisher_that_is_there_says_last() -> None:
    """And no flicker of it is overlooked by who looks ten times a second."""
    clock, there = FakeClock(5.0), [b"a"]
    node = SimpleNamespace(get_publishers_info_by_topic=lambda path: [publisher(gid, gid.decode()) for gid in there])

    def word(**changes: Any) -> Word:
        return Word("program", Permit(topic="runs", mend="press play", **changes), node, clock)  # type: ignore[arg-type]

    latched = word()
    assert latched.missing("/runs") == "permit 'program': nothing has come on '/runs'; press play"
    latched.take(NO, b"a")
    assert latched.missing("/runs") == "permit 'program': '/runs' says false; press play"
    latched.take(YES, b"a")
    assert latched.missing("/runs").startswith("permit 'program': '/runs' has just said false; it says true again")
    clock.sleep_until(7.0)
    assert latched.missing("/runs") == ""
    clock.sleep_until(100.0)
    assert latched.missing("/runs") == "", "it is said on change"
    there.append(b"b")
    assert latched.missing("/runs") == "", "who has said nothing forbids nothing"
    latched.take(NO, b"b")
    clock.sleep_until(102.0)
    assert "says false" in latched.missing("/runs"), "one is enough"
    there[:] = [b"a"]
    assert latched.missing("/runs") == ""
    there[:] = [b"new"]
    assert "nothing has come" in latched.missing("/runs"), "a driver that begins anew has not said it"
    there.clear()
    assert latched.missing("/runs").startswith("permit 'program': nobody publishes '/runs'; start the driver; `permits: null`")
    there[:] = [b"a"]
    beats = word(latched=False)
    beats.take(YES)  # a middleware that does not tell whose it is
    assert beats.missing("/runs") == ""
    clock.sleep_until(103.1)
    assert beats.missing("/runs").startswith("permit 'program': '/runs' has been silent for more than 1 s")


def test_a_killed_driver_permits_nothing_beside_its_successor() -> None:
    """Discovery knows of it for some 20 s more."""
    clock, there = FakeClock(5.0), [publisher(b"old", "driver"), publisher(b"b", "other")]
    node = SimpleNamespace(get_publishers_info_by_topic=lambda path: there)
    word = Word("program", Permit(topic="runs", mend="press play"), node, clock)  # type: ignore[arg-type]

    def says(gid: bytes, message: Any) -> str:
        word.take(message, gid)
        clock.sleep_until(clock.now() + 2.0)
        return word.missing("/runs")

    assert word.missing("/runs")
    assert says(b"old", YES) == ""
    there.insert(0, publisher(b"new", "driver"))
    clock.sleep_until(clock.now() + 0.1)
    assert word.missing("/runs") == "permit 'program': nothing has come on '/runs'; press play"
    assert says(b"new", YES) == ""
    assert "says false" in says(b"old", NO), "it lives: two of one name"
    assert says(b"old", YES) == ""
    assert "says false" in says(b"new", NO)
    there.pop(0)
    assert word.missing("/runs") == ""

    there += [publisher(b"c", "driver"), publisher(b"d", "driver")]  # between two looks
    assert "nothing has come" in says(b"c", YES)
    assert says(b"d", YES) == ""

    there[:] = [publisher(b"ghost", "driver"), publisher(b"e", "driver")]  # one from before we came says nothing to us
    word = Word("program", Permit(topic="runs", mend="press play"), node, clock)  # type: ignore[arg-type]
    assert "nothing has come" in word.missing("/runs")
    assert says(b"e", YES) == ""

    there.append(publisher(b"f", UNKNOWN))  # whose name is not known yet may be a successor
    assert "nothing has come" in word.missing("/runs")
    there[-1] = publisher(b"f", "other")
    assert word.missing("/runs") == ""
    there[:] = [publisher(b"f", UNKNOWN), publisher(b"g", UNKNOWN)]  # and is the successor of none that lives
    assert "nothing has come" in says(b"f", YES)
    assert says(b"g", YES) == ""
    assert "says false" in says(b"f", NO)


@pytest.mark.parametrize(
    ("type_", "quality", "latched", "mend"),
    [
        ("std_msgs/msg/String", LATCHED, True, "it carries std_msgs/msg/String, expected std_msgs/msg/Bool; change the permit's"),
        ("std_msgs/msg/Bool", SIGNAL, True, "its publisher is volatile and the permit latched: .* `latched: false`"),
        ("std_msgs/msg/Bool", LATCHED._replace(reliable=False), True, "its publisher is best effort and the permit latched"),
        ("std_msgs/msg/Bool", SENSOR, False, "press play"),
        ("std_msgs/msg/Bool", LATCHED, True, "press play"),
    ],
)
def test_a_permit_that_cannot_come_is_not_blamed_on_the_pendant(type_: str, quality: Quality, latched: bool, mend: str) -> None:
    node = SimpleNamespace(get_publishers_info_by_topic=lambda path: [publisher(b"a", "driver", type_, quality)])
    permit = Permit(topic="runs", mend="press play", latched=latched)
    word = Word("program", permit, node, FakeClock(5.0))  # type: ignore[arg-type]
    assert re.match(f"permit 'program': nothing has come on '/runs'; {mend}", word.missing("/runs"))


def test_why_nothing_new_comes_is_told_of_inputs_of_any_name() -> None:
    slots = {name: SimpleNamespace(refusing=lambda now: "of its size") for name in ("wrist-cam", "a.b", "state")}
    robot: Any = SimpleNamespace(slots=slots, clock=FakeClock(5.0))
    for name in slots:
        said = f"stale {name}: 0.4, limit 0.3"
        assert RosRobot.explained(robot, f"x; {said}; y") == f"x; {said} (messages are refused: of its size); y"


def test_without_its_permit_a_robot_is_not_ready_and_begins_nothing(ros: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardware.ros2.permits._SECOND", 0.1)
    flag = message_type("std_msgs/msg/Bool")
    with Ros(signals=False) as own:
        driver = Driver(own, PERMITTED)
        robot = RosRobot(PERMITTED, own.node("robot"), RosClock())
        own.spin_in_thread()
        until(lambda: not robot.problems(), "all but the permit")
        assert robot.denied()[0].startswith("permit 'program': nobody publishes '/driver/runs'; ")
        permit = driver.node.create_publisher(flag, "driver/runs", LATCHED.to_ros())
        permit.publish(flag(data=False))
        until(lambda: robot.denied() == ["permit 'program': '/driver/runs' says false; press play"], "its false")
        with pytest.raises(RosError, match=r"not ready after 0\.1 s: permit 'program': '/driver/runs' says false; press play"):
            robot.ready(timeout=0.1)
        with pytest.raises(RosError, match="says false"):
            robot.reset(1)
        assert driver.seeds == []
        permit.publish(flag(data=True))
        robot.ready()
        late = RosRobot(PERMITTED, robot.node, RosClock())  # a latched word comes to who asks later
        late.ready()
        driver.node.destroy_publisher(permit)
        until(lambda: any("nobody publishes" in line for line in robot.denied()), "its end")
        shadow = RosRobot(PERMITTED, robot.node, RosClock(), enabled=False)
        assert shadow.denied() == []  # nothing is sent
        for each in (robot, late, shadow):
            each.close()
        driver.arm.destroy_node()


def test_a_permit_that_is_withdrawn_is_heard(ros: Sandbox) -> None:
    """As by the policy node; until somebody gives it back no episode begins."""
    flag, heard = message_type("std_msgs/msg/Bool"), list[tuple[str, dict[str, Any]]]()
    with Ros(signals=False) as other:
        driver = Driver(other, PERMITTED)
        permit = driver.node.create_publisher(flag, "driver/runs", LATCHED.to_ros())
        permit.publish(flag(data=True))
        other.spin_in_thread()
        robot = OwnRosRobot(PERMITTED)
        try:
            robot.hear(lambda name, **arguments: heard.append((name, arguments)))
            assert robot.hindrances() == []
            assert heard == []
            permit.publish(flag(data=False))
            permit.publish(flag(data=True))  # a flicker
            until(lambda: heard, "it was not noticed")
            assert heard[0][0] == "mute"
            assert heard[0][1]["why"].startswith("permit 'program': '/driver/runs' ")
            assert robot.hindrances()
            assert robot.rivals() == []
        finally:
            robot.close()


def test_the_last_velocity_is_confirmed_before_its_publisher_goes(ros: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost, it would leave the arm moving: such controllers never time out, and nobody is left to say zero again."""
    from rclpy.publisher import Publisher

    from hardware.ros2.outputs import Outputs

    monkeypatch.setattr(Outputs, "watch", lambda self: None)  # it would say zero by itself, too
    steps: list[str] = []
    confirm, destroy = Publisher.wait_for_all_acked, Publisher.destroy
    velocity = PROFILE.command.model_copy(update={"type": "velocity", "unsafe_velocity": True})
    profile = PROFILE.model_copy(update={"command": velocity})
    with Ros(signals=False) as own:
        driver = Driver(own, profile)
        robot = RosRobot(profile, own.node("robot"), RosClock())
        own.spin_in_thread()
        robot.ready()
        command = robot._publishers["command"]

        def noted(name: str, method: Any) -> Any:
            return lambda self, *args: (self is command and steps.append(name), method(self, *args))[1]

        monkeypatch.setattr(Publisher, "wait_for_all_acked", noted("confirmed", confirm))
        monkeypatch.setattr(Publisher, "destroy", noted("gone", destroy))
        robot.command(np.zeros(8))
        robot.command(np.full(8, 0.001))
        until(lambda: len(driver.commands) == 2 and driver.commands[1].max() > 0.01, f"{driver.commands}")
        robot.close()
        robot.close()  # nothing is left to be undone
        assert steps == ["confirmed", "gone"]
        until(lambda: len(driver.commands) == 3, f"{driver.commands}")
        np.testing.assert_array_equal(driver.commands[-1], np.zeros(7))


@pytest.mark.parametrize("fails", [False, True])
def test_a_zero_that_is_not_confirmed_is_told_and_all_is_taken_back(
    ros: Sandbox, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fails: bool
) -> None:
    """Its publisher must go: it would be a second master to whoever connects next."""
    from rclpy.publisher import Publisher

    def confirm(publisher: Any, timeout: Any) -> bool:
        if fails:
            raise RuntimeError("no answer")
        return False

    monkeypatch.setattr(Publisher, "wait_for_all_acked", confirm)
    velocity = PROFILE.command.model_copy(update={"type": "velocity", "unsafe_velocity": True})
    node = ros.node
    robot = RosRobot(PROFILE.model_copy(update={"command": velocity}), node, RosClock())
    assert node.count_publishers("forward_position_controller/commands") == 1
    if fails:
        with pytest.raises(RuntimeError, match="no answer"):
            robot.close()
    else:
        robot.close()
        assert "has not confirmed the zero velocity: does the arm stand?" in capfd.readouterr().err
    ros.until(lambda: node.count_publishers("forward_position_controller/commands") == 0, what="its end")


def test_no_episode_begins_while_somebody_else_commands(both: tuple[Driver, RosRobot]) -> None:
    """A policy node that is up, too."""
    driver, robot = both
    message = message_type(next(topic.type for topic in robot.topics if topic.key == "command"))
    other = robot.node.create_publisher(message, PROFILE.command.topic, 1)
    until(robot.rivals, "it was not discovered")
    with pytest.raises(RosError, match="2 nodes publish on"):
        robot.reset(1)
    assert driver.seeds == []
    robot.node.destroy_publisher(other)
    driver.arm.destroy_node()


def test_a_second_master_of_the_joint_states_is_told_from_somebody_with_other_joints(
    both: tuple[Driver, RosRobot], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, robot = both
    kind = message_type("sensor_msgs/msg/JointState")
    publisher = robot.node.create_publisher(kind, PROFILE.state.topic, STATE_OUT.to_ros())
    until(lambda: len(robot.node.get_publishers_info_by_topic(f"/{PROFILE.state.topic}")) == 2, "it was not discovered")

    def publish(names: list[str], seconds: float = 0.4) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            publisher.publish(messages.joint_state(names, np.zeros(len(names)), np.zeros(len(names)), driver.clock.stamp()))
            time.sleep(0.013)

    publish(["another_gripper"])
    assert robot.rivals() == robot.doubts() == []
    publish(list(PROFILE.joint_names))
    assert len(rivals := robot.rivals()) == 1
    assert rivals[0].startswith("2 nodes say on '/joint_states' where our joints are: ")
    assert {"/driver", "/robot"} <= set(rivals[0].split(": ")[1].split(";")[0].split(" and "))
    with pytest.raises(RosError, match="where our joints are"):
        robot.reset(1)
    until(lambda: robot.rivals() == [], "one that is silent is no master")
    monkeypatch.setattr(robot.slots["state"], "_hear", lambda *heard: None)  # a middleware that does not say who sends
    until(robot.doubts, "nobody knows, and nobody says so")
    assert robot.rivals() == []
    assert robot.doubts()[0].startswith("several nodes publish on '/joint_states': ")
    robot.node.destroy_publisher(publisher)
    driver.arm.destroy_node()


def test_a_second_tracker_is_noticed_and_one_of_another_frame_is_not(both: tuple[Driver, RosRobot]) -> None:
    """The policy would see the object now here, now there."""
    driver, robot = both
    other = robot.node.create_publisher(message_type("geometry_msgs/msg/PoseStamped"), "objects/cube/pose", SENSOR.to_ros())
    until(lambda: other.get_subscription_count() == 1, "it was not discovered")

    def publish(frame: str, seconds: float = 0.4) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            other.publish(messages.pose(CUBE[:3] + 0.1, CUBE[3:], driver.clock.stamp(), frame))
            time.sleep(0.013)

    publish("camera")
    assert robot.rivals() == []
    publish("world")
    assert len(rivals := robot.rivals()) == 1
    assert rivals[0].startswith("2 nodes say on '/objects/cube/pose' what 'cube' is: ")
    assert {"/driver", "/robot"} <= set(rivals[0].split(": ")[1].split(";")[0].split(" and "))
    with pytest.raises(RosError, match="what 'cube' is"):
        robot.reset(1)
    until(lambda: robot.rivals() == [], "one that is silent is no master")
    driver.arm.destroy_node()


def test_what_is_missing_is_named_with_its_mend(ros: Sandbox) -> None:
    with Ros(signals=False) as own:
        node = own.node("robot")
        robot = RosRobot(PROFILE, node, RosClock())
        own.spin_in_thread()
        assert np.isnan(robot.state().positions).all()
        assert robot.state().stamp.came == -np.inf
        with pytest.raises(
            RosError, match=r"'/joint_states'; nobody publishes it: start the driver.*needs 'cube'.*nobody listens"
        ):
            robot.ready(timeout=0.1)
        with pytest.raises(RosError, match="nothing has come for input 'cube'"):
            robot.observe()
        with Ros(signals=False) as other:  # a context has one type for a topic
            other.node("liar").create_publisher(message_type("std_msgs/msg/String"), "objects/cube/pose", 1)
            until(lambda: any("carries std_msgs/msg/String" in line for line in robot.problems()), "a wrong type was not noticed")
        driver = Driver(own, reset=False)
        driver.names[0] = "shoulder"
        until(lambda: any("names: joint1 missing" in line for line in robot.problems()), "wrong names were not noticed")
        driver.names[0] = "joint1"
        robot.ready()
        robot.close()
        silent = RosRobot(PROFILE, node, RosClock(), enabled=False)  # shadow mode: not even a publisher
        until(lambda: not silent.problems(), "only the driver is needed")
        assert node.count_publishers(PROFILE.command.topic) == 0
        silent.command(np.zeros(8))
        silent.stop()
        silent.close()


def test_a_service_that_does_not_answer_is_an_error_in_time(ros: Sandbox) -> None:
    from hardware.ros2.services import TRIGGER, call

    with Ros(signals=False) as own:
        node, asleep = own.node("caller"), threading.Event()
        own.spin_in_thread()
        with pytest.raises(RosError, match="nobody offers the service 'nowhere'"):
            call(node, "nowhere", TRIGGER, timeout=0.2)
        with Ros(signals=False) as other:
            other.node("server").create_service(
                message_type(TRIGGER), "slow", lambda _, answer: (asleep.wait(10) and answer) or answer
            )
            other.spin_in_thread()
            with pytest.raises(RosError, match=r"'slow' did not answer within 2 s"):
                call(node, "slow", TRIGGER, timeout=2.0)  # the service must be found in it, too
            asleep.set()
