"""Bags: what is written is read back, by rosbags and by us; one whose writer was killed is mended."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from rclpy.serialization import serialize_message
from rig import save_policy
from ros import Sandbox
from std_msgs.msg import Float64

from hardware.ros2 import bagfile, bagging, messages
from hardware.ros2.bagfile import BagError, BagWriter, Message, Storage, open_bag, repair, restamped
from hardware.ros2.contract import COMMAND, LATCHED, STATE_OUT
from hardware.ros2.deployment import DeployConfig
from hardware.ros2.imported import import_bags
from hardware.ros2.profile import load_profile, profile_names
from hardware.ros2.recording import RecordingConfig
from hardware.ros2.runtime import Ros, RosClock
from hardware.ros2.shadow import shadow
from robopolicy import cli
from robopolicy.data.check import check
from robopolicy.data.episodes import Episodes
from robopolicy.deploy.clock import FakeClock
from robopolicy.errors import DataError
from sim.arm.robot import ArmModel, SimArm

JOINT_STATE = "sensor_msgs/msg/JointState"
COMMANDS = "/forward_position_controller/commands"
START = 1_700_000_000_000_000_000


@functools.cache
def typestore() -> Any:
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_KILTED)


def joint_state(stamp: int, positions: list[float]) -> bytes:
    store = typestore()
    types = store.types
    header = types["std_msgs/msg/Header"](
        stamp=types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9), frame_id="base"
    )
    message = types[JOINT_STATE](
        header=header, name=["a", "b"], position=np.array(positions, np.float64), velocity=np.zeros(2), effort=np.zeros(0)
    )
    return bytes(store.serialize_cdr(message, JOINT_STATE))


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_what_is_written_is_read_back(tmp_path: Path, storage: Storage) -> None:
    with BagWriter(tmp_path / "bag", storage) as writer:
        for k in range(300):
            writer.write(Message("/joint_states", JOINT_STATE, START + k * 10_000_000, joint_state(START + k, [k, -k])))
        writer.write(Message("/quiet", "std_msgs/msg/Bool", START + 5, b"\x00\x01\x00\x00\x01"))
    with open_bag(tmp_path / "bag") as bag:
        assert bag.counts == {"/joint_states": 300, "/quiet": 1}
        assert bag.seconds == pytest.approx(2.99, abs=1e-3)
        assert (bag.stamped("/joint_states"), bag.stamped("/quiet")) == (True, False)
        messages = list(bag.messages({"/joint_states"}))
        assert [m.came for m in messages] == [START + k * 10_000_000 for k in range(300)]
        read = bag.read(messages[7])
        assert read.position.tolist() == [7.0, -7.0]
        assert read.header.stamp.nanosec == 7
        assert bag.read(next(bag.messages({"/quiet"}))).data
    with pytest.raises(BagError, match="exists"):
        BagWriter(tmp_path / "bag", storage)


def test_stamps_are_shifted_in_the_serialised_message() -> None:
    store = typestore()
    data = joint_state(START, [1.0, 2.0])
    shifted = store.deserialize_cdr(restamped(data, 2_500_000_000), JOINT_STATE)
    assert (shifted.header.stamp.sec, shifted.header.stamp.nanosec) == (START // 10**9 + 2, 500_000_000)
    assert shifted.position.tolist() == [1.0, 2.0]
    assert restamped(joint_state(0, [1.0, 2.0]), 5) == joint_state(0, [1.0, 2.0])  # zero says: no stamp


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from hardware.ros2.bagfile import BagWriter, Message
data = bytes.fromhex({data!r})
with BagWriter({path!r}, {storage!r}) as writer:
    k = 0
    while True:
        writer.write(Message("/joint_states", {type!r}, time.time_ns(), data))
        k += 1
        print(k, flush=True)
        time.sleep(0.002)
"""


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_what_came_last_is_in_the_file_though_nothing_follows(tmp_path: Path, storage: Storage) -> None:
    """Said once, then silence: a state, the cause of a stop. Killed hours later, it must be there."""
    with BagWriter(tmp_path / "bag", storage, reserve=0.0) as writer:
        for k in range(3):
            writer.write(Message("/joint_states", JOINT_STATE, START + k, joint_state(START + k, [0.0, k])))
        time.sleep(2.5)
        shutil.copytree(tmp_path / "bag", tmp_path / "killed")
    assert repair(tmp_path / "killed", tmp_path / "mended") == {"/joint_states": 3}


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_whose_writer_was_killed_is_mended_to_within_seconds_of_its_end(tmp_path: Path, storage: Storage) -> None:
    root, data = str(Path(__file__).parents[1]), joint_state(START, [1.0, 2.0]).hex()
    code = KILLED.format(root=root, path=str(tmp_path / "bag"), storage=storage, data=data, type=JOINT_STATE)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    began, last = time.monotonic(), time.time_ns()
    while time.monotonic() - began < 2.5:
        process.stdout.readline()
        last = time.time_ns()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(BagError, match="bag repair"), open_bag(tmp_path / "bag"):
        pass
    counts = repair(tmp_path / "bag", tmp_path / "mended")
    with open_bag(tmp_path / "mended") as bag:
        came = [m.came for m in bag.messages()]
    assert counts == {"/joint_states": len(came)}
    assert (last - came[-1]) * 1e-9 < 2.0  # flushed every second


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_disk_that_is_nearly_full_ends_a_bag_while_it_can_be_closed(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bagfile, "_FLUSH", 0.0)
    data = joint_state(START, [1.0, 2.0])

    def write_on(writer: BagWriter) -> None:
        for k in range(1000):
            writer.write(Message("/joint_states", JOINT_STATE, START + k, data))
            time.sleep(0.001)

    with BagWriter(tmp_path / "bag", storage, reserve=1e12) as writer:
        with pytest.raises(BagError, match="MB are free"):
            write_on(writer)
        assert writer.error is not None
    with open_bag(tmp_path / "bag") as bag:
        assert bag.counts["/joint_states"] >= 1


def test_a_cut_mcap_keeps_its_whole_records(tmp_path: Path) -> None:
    data = joint_state(START, [0.0] * 30_000)
    with BagWriter(tmp_path / "bag") as writer:
        for k in range(20):
            writer.write(Message("/joint_states", JOINT_STATE, START + k, data))
    file = tmp_path / "bag" / "bag.mcap"
    content = file.read_bytes()
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(content[: int(0.6 * len(content))])
    kept = repair(cut, tmp_path / "mended")["/joint_states"]
    assert 8 <= kept <= 12
    (tmp_path / "no.mcap").write_bytes(b"nonsense")
    with pytest.raises(BagError, match="no mcap file"):
        repair(tmp_path / "no.mcap", tmp_path / "other")


def test_a_missing_bag_is_told(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="no bag at"), open_bag(tmp_path / "none"):
        pass


# ---- from bags to episodes, and policies on bags -------------------------------------------------------------------------------


class Drive(NamedTuple):
    """What a simulated arm did while it was recorded, each 10 ms."""

    observed: list[dict[str, np.ndarray]]
    commanded: np.ndarray


def drive(path: Path, seconds: float = 4.0, namespace: str = "") -> Drive:
    """A bag of our arm that waves, with a cube before it; poses come 60 ms after they were so."""
    clock = FakeClock()
    arm = SimArm("lift", clock)
    arm.reset(3)
    begin = arm.state().positions
    observed, commanded = [], []
    waiting: list[Message] = []
    types = {"/joint_states": JOINT_STATE, "/objects/cube/pose": "geometry_msgs/msg/PoseStamped"}
    types |= {COMMANDS: "std_msgs/msg/Float64MultiArray", "/gripper/command": "std_msgs/msg/Float64"}

    def say(topic: str, message: Any, late: float = 0.0) -> None:
        name = f"/{namespace}{topic}" if namespace else topic
        waiting.append(Message(name, types[topic], START + round((clock.time + late) * 1e9), serialize_message(message)))

    for k in range(round(seconds * 100)):
        clock.time = k / 100
        positions, now = arm.state().positions, START + k * 10_000_000
        stamp = Time(sec=now // 10**9, nanosec=now % 10**9)
        names, fingers = ["left_finger", "right_finger", *arm.names[:7]], positions[7] / 2
        speeds = arm.task.velocities
        velocities = np.array([speeds[7] / 2, speeds[7] / 2, *speeds[:7]])
        state = messages.joint_state(names, np.array([fingers, fingers, *positions[:7]]), velocities, stamp)
        say("/joint_states", state)
        if k % 4 == 0:
            cube = arm.task.poses()["cube"]
            say("/objects/cube/pose", messages.pose(cube[:3], cube[3:], stamp, "world"), late=0.06)
        target = begin + np.append(0.1 * np.sin(2 * clock.time) * np.ones(7), -0.01)
        arm.command(target)
        say(COMMANDS, messages.float_array(target[:7]))
        if k == 0:
            say("/gripper/command", Float64(data=float(target[7])))
        observed.append(arm.task.observe())
        commanded.append(target)
    with BagWriter(path) as writer:
        for message in sorted(waiting, key=lambda m: m.came):
            writer.write(message)
    return Drive(observed, np.array(commanded))


def test_imported_episodes_are_what_the_simulator_observed(tmp_path: Path) -> None:
    done = drive(tmp_path / "one")
    drive(tmp_path / "two", seconds=1.5)
    out = tmp_path / "set.zarr"
    assert cli.main(["bag", "import", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]) == 0
    store = Episodes.open(out)
    assert len(store) == 2
    assert [p for p in check(out) if p.severity == "error"] == []
    stored = store.episode(0)
    assert len(stored["action"]) > 70
    began = float(np.round(0.06 - stored["stamps"][0, 0], 2)) if stored["stamps"][0, 0] < 0 else 0.06
    due = began + stored["timestamp"][:, 0]
    ticks = np.minimum(np.floor(due * 100 + 1e-3).astype(int), len(done.observed) - 1)
    for name, value in stored.items():
        if name in done.observed[0] and "cube" not in name:
            np.testing.assert_allclose(value, [done.observed[k][name] for k in ticks], atol=2e-6, err_msg=name)
    # The cube has all but come to rest, so its poses of every 40 ms are those of each tick.
    np.testing.assert_allclose(stored["cube_pos"], [done.observed[k]["cube_pos"] for k in ticks], atol=1e-4)
    told = np.minimum(np.floor((due + 0.05) * 100 + 1e-3).astype(int), len(done.commanded) - 1)
    off = [np.abs(stored["executed"] - done.commanded[told - k]).max(axis=1) for k in (0, 1)]
    assert np.min(off, axis=0).max() < 1e-9  # the command of that tick, or, where both are at the same time, the one before
    model = ArmModel("lift")
    np.testing.assert_allclose(stored["action"], [model.action_of(q) for q in stored["executed"]], atol=1e-6)


def test_an_import_waits_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(tmp_path / "bag", seconds=3.0)
    real = Episodes.extend

    def slow(store: Episodes, steps: dict[str, np.ndarray]) -> None:
        time.sleep(0.03)
        real(store, steps)

    monkeypatch.setattr(Episodes, "extend", slow)
    config = RecordingConfig(block=1, reserve=0)
    (ended,) = import_bags([tmp_path / "bag"], tmp_path / "set.zarr", "virtual", config=config).values()
    assert (ended.episode, ended.steps > 45) == (0, True), ended


def test_an_import_that_gives_nothing_says_why(tmp_path: Path) -> None:
    drive(tmp_path / "bag", seconds=1.0, namespace="left")
    arguments = ["bag", "import", str(tmp_path / "bag"), "--out", str(tmp_path / "set.zarr")]
    assert cli.main(arguments) == 2  # the namespace is missing
    assert cli.main([*arguments, "--namespace", "left"]) == 0
    with BagWriter(tmp_path / "blind") as writer:
        writer.write(Message("/joint_states", JOINT_STATE, START, joint_state(START, [0.0, 0.0])))
    with pytest.raises(DataError, match=r"refused.*joint1"):
        import_bags([tmp_path / "blind"], tmp_path / "blind.zarr", "virtual")


def test_shadow_shows_what_a_policy_would_have_commanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = drive(tmp_path / "bag")
    ahead = (0.5, 0.02, 0.15, 0.1, 0.06)
    save_policy(tmp_path / "policy", ahead)
    arguments = [str(tmp_path / "bag"), str(tmp_path / "policy"), "--json", str(tmp_path / "shadow.json")]
    assert cli.main(["bag", "shadow", *arguments, "--plot", str(tmp_path / "shadow.png")]) == 0
    printed = capsys.readouterr().out
    assert "|policy - commanded|" in printed
    assert (tmp_path / "shadow.png").stat().st_size > 1000
    found = json.loads((tmp_path / "shadow.json").read_text())
    assert found["episodes"] == 1
    assert found["periods"] > 300
    assert found["differences"]["joint4"]["mean"] > 0.01
    result = shadow(tmp_path / "bag", DeployConfig(checkpoint=str(tmp_path / "policy"), inference="thread"))
    model = ArmModel("lift")
    np.testing.assert_allclose(model.action_of(result.wanted[-1]), ahead, atol=0.02)
    ticks = np.minimum(np.floor(result.times * 100 + 1e-3).astype(int) - 1, len(done.commanded) - 1)  # of the period before
    np.testing.assert_allclose(result.commanded, done.commanded[ticks], atol=0.006)
    with pytest.raises(BagError, match="the profile needs"):
        shadow(tmp_path / "bag", DeployConfig(checkpoint=str(tmp_path / "policy")), namespace="left")


# ---- what is replayed ----------------------------------------------------------------------------------------------------------

POSE, TRAJECTORY = "geometry_msgs/msg/PoseStamped", "trajectory_msgs/msg/JointTrajectory"
MEASURED = {
    "/joint_states": JOINT_STATE,
    "/objects/cube/pose": POSE,
    "/front/image_raw": "sensor_msgs/msg/Image",
    "/virtual_arm/success": "std_msgs/msg/Bool",
}
OTHERS = {  # what controllers take, whatever the profile is, and what robots and nodes say beside
    COMMANDS: "std_msgs/msg/Float64MultiArray",
    "/gripper/command": "std_msgs/msg/Float64",
    "/joint_trajectory_controller/joint_trajectory": TRAJECTORY,
    "/joint_trajectory_controller/follow_joint_trajectory/_action/status": "action_msgs/msg/GoalStatusArray",
    "/fr3_arm_controller/joint_trajectory": TRAJECTORY,
    "/cmd_vel": "geometry_msgs/msg/Twist",
    "/servo/delta_twist_cmds": "geometry_msgs/msg/TwistStamped",
    "/target_frame": POSE,
    "/joint_command": JOINT_STATE,
    "/other/joint_states": JOINT_STATE,
    "/robopolicy_policy/state": "std_msgs/msg/String",
    "/robopolicy_policy/commanded": JOINT_STATE,
    "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
}  # fmt: skip
HANDS = ["/deadman", "/estop", "/left/deadman"]


def choose(*topics: str, profile: str = "virtual", **given: Any) -> tuple[set[str], list[str]]:
    """Of a bag with all of these: what is replayed, and what is told."""
    told: list[str] = []
    types = MEASURED | OTHERS | dict.fromkeys(HANDS, "std_msgs/msg/Bool")
    return bagging.choose(types, load_profile(profile), topics, told=told.append, **given), told


@pytest.mark.parametrize("commands", [False, True])
def test_only_what_the_profile_reads_is_replayed_and_the_rest_is_told(commands: bool) -> None:
    chosen, told = choose(commands=commands)
    assert chosen == set(MEASURED)
    assert [line.split("'")[1] for line in told] == sorted([*OTHERS, *HANDS])
    assert all("is left out: " in line for line in told)
    assert choose("objects/cube/pose") == ({"/objects/cube/pose"}, [])


@pytest.mark.parametrize("topic", OTHERS)
def test_what_may_move_an_arm_is_replayed_only_where_commands_are_allowed(topic: str) -> None:
    with pytest.raises(BagError, match="say --commands"):
        choose(topic)
    assert choose(topic, commands=True) == ({topic}, [])


def test_another_robot_s_commands_are_no_inputs_of_a_wrong_profile() -> None:
    for profile in profile_names():
        with pytest.raises(BagError, match="say --commands"):
            choose("/fr3_arm_controller/joint_trajectory", profile=profile)


def test_an_input_of_another_type_is_no_input() -> None:
    told: list[str] = []
    types = {"/joint_states": JOINT_STATE, "/objects/cube/pose": TRAJECTORY}
    assert bagging.choose(types, load_profile("virtual"), told=told.append) == {"/joint_states"}
    assert "carries trajectory_msgs/msg/JointTrajectory" in told[0]
    with pytest.raises(BagError, match=r"carries .*--commands"):
        bagging.choose(types, load_profile("virtual"), ["objects/cube/pose"])


def test_a_topic_that_the_profile_reads_and_commands_is_a_command(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(f"base: virtual\ninputs: {{cube: {{type: pose, topic: {COMMANDS}}}}}\n")
    with pytest.raises(BagError, match="say --commands"):
        bagging.choose({COMMANDS: POSE}, load_profile(tmp_path / "odd.yaml"), [COMMANDS])


@pytest.mark.parametrize("commands", [False, True])
@pytest.mark.parametrize("topic", HANDS)
def test_a_person_s_hand_is_never_replayed(topic: str, commands: bool, tmp_path: Path) -> None:
    with pytest.raises(BagError, match="never replayed"):
        choose("joint_states", topic, commands=commands)
    with pytest.raises(BagError, match="never replayed"):
        choose(topic.split("/")[-1], commands=commands, namespace="left")
    (tmp_path / "odd.yaml").write_text(f"base: virtual\nsuccess: {topic}\n")
    assert topic not in choose(profile=str(tmp_path / "odd.yaml"))[0], "also where a profile reads it"


@pytest.mark.parametrize("commands", [False, True])
def test_a_permit_is_never_replayed(commands: bool, tmp_path: Path) -> None:
    """A recorded true would let an arm be commanded that takes no commands now."""
    program = "io_and_status_controller/robot_program_running"
    types = {"/joint_states": JOINT_STATE} | dict.fromkeys([f"/{program}", f"/left/{program}"], "std_msgs/msg/Bool")
    for name in (program, f"/left/{program}"):
        with pytest.raises(BagError, match=r"it is a permit, .* never replayed$"):
            bagging.choose(types, load_profile("ur5e"), [name], commands=commands)
    told: list[str] = []
    assert bagging.choose(types, load_profile("ur5e"), commands=commands, told=told.append) == {"/joint_states"}
    assert [("is a permit" in line) for line in told] == [True, True]
    (tmp_path / "odd.yaml").write_text("base: virtual\nsuccess: /runs\npermits: {program: {topic: /runs}}\n")
    types = {"/joint_states": JOINT_STATE, "/runs": "std_msgs/msg/Bool"}
    assert bagging.choose(types, load_profile(tmp_path / "odd.yaml")) == {"/joint_states"}, "also where a profile reads it"


def test_a_namespace_is_the_bag_s_and_a_topic_that_is_not_there_is_told() -> None:
    told: list[str] = []
    types = {"/left/joint_states": JOINT_STATE, "/joint_states": JOINT_STATE}
    profile = load_profile("virtual")
    assert bagging.choose(types, profile, namespace="left", told=told.append) == {"/left/joint_states"}
    assert "'/joint_states' is left out" in told.pop()
    assert bagging.choose(types, profile, ["joint_states", "objects/cube/pose"], told=told.append) == {"/joint_states"}
    assert told == ["'/objects/cube/pose' is not in the bag"]
    with pytest.raises(BagError, match="the profile reads nothing"):
        bagging.choose(types, profile, namespace="right", told=told.append)


# ---- live ----------------------------------------------------------------------------------------------------------------------


def test_topics_are_recorded_as_they_come_and_replayed_with_stamps_of_now(
    ros: Sandbox, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from sensor_msgs.msg import JointState
    from std_msgs.msg import Bool, Float64MultiArray

    states = ros.node.create_publisher(JointState, "joint_states", STATE_OUT.to_ros())
    success = ros.node.create_publisher(Bool, "virtual_arm/success", LATCHED.to_ros())
    commands = ros.node.create_publisher(Float64MultiArray, "forward_position_controller/commands", COMMAND.to_ros())
    success.publish(Bool(data=True))  # before anybody listens
    bag = tmp_path / "bag"
    recorder = ros.run([sys.executable, "-m", "robopolicy.cli", "bag", "record", str(bag), "--seconds", "60"])
    ros.until(lambda: "recording '/joint_states'" in recorder.output() and states.get_subscription_count(), 30)
    clock = RosClock()
    for k in range(150):
        states.publish(messages.joint_state(["a"], np.array([float(k)]), None, clock.stamp()))
        commands.publish(messages.float_array(np.zeros(7)))
        ros.spin(0.01)
    recorder.send(signal.SIGINT)
    assert recorder.wait(20) == 0, recorder.output()
    assert "nobody published '/gripper/command'" in recorder.output()
    with open_bag(bag) as opened:
        assert opened.counts["/joint_states"] >= 140
        assert opened.counts["/virtual_arm/success"] == 1
        assert "/forward_position_controller/commands" in opened.counts
    assert cli.main(["bag", "info", str(bag)]) == 0

    # The driver is still there: two of them on one topic would make an arm jump.
    assert cli.main(["bag", "replay", str(bag)]) == 2
    assert "published by" in capfd.readouterr().err
    assert cli.main(["bag", "replay", str(bag), "--topic", COMMANDS]) == 2
    assert "--commands" in capfd.readouterr().err
    assert cli.main(["bag", "replay", str(bag), "--topic", "deadman", "--commands"]) == 2
    assert "never replayed" in capfd.readouterr().err
    assert cli.main(["bag", "replay", str(bag), "--commands"]) == 2
    assert "say which, --topic NAME" in capfd.readouterr().err
    for publisher in (states, success, commands):
        ros.node.destroy_publisher(publisher)
    found: list[JointState] = []
    moved: list[Any] = []
    ros.node.create_subscription(JointState, "joint_states", found.append, STATE_OUT.to_ros())
    ros.node.create_subscription(Float64MultiArray, "forward_position_controller/commands", moved.append, COMMAND.to_ros())
    replayed = ros.run([sys.executable, "-m", "robopolicy.cli", "bag", "replay", str(bag), "--rate", "2"])
    ros.until(lambda: not replayed.alive, 30)
    assert replayed.wait(1) == 0, replayed.output()
    assert len(found) >= 130
    assert np.diff([m.position[0] for m in found]).min() > 0
    stamps = [m.header.stamp.sec + m.header.stamp.nanosec * 1e-9 for m in found]
    assert abs(stamps[-1] - time.time()) < 20
    assert 0.3 < stamps[-1] - stamps[0] < 1.5  # twice as fast
    assert moved == []
    assert f"'{COMMANDS}' is left out" in replayed.output()
    allowed = ["bag", "replay", str(bag), "--topic", COMMANDS, "--commands", "--rate", "1"]
    replayed = ros.run([sys.executable, "-m", "robopolicy.cli", *allowed])
    ros.until(lambda: not replayed.alive, 30)
    assert len(moved) > 10, replayed.output()


def test_the_seconds_of_a_recording_begin_with_its_first_message(ros: Sandbox, tmp_path: Path) -> None:
    """On a busy computer it takes seconds to find who publishes."""
    from sensor_msgs.msg import JointState

    command = ["bag", "record", str(tmp_path / "bag"), "--topic", "joint_states", "--seconds", "1"]
    recorder = ros.run([sys.executable, "-m", "robopolicy.cli", *command])
    ros.until(lambda: recorder.output().count("no message yet") >= 2 or not recorder.alive, 30)
    states = ros.node.create_publisher(JointState, "joint_states", STATE_OUT.to_ros())
    end = time.monotonic() + 30

    def publish() -> bool:
        states.publish(messages.joint_state(["a"], np.zeros(1), None, RosClock().stamp()))
        return not recorder.alive or time.monotonic() > end

    ros.until(publish, 40)
    assert recorder.wait(1) == 0, recorder.output()
    with open_bag(tmp_path / "bag") as opened:
        assert opened.seconds > 0.8


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_recording_to_which_nothing_comes_ends_without_a_bag(
    storage: Storage, ros: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bagging, "_PATIENCE", 0.3)
    with Ros(signals=False) as own:
        late = threading.Timer(60.0, own.stop)
        late.start()
        with pytest.raises(BagError, match=r"no message has come within 0\.5 s, and there is no bag"):
            bagging.record(own, tmp_path / "bag", ["nothing"], storage=storage, seconds=0.2, told=lambda _: None)
        late.cancel()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", ["0", "inf", "nan"])
def test_a_recording_of_no_time_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bag", "record", "nowhere", "--seconds", seconds])
    assert "is not a number above 0" in capsys.readouterr().err
