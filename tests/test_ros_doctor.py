"""`robopolicy doctor ros`: every finding on data, and on a robot over real DDS that has many things wrong at once."""

import argparse
import json
import os
import pwd
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ros import Sandbox

from hardware.ros2 import doctor, shm
from hardware.ros2.contract import LATCHED, NODE_TOPICS, Topic, message_type, robot_topics
from hardware.ros2.findings import Check, judge
from hardware.ros2.profile import Permit, load_profile
from hardware.ros2.runtime import Ros, packages_mend
from hardware.ros2.topics import End, Seen, look, node_of, stamp_of
from robopolicy import cli
from robopolicy.errors import ConfigError

PROFILE = load_profile("virtual")
TOPICS = [*robot_topics(PROFILE), *(topic._replace(name=topic.name.replace("~", "robopolicy_policy")) for topic in NODE_TOPICS)]
POLICY = "/robopolicy_policy"
COMMAND = "std_msgs/msg/Float64MultiArray"
TWO = [End(name, "sensor_msgs/msg/JointState") for name in ("/arm", "/fingers")]


def healthy() -> dict[str, Seen]:
    """What a robot looks like that nothing is wrong with."""
    found: dict[str, Seen] = {}
    for topic in TOPICS:
        inward = topic.direction == "in"
        robot, policy = End("/arm", topic.type), End(POLICY, topic.type)
        arrivals = [0.002 * number for number in range(500)] if inward else []
        found[topic.key] = Seen(
            f"/{topic.name}", [robot if inward else policy], [policy if inward else robot], 1.0, arrivals, [0.001] * len(arrivals)
        )
    found["state"].joints = PROFILE.joint_names
    found["input.front"].largest = 230_000
    return found


def findings(seen: dict[str, Seen]) -> list[Check]:
    return [check for check in judge(PROFILE, TOPICS, seen, POLICY) if check.level != "ok"]


def test_a_healthy_robot_has_no_findings() -> None:
    assert findings(healthy()) == []
    assert all(check.found for check in judge(PROFILE, TOPICS, healthy(), POLICY))


def test_our_node_speaks_to_the_robot_by_a_node_apart() -> None:
    seen = healthy()
    for key in ("command", "gripper"):
        seen[key].publishers = [End(f"{POLICY}_io", seen[key].publishers[0].type)]
    assert findings(seen) == []


def test_no_robot_is_a_note_that_says_how_to_start_one() -> None:
    (check,) = judge(PROFILE, TOPICS, {topic.key: Seen(f"/{topic.name}") for topic in TOPICS}, POLICY)
    assert check.level == "note"
    assert "robopolicy up virtual" in check.mend


def _set(key: str, **values: Any) -> Callable[[dict[str, Seen]], None]:
    def change(seen: dict[str, Seen]) -> None:
        for name, value in values.items():
            setattr(seen[key], name, value)

    return change


@pytest.mark.parametrize(
    ("change", "level", "found", "mend"),
    [
        (_set("state", publishers=[]), "wrong", "nobody publishes measured positions", "start its driver"),
        (_set("state", arrivals=[], ages=[]), "wrong", "/arm publishes, but no message came", "firewall"),
        (_set("state", arrivals=[0.0, 0.01, 0.4], ages=[]), "wrong", "once 0.39 s without: the arm is held", "raise"),
        (_set("state", arrivals=[0.04 * n for n in range(25)]), "note", "25 Hz; the control loop", "lower 'rate'"),
        (_set("state", mad=3), "wrong", "3 messages held NaN", "mend the driver"),
        (_set("state", joints=("left_joint1",)), "wrong", "no joint1, joint2", "state.joints"),
        (_set("state", ages=[-0.3]), "wrong", "300 ms in the future", "chrony"),
        (_set("state", ages=[0.5]), "wrong", "500 ms old", "chrony"),
        (_set("state", ages=[0.08]), "note", "80 ms old", "use_sim_time"),
        (_set("state", ages=[]), "note", "no stamp", ""),
        (_set("input.front", publishers=[]), "note", "nobody publishes camera 'front'", "mend the profile's topic"),
        (
            _set("input.front", publishers=[End("/a", "sensor_msgs/msg/Image"), End("/b", "sensor_msgs/msg/Image")]),
            "wrong", "published by /a, /b", "one of them should go",
        ),
        (_set("state", publishers=[End("/arm", "std_msgs/msg/String")]), "wrong", "/arm uses std_msgs/msg/String", "expected"),
        (
            _set("state", publishers=[End("/arm", "sensor_msgs/msg/JointState", "ERROR: reliability")]),
            "wrong", "no message passes to or from /arm: ERROR: reliability", "our subscription is best effort",
        ),
        (
            _set("command", subscriptions=[]),
            "wrong", "no controller carries out", "--deactivate OTHER --activate forward_position_controller",
        ),
        (_set("gripper", subscriptions=[]), "wrong", "nobody listens", "start the gripper's driver"),
        (
            _set("command", publishers=[End(POLICY, COMMAND), End("/old", COMMAND)]),
            "wrong", "2 publishers: /robopolicy_policy, /old", "end /old",
        ),
        (_set("command", publishers=[End("/servo", COMMAND)]), "wrong", "/servo publishes", "end it before"),
        (_set("state", publishers=TWO), "note", "published by /arm, /fingers", "one of them should go"),
        (
            _set("state", publishers=TWO, speakers=[("/arm", PROFILE.joint_names), ("/fingers", ("left_finger",))]),
            "note", "published by /arm, /fingers", "one of them should go",
        ),
        (
            _set("state", publishers=TWO, speakers=[("/arm", PROFILE.joint_names), ("/fingers", PROFILE.joint_names)]),
            "wrong", "/arm and /fingers say where our joints are", "keep one",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_robot_is_named_with_its_mend(
    change: Callable[[dict[str, Seen]], None], level: str, found: str, mend: str
) -> None:
    seen = healthy()
    change(seen)
    check = findings(seen)[0]
    assert check.level == level
    assert found in check.found
    assert mend in check.mend


def test_a_gripper_with_joint_states_of_its_own() -> None:
    profile = load_profile("fr3")
    assert profile.gripper is not None
    assert profile.gripper.state_topic is not None
    topics = [*robot_topics(profile), *NODE_TOPICS]
    seen = {}
    for topic in topics:
        ends = [[End("/arm", topic.type)], [End(POLICY, topic.type)]]
        publishers, subscriptions = ends if topic.direction == "in" else reversed(ends)
        times = [0.002 * number for number in range(500)]
        seen[topic.key] = Seen(f"/{topic.name}", publishers, subscriptions, 1.0, times, [0.001] * 500)
    fingers = profile.state.joints[profile.gripper.coordinate].names
    seen["state"].joints = tuple(name for name in profile.joint_names if name not in fingers)
    seen["gripper_state"].joints = fingers
    assert [check for check in judge(profile, topics, seen, POLICY) if check.level != "ok"] == []
    seen["gripper_state"].joints = ("other",)
    (check,) = [check for check in judge(profile, topics, seen, POLICY) if check.level != "ok"]
    assert f"no {fingers[0]}" in check.found


def test_a_permit_that_is_missing_is_named_with_what_a_person_does() -> None:
    profile = PROFILE.model_copy(update={"permits": {"program": Permit(topic="driver/runs", mend="press play")}})
    topics = [*robot_topics(profile), *NODE_TOPICS]
    driver = [End("/driver", "std_msgs/msg/Bool")]

    def found(**seen: Any) -> list[tuple[str, str, str, str]]:
        robot = healthy() | {topic.key: Seen(f"/{topic.name}") for topic in NODE_TOPICS}
        robot["permit.program"] = Seen("/driver/runs", **seen)
        return [tuple(check) for check in judge(profile, topics, robot, POLICY) if check.level != "ok"]  # type: ignore[misc]

    assert found(publishers=driver, said=True) == []
    says = "permit 'program' says false: the arm is not commanded"
    assert found(publishers=driver, said=False) == [("/driver/runs", "wrong", says, "press play")]
    ((_, _, said, mend),) = found(publishers=driver)
    assert (said, mend) == ("permit 'program' has said nothing: the arm is not commanded", "press play")
    ((_, _, said, mend),) = found()
    assert said == "nobody publishes permit 'program': the arm is not commanded"
    assert "`permits: null`" in mend


def test_what_a_latched_permit_said_long_ago_is_seen(ros: Sandbox) -> None:
    topic = Topic("permit.program", "driver/runs", "std_msgs/msg/Bool", "in", LATCHED, "permit 'program'")
    with Ros(signals=False) as own, Ros(signals=False) as mine:
        flag = message_type(topic.type)
        driver = own.node("driver").create_publisher(flag, topic.name, LATCHED.to_ros())
        driver.publish(flag(data=False))
        own.spin_in_thread()
        node = mine.node("doctor")
        mine.spin(until=lambda: node.count_publishers("/driver/runs") > 0)
        seen = look(mine, node, [topic], 0.5, settle=0.1)["permit.program"]
        assert seen.said is False
        assert not seen.publishers[0].trouble


# ---- this machine --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "level", "found"),
    [
        ({}, "note", "0, which every ROS on this network shares"),
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}, "note", "0, which every ROS on this computer shares"),
        ({"ROS_DOMAIN_ID": "7"}, "ok", "7"),
        ({"ROS_DOMAIN_ID": "seven"}, "wrong", "'seven' is no domain"),
        ({"ROS_DOMAIN_ID": "233"}, "wrong", "'233' is no domain"),
        ({"ROS_DOMAIN_ID": "150"}, "note", "150"),
    ],
)
def test_domains(environment: dict[str, str], level: str, found: str) -> None:
    check = doctor.domain(environment)[0]
    assert check.level == level
    assert found in check.found


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}, "wrong"),
        ({"ROS_LOCALHOST_ONLY": "1"}, "note"),
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}, "ok"),
        ({}, "ok"),
    ],
)
def test_discovery(environment: dict[str, str], level: str) -> None:
    assert doctor.domain(environment)[1].level == level


@pytest.mark.parametrize(
    ("environment", "images", "level"),
    [
        ({}, ["front/image_raw"], "note"),
        ({}, [], "ok"),
        ({"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA"}, ["front/image_raw"], "ok"),
        ({"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA?max_msg_size=1MB"}, ["front/image_raw"], "ok"),
        ({"FASTDDS_BUILTIN_TRANSPORTS": "SHM"}, ["front/image_raw"], "wrong"),
        ({"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA", "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}, ["front/image_raw"], "note"),
        ({"FASTDDS_DEFAULT_PROFILES_FILE": "x.xml", "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}, ["front/image_raw"], "note"),
    ],
)
def test_transports_against_the_size_of_messages(environment: dict[str, str], images: list[str], level: str) -> None:
    check = doctor.transports(environment, images)
    assert check.level == level, check


def test_middleware_and_messages() -> None:
    assert doctor.middleware("rmw_fastrtps_cpp", {}).level == "ok"
    assert doctor.middleware("rmw_cyclonedds_cpp", {}).level == "note"
    assert doctor.middleware("rmw_fastrtps_cpp", {"RMW_IMPLEMENTATION": "rmw_zenoh_cpp"}).level == "wrong"
    assert doctor.messages().level == "ok"
    assert doctor.installed().level == "ok"


def test_missing_messages_are_found_and_mended_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trajectory_msgs.msg", None)
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    check = doctor.messages()
    assert (check.level, check.found) == ("wrong", "trajectory_msgs/msg/JointTrajectory cannot be imported")
    assert check.mend == "run `make setup` in the checkout, or: uv pip install -e '.[ros]'"
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    assert doctor.messages().mend == "apt install ros-jazzy-trajectory-msgs"
    assert packages_mend(["control_msgs", "std_msgs"], "").endswith(
        "'.[ros]'; there are no wheels of control_msgs: source a ROS installation that has ros-DISTRO-control-msgs"
    )


def test_packages_beside_a_sourced_ros_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    check = doctor.installed()
    assert check.level == "wrong"
    assert "shadow ROS jazzy" in check.found


def test_lost_messages_are_found() -> None:
    assert doctor.delivery(20).level == "ok"
    assert doctor.delivery(3).level == "wrong"


def test_shared_memory_of_the_dead_is_found_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fastdds_00c0ffee", "fastdds_00c0ffee_el", "sem.fastdds_port7411_mutex", "fastdds_port7411", "unrelated"):
        (tmp_path / name).write_bytes(bytes(1000))
    assert shm.leftovers(age=60, folder=tmp_path) == []  # too young: their owner may not have locked them yet
    time.sleep(1.1)
    check = doctor.shared_memory(folder=tmp_path)
    assert check.level == "note"  # 4 KB
    assert "4 files" in check.found
    assert f"of killed processes of {pwd.getpwuid(os.getuid()).pw_name}" in check.found
    assert "--clean` deletes those of who runs it, and spares what is in use" in check.mend
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=8000))
    assert doctor.shared_memory(folder=tmp_path).level == "wrong"
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 4321)
        assert doctor.shared_memory(folder=tmp_path).level == "note", "somebody else's"
        patch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(PermissionError()))
        check = doctor.shared_memory(clean=True, folder=tmp_path)
        assert (check.level, check.found[:23]) == ("note", "deleted 0 files, 0.0 MB")
    assert doctor.shared_memory(clean=True, folder=tmp_path).level == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["unrelated"]


def test_shared_memory_of_the_living_is_left_alone(ros: Sandbox) -> None:
    assert ros.node is not None
    names = shm.segments(os.getpid())
    assert names
    assert not [path for path in shm.leftovers(age=0.0) if shm.belongs(path, names)]


def test_a_publisher_whose_node_is_not_known_is_named_in_words() -> None:
    known = SimpleNamespace(node_name="arm", node_namespace="/left")
    unknown = SimpleNamespace(node_name="_NODE_NAME_UNKNOWN_", node_namespace="_NODE_NAMESPACE_UNKNOWN_")
    assert [node_of(known), node_of(unknown)] == ["/left/arm", "a node that is not known by name yet"]


def test_stamps_are_read_without_decoding() -> None:
    from builtin_interfaces.msg import Time
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import Image
    from std_msgs.msg import Header

    message = Image(header=Header(stamp=Time(sec=1_700_000_000, nanosec=250_000_000), frame_id="camera"))
    assert stamp_of(serialize_message(message)) == 1_700_000_000.25
    assert stamp_of(serialize_message(Image())) is None


# ---- over DDS ------------------------------------------------------------------------------------------------------------------

# Wrong joint names, stamps from the future, NaN; a controller that wants what a command cannot promise; two commanders.
ROBOT = """
import rclpy, time
from rclpy.qos import QoSProfile, ReliabilityPolicy, DurabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
rclpy.init()
driver, first, second = (rclpy.create_node(name) for name in ("driver", "first", "second"))
states = driver.create_publisher(JointState, "joint_states", 10)
latched = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
keep = [
    driver.create_subscription(Float64MultiArray, "forward_position_controller/commands", print, latched),
    first.create_publisher(Float64MultiArray, "forward_position_controller/commands", 1),
    second.create_publisher(Float64MultiArray, "forward_position_controller/commands", 1),
]
def publish():
    message = JointState(name=[f"left_joint{n}" for n in range(1, 8)], position=[0.0] * 6 + [float("nan")])
    ahead = time.time() + 3.0
    message.header.stamp.sec, message.header.stamp.nanosec = int(ahead), int(1e9 * (ahead % 1))
    states.publish(message)
driver.create_timer(0.005, publish)
rclpy.spin(driver)
"""


def test_a_sick_robot_over_dds(ros: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_in_robot.py").write_text(ROBOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from sensor_msgs.msg import JointState

    ros.start("stand_in_robot", namespace="left")
    ros.message(JointState, "left/joint_states")  # it is there, however long it took
    command = [sys.executable, "-m", "robopolicy.cli", "doctor", "ros", "--namespace", "left", "--seconds", "4", "--json"]
    process = ros.run(command)  # it takes seconds to find anybody on a busy computer
    code, printed = process.wait(60), process.output()
    assert code == 1, printed
    document = json.loads(printed[printed.index("{") :])
    found = {(check["name"], check["found"]) for check in document["checks"] if check["level"] == "wrong"}
    topics = "\n".join(f"{name}: {text}" for name, text in found)
    for expected in (
        r"/left/joint_states: no joint1, .*left_finger.* among left_joint1",
        r"/left/joint_states: \d+ messages held NaN",
        r"/left/joint_states: stamps are (2\d\d\d|3000) ms in the future",
        r"/left/forward_position_controller/commands: no message passes to or from /left/driver: [^;]*olatile[^;]*$",
        r"/left/forward_position_controller/commands: 2 publishers: /left/\w+, /left/\w+",
    ):
        assert re.search(expected, topics, re.M), f"{expected} not in\n{topics}"
    assert 50 < document["topics"]["state"]["rate"] < 300
    delivered = next(check for check in document["checks"] if check["name"] == "delivery")
    assert delivered["level"] == "ok", delivered  # with what the sandbox sets


def test_whose_joint_states_are_ours_is_told_by_publisher(ros: Sandbox) -> None:
    from sensor_msgs.msg import JointState

    with Ros(signals=False) as robot:
        looking, arm, fingers = (robot.node(name) for name in ("looking", "arm", "fingers"))
        joints = {arm: PROFILE.joint_names, fingers: ("finger",)}
        for node, names in joints.items():
            publisher = node.create_publisher(JointState, "joint_states", 10)
            message = JointState(name=names, position=[0.0] * len(names))
            node.create_timer(0.02, partial(publisher.publish, message))
        topic = TOPICS[0]
        seen = look(robot, looking, [topic], 0.5)[topic.key]
    assert topic.key == "state"
    assert sorted(seen.speakers) == [("/arm", PROFILE.joint_names), ("/fingers", ("finger",))]


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "ros", "--profile", "vitual"]) == 2
    assert "did you mean 'virtual'?" in capsys.readouterr().err


def test_without_rclpy_the_rest_is_still_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hardware.ros2 import runtime

    def missing() -> None:
        raise runtime.RosError("there is no rclpy here; run `make setup`")

    monkeypatch.setattr(runtime, "require", missing)
    arguments = argparse.Namespace(profile="virtual", namespace="", node="x", seconds=1.0, clean=False, json=False)
    assert doctor.run(arguments) == 1
    shown = capsys.readouterr().out
    assert "mend: there is no rclpy here; run `make setup`" in shown
    assert "ROS_DOMAIN_ID" in shown


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_listening_takes_some_time_and_ends(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "ros", f"--seconds={seconds}"])
    assert "is not a number above 0" in capsys.readouterr().err


def test_a_profile_that_is_not_there_is_answered_in_sentences() -> None:
    with pytest.raises(ConfigError, match=r"no profile 'zzz': valid: fr3, .*, xarm7\. Or give a file, \./mine\.yaml"):
        load_profile("zzz")
    with pytest.raises(ConfigError, match=r"profile 'ur5e': at 5 Hz every period"):
        load_profile("ur5e", rate=5.0)
