"""Profiles, kinematics, the model of real arms, and what leaves for the controllers."""

import math
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
from conftest import shared_data
from scipy.spatial.transform import Rotation

from hardware.ros2.contract import NODE_TOPICS, message_type, robot_topics
from hardware.ros2.joints import JointModel, kinematics_of, make_model, near
from hardware.ros2.kinematics import DHKinematics
from hardware.ros2.outputs import Outputs
from hardware.ros2.profile import POSE, Chain, RosProfile, load_profile, profile_names
from hardware.ros2.runtime import RosClock
from robopolicy.config import parse
from robopolicy.deploy.home import HomeSource
from robopolicy.deploy.limits import load_limits
from robopolicy.deploy.safety import SafetyFilter
from robopolicy.deploy.workspace import Workspace
from robopolicy.errors import ConfigError
from robopolicy.robot import Measured
from sim.arm import model as arm

SIMULATED = ("panda", "virtual", "virtual_arm_pusht", "virtual_reach", "virtual_stack")
PROFILES = ("fr3", "so101", "ur5e", "xarm6", "xarm7", *SIMULATED)
LIMITS: dict[str, Any] = {
    "coordinates": [{"name": n, "lower": -2.0, "upper": 2.0, "velocity": 1.0, "acceleration": 5.0, "jerk": 50.0} for n in "ab"]
}
TWO: dict[str, Any] = {
    "limits": LIMITS,
    "state": {"joints": {"a": "ja", "b": "jb"}},
    "command": {"joints": ["b", "a"]},
    "home": {"a": 0.5, "b": -0.5},
}
TOOL: dict[str, Any] = {
    "limits": {"coordinates": [{**LIMITS["coordinates"][0], "name": name, "lower": -7.0, "upper": 7.0} for name in POSE]},
    "state": {"type": "pose", "topic": "current_pose"},
    "command": {"type": "pose", "topic": "target_pose", "joints": list(POSE), "frame": "base"},
}


def profile(base: dict[str, Any] = TWO, **changes: Any) -> RosProfile:
    return parse(RosProfile, {**base, **changes}, where="profile")


# ---- profiles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_whole(name: str) -> None:
    """Limits, model, kinematics and home fit together, and home is inside."""
    found = load_profile(name)
    model = make_model(found)
    assert tuple(model.names) == found.safety.names == found.names
    SafetyFilter(found.safety, model.kinematics)
    home = found.home_positions
    assert home is not None
    HomeSource(home, found.safety)  # raises outside of the limits
    if found.safety.workspace is not None:
        assert model.kinematics is not None
        assert Workspace(found.safety.workspace, model.kinematics).outside(home)[1] == 0.0
    assert found.safety.rate == found.rate
    assert found.description
    for topic in (*robot_topics(found), *NODE_TOPICS):
        assert topic.name.startswith(("~/", "/diagnostics")) or topic.name[0] != "/"
        message_type(topic.type)
        topic.quality.to_ros()


def test_every_profile_says_where_its_numbers_come_from() -> None:
    assert profile_names() == sorted(PROFILES)
    for name in set(PROFILES) - set(SIMULATED):
        text = (Path(message_type.__code__.co_filename).parent / "profiles" / f"{name}.yaml").read_text()
        assert "NOT RUN on a real arm" in text
        assert "kinematics" in text
        assert "velocities" in text


def test_a_rate_that_is_asked_for_makes_no_controller_faster() -> None:
    with pytest.raises(ConfigError, match=r"make it 0\.04 or more, or the rate 50 or more"):
        load_profile("fr3", rate=25.0)
    assert load_profile("fr3", rate=50.0).safety.rate == 50.0


def test_the_virtual_profile_is_our_arm() -> None:
    found = load_profile("virtual")
    assert found.home_positions is not None
    np.testing.assert_allclose(found.home_positions[:7], arm.home(), atol=1e-4)
    assert found.safety == load_limits("arm", rate=found.rate)
    assert found.joint_names == (*arm.JOINT_NAMES, "left_finger", "right_finger")


def test_qualities_are_those_that_controllers_and_drivers_match() -> None:
    """Best effort hears reliable publishers too; a controller's reliable subscription hears nothing of a best-effort one."""
    for topic in robot_topics(load_profile("virtual")):
        assert topic.quality.reliable == (topic.key in ("command", "gripper", "success")), topic
        assert topic.quality.depth == 1
    assert {t.key for t in robot_topics(load_profile("virtual"), ["cube"])} == {
        "state",
        "input.cube",
        "command",
        "gripper",
        "success",
    }


def test_a_permit_is_a_topic_of_its_own_and_may_be_switched_off(tmp_path: Path) -> None:
    (topic,) = (topic for topic in robot_topics(load_profile("ur5e")) if topic.key == "permit.program")
    assert (topic.name, topic.direction) == ("io_and_status_controller/robot_program_running", "in")
    assert topic.quality.latched
    (tmp_path / "mock.yaml").write_text("{base: ur5e, permits: null}")
    assert "permit.program" not in [topic.key for topic in robot_topics(load_profile(tmp_path / "mock.yaml"))]
    (tmp_path / "safe.yaml").write_text("{base: ur5e, permits: {safety: {topic: permits/safety, latched: false}}}")
    topics = {topic.key: topic.quality for topic in robot_topics(load_profile(tmp_path / "safe.yaml"))}
    assert topics["permit.program"].latched
    assert not topics["permit.safety"].latched
    assert not topics["permit.safety"].reliable  # hears publishers of any quality


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"permits": {"on": {"topic": "on", "latch": True}}}, "unknown key 'permits.on.latch'"),
        ({"command": {"type": "velocity", "joints": ["a", "b"]}}, "unsafe_velocity: true"),
        ({"command": {"type": "twist", "joints": list(POSE)}}, "unsafe_velocity: true"),
        ({"command": {"type": "pose", "joints": ["a", "b"]}}, "commands x, y, z, rx, ry, rz"),
        ({"command": {"joints": ["a"]}}, "command and gripper take a; the limits are for a, b"),
        ({"state": {"joints": {"a": "ja"}}}, "state.joints gives a; the limits are for a, b"),
        ({"state": {"joints": {"a": "ja", "b": "ja"}}}, "a joint occurs twice"),
        ({"state": {"joints": {"a": "ja", "b": {"names": ["jb"], "scale": 0.0}}}}, "scale is 0"),
        ({"state": {"type": "fk", "joints": {"a": "ja", "b": "jb"}}}, "needs 'kinematics'"),
        ({"home": {"a": 0.0}}, "home gives a"),
        ({"limits": "arms"}, "did you mean 'arm'?"),
        ({"comand": {}}, "did you mean 'command'?"),
        ({"command": {"type": "trajectory", "joints": ["a", "b"], "duration": 0.02}, "rate": 25.0}, "faster than the limits"),
        ({"rate": 20.0}, "longer than freshness.gap"),
        (
            {
                "command": {"type": "trajectory", "joints": ["a", "b"]},
                "state": {"joints": {"a": "ja", "b": {"names": ["l", "r"]}}},
            },
            "one joint",
        ),
    ],
)
def test_a_profile_that_does_not_fit_says_why(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        profile(**changes)


def test_profiles_are_found_by_name_and_file_and_may_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'ur5e'"):
        load_profile("ur5")
    assert load_profile("virtual", rate=250.0).safety.rate == 250.0
    import yaml

    (tmp_path / "limits.yaml").write_text(yaml.safe_dump(LIMITS))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TWO, "limits": "limits.yaml"}))
    assert load_profile(tmp_path / "mine.yaml").names == ("a", "b")  # limits beside the profile
    (tmp_path / "base.yaml").write_text("{base: mine.yaml, rate: 50.0, state: {topic: my/joint_states}, home: null}")
    other = load_profile(tmp_path / "base.yaml")
    assert (other.rate, other.state.topic, other.home) == (50.0, "my/joint_states", None)
    assert other.state.joints == load_profile(tmp_path / "mine.yaml").state.joints


# ---- kinematics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fr3", "panda", "ur5e", "xarm6", "xarm7"])
def test_jacobians_are_the_derivatives_and_levers_bound_them(name: str) -> None:
    found = load_profile(name)
    kinematics = kinematics_of(found)
    assert isinstance(kinematics, DHKinematics)
    n, rng, step = len(found.names), np.random.default_rng(0), 1e-6
    assert kinematics.levers is not None
    for _ in range(20):
        q = rng.uniform(-2.5, 2.5, n)
        differences = np.stack(
            [(kinematics.points(q + step * e).copy() - kinematics.points(q - step * e)) / (2 * step) for e in np.eye(n)], axis=-1
        )
        kinematics.points(q)
        np.testing.assert_allclose(kinematics.jacobians(), differences, atol=1e-7)
        assert (np.linalg.norm(differences, axis=1) <= kinematics.levers + 1e-9).all()


def test_ur5e_reaches_as_its_makers_drawing_says() -> None:
    """Stretched upwards: 0.1625 + 0.425 + 0.3922 + 0.0997 high, 0.1333 + 0.0996 beside the axis, in front of base_link's -y."""
    kinematics = kinematics_of(load_profile("ur5e"))
    assert kinematics is not None
    tool = kinematics.points(np.array([0.0, -math.pi / 2, 0.0, -math.pi / 2, 0.0, 0.0]))[0]
    np.testing.assert_allclose(tool, [0.0, 0.1333 + 0.0996, 0.1625 + 0.425 + 0.3922 + 0.0997], atol=1e-6)


def test_xarm7_is_where_another_model_of_it_says() -> None:
    model = mujoco.MjModel.from_xml_path(str(shared_data("mjcf_arms") / "ufactory_xarm7" / "xarm7_nohand.xml"))
    data = mujoco.MjData(model)
    kinematics = kinematics_of(load_profile("xarm7"))
    assert kinematics is not None
    rng = np.random.default_rng(1)
    for _ in range(10):
        q = rng.uniform(-1.5, 1.5, 7)
        data.qpos[:7] = q
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(kinematics.points(q)[0], data.body("link7").xpos, atol=2e-4)


def test_the_two_conventions_agree_on_one_arm() -> None:
    """A modified row's a and alpha come before the joint, a standard one's behind it: shift them by one."""
    rows = [(0.1, 0.3, 0.2, 0.1), (-0.2, -1.0, 0.1, 0.0), (0.3, 0.5, -0.1, 0.4)]
    standard = DHKinematics(Chain(convention="standard", rows=tuple(rows)))
    shifted = [(0.0, 0.0, *rows[0][2:]), (*rows[0][:2], *rows[1][2:]), (*rows[1][:2], *rows[2][2:])]
    tool = (rows[2][0], 0.0, 0.0)  # what the last row adds
    modified = DHKinematics(Chain(convention="modified", rows=tuple(shifted), tool=tool))
    q = np.array([0.3, -0.7, 1.1])
    np.testing.assert_allclose(standard.points(q), modified.points(q), atol=1e-12)
    position, rotation = standard.pose(q)
    np.testing.assert_allclose(position, standard.points(q)[0])
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)


def test_a_chain_that_does_not_fit_is_refused() -> None:
    row = (0.1, 0.0, 0.1, 0.0)
    with pytest.raises(ConfigError, match="2 rows for 1 coordinates"):
        DHKinematics(Chain(convention="standard", rows=(row, row)), 1)
    with pytest.raises(ConfigError, match="point 'elbow' is in frame 3; frames are 1 to 2"):
        DHKinematics(Chain(convention="standard", rows=(row, row), points={"elbow": (3, 0.0, 0.0, 0.0)}))


# ---- the model ---------------------------------------------------------------------------------------------------------------


def test_a_joint_model_sees_joints_tool_and_inputs() -> None:
    row = [0.5, 0.0, 0.0, 0.0]
    camera = {"type": "image", "topic": "eye", "resize": [8, 10]}
    found = profile(
        kinematics={"convention": "standard", "rows": [row, row]}, inputs={"eye": camera, "cube": {"type": "pose", "topic": "c"}}
    )
    model = JointModel(found, rate=10.0)
    picture, cube = np.zeros((8, 10, 3), np.uint8), np.array([1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 1.0])
    values = model.observe(Measured(np.array([0.0, math.pi / 2]), np.array([1.0, 2.0]), {"eye": picture, "cube": cube}))
    assert {name: value.shape for name, value in values.items()} == {n: f.shape for n, f in model.observation_features.items()}
    np.testing.assert_allclose(values["ee_pos"], [0.5, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(values["ee_rot6d"], [0, 1, 0, -1, 0, 0], atol=1e-6)
    assert values["eye"].dtype == np.uint8
    assert values["qpos"].dtype == np.float32
    assert model.action_feature.rate == 10.0
    assert model.action_feature.names == ("a", "b")
    np.testing.assert_array_equal(model.targets(np.array([0.1, 0.2])), [0.1, 0.2])
    with pytest.raises(ConfigError, match="input 'eye' of the profile has no size"):
        JointModel(profile(inputs={"eye": {"type": "image", "topic": "eye"}}))


def test_poses_are_commanded_as_rot6d_and_their_rotation_vectors_do_not_jump() -> None:
    model = JointModel(profile(TOOL))
    model.reset(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 3.0]))
    last = 3.0
    for angle in np.linspace(3.0, 3.6, 30):  # through half a turn
        action = model.action_of(np.array([0.1, 0.2, 0.3, 0.0, 0.0, angle]))
        assert action.shape == (9,)
        target = model.targets(action)
        np.testing.assert_allclose(target, [0.1, 0.2, 0.3, 0.0, 0.0, angle], atol=1e-9)
        assert abs(target[5] - last) < 0.1
        last = target[5]
    assert np.isnan(model.targets(np.full(9, np.nan))).any()  # the safety filter sees it, and the next target is sound
    np.testing.assert_allclose(model.targets(action), target)


def test_rotation_vectors_are_taken_near_the_last_one() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        other = rng.normal(size=3) * rng.uniform(0, 4)
        rotation = Rotation.from_rotvec(other) * Rotation.from_rotvec(rng.normal(size=3) * 0.01)
        found = near(rotation.as_rotvec(), other)
        assert (Rotation.from_rotvec(found).inv() * rotation).magnitude() < 1e-9
        if 0.5 < np.linalg.norm(other) < 5.0:  # not where all axes are one rotation
            assert np.linalg.norm(found - other) < 0.2


def test_a_model_that_takes_a_task_is_set_in_the_policys() -> None:
    lift = make_model(load_profile("virtual"), "lift", {"obs": ["ee_pos", "cube_pos"]})
    assert set(lift.observation_features) == {"ee_pos", "cube_pos"}
    assert "cube" in lift.inputs
    reach = make_model(load_profile("virtual_reach"), "reach")
    assert "goal_pos" in reach.observation_features
    with pytest.raises(ConfigError, match="needs input 'goal'"):
        make_model(load_profile("virtual"), "reach")
    with pytest.raises(ConfigError, match="robot model"):
        make_model(profile(model={"factory": "sim.arm.robot:Nobody"}))
    with pytest.raises(ConfigError, match="coordinates joint1"):
        make_model(profile(model={"factory": "sim.arm.robot:ArmModel"}))
    with pytest.raises(ConfigError, match=r"check model\.args"):
        make_model(profile(model={"args": {"speed": 3}}))


# ---- outputs -----------------------------------------------------------------------------------------------------------------


class Sent(list[Any]):
    """A publisher."""

    def publish(self, message: Any) -> None:
        self.append(message)


def outputs(found: RosProfile) -> tuple[Outputs, Sent, Sent]:
    command, gripper = Sent(), Sent()
    return Outputs(found, RosClock(), command.publish, gripper.publish if found.gripper else None), command, gripper


def test_positions_leave_in_the_controllers_order_and_units() -> None:
    found = profile(state={"joints": {"a": {"names": ["ja"], "scale": 0.1, "offset": 1.0}, "b": "jb"}})
    out, command, _ = outputs(found)
    out.send(np.array([1.5, 0.25]), None)
    np.testing.assert_allclose(command[0].data, [0.25, 5.0])  # b first; a = 1 + 0.1 ja


def test_trajectories_name_the_joints() -> None:
    out, command, _ = outputs(profile(command={"type": "trajectory", "joints": ["b", "a"], "duration": 0.04}))
    out.send(np.array([1.0, 2.0]), None)
    assert list(command[0].joint_names) == ["jb", "ja"]
    assert list(command[0].points[0].positions) == [2.0, 1.0]
    assert command[0].points[0].time_from_start.nanosec == 40_000_000


def test_poses_leave_as_quaternions() -> None:
    out, command, _ = outputs(profile(TOOL))
    out.send(np.array([0.1, 0.2, 0.3, 0.0, 0.0, math.pi / 2]), None)
    q = command[0].pose.orientation
    np.testing.assert_allclose([q.x, q.y, q.z, q.w], [0, 0, math.sqrt(0.5), math.sqrt(0.5)], atol=1e-12)
    assert command[0].header.frame_id == "base"


def test_velocities_end_in_zero() -> None:
    """On a stop, and when commands no longer come; and measurements that are old do not drive the arm."""
    found = profile(rate=100.0, command={"type": "velocity", "joints": ["a", "b"], "unsafe_velocity": True, "gain": 2.0})
    out, command, _ = outputs(found)
    out.send(np.array([0.0, 0.0]), np.array([0.0, 0.0]))
    out.send(np.array([0.004, 0.0]), np.array([0.0, 0.1]))
    np.testing.assert_allclose(command[-1].data, [0.4 + 2.0 * 0.004, -0.2], atol=1e-9)
    out.send(np.array([0.004, 0.0]), None)
    np.testing.assert_allclose(command[-1].data, [0.0, 0.0])
    out.send(np.array([0.02, 0.0]), None)
    count = len(command)
    out.watch()
    assert len(command) == count  # a command has just come
    out._sent_at -= 1.0
    out.watch()
    np.testing.assert_allclose(command[-1].data, [0.0, 0.0])
    assert len(command) == count + 1
    out.watch()
    assert len(command) == count + 1  # once
    out.send(np.array([0.5, 0.0]), None)
    np.testing.assert_allclose(command[-1].data, [0.0, 0.0])  # no jump from before the silence
    out.stop()
    np.testing.assert_allclose(command[-1].data, [0.0, 0.0])


def test_the_zero_is_said_once_and_by_who_moved_the_arm() -> None:
    """Whoever commands it then would be stopped by another."""
    out, command, _ = outputs(profile(command={"type": "velocity", "joints": ["a", "b"], "unsafe_velocity": True, "gain": 0.0}))
    out.stop()
    assert command == []
    for position in (0.0, 0.001):
        out.send(np.array([position, 0.0]), None)
    broken, out._command = out._command, lambda message: 1 / 0
    with pytest.raises(ZeroDivisionError):
        out.stop()
    out._command = broken
    out.stop()
    assert list(command[-1].data) == [0.0, 0.0], "what could not be sent is sent then"
    for again in (out.stop, out.watch, out.close):
        again()
        assert len(command) == 3


def test_no_correction_is_faster_than_the_limits_or_drives_an_arm_back_that_was_moved() -> None:
    """It is added behind the safety filter."""
    found = profile(rate=100.0, command={"type": "velocity", "joints": ["a", "b"], "unsafe_velocity": True, "gain": 20.0})
    out, command, _ = outputs(found)
    for _ in range(2):
        out.send(np.zeros(2), np.array([0.1, -0.01]))
    np.testing.assert_allclose(command[-1].data, [-0.5, 0.2])  # half of 1.0: the scale of the limits
    for moved in (1.9, np.nan):  # while it stood: by hand, with the drives off
        out.send(np.zeros(2), np.array([moved, -0.01]))
        np.testing.assert_allclose(command[-1].data, [0.0, 0.0])


def test_nothing_follows_the_zero_of_the_end() -> None:
    """A control thread that is still at work while the robot is let go of: a second Ctrl-C."""
    out, command, _ = outputs(profile(command={"type": "velocity", "joints": ["a", "b"], "unsafe_velocity": True, "gain": 0.0}))
    for position in (0.0, 0.001):
        out.send(np.array([position, 0.0]), None)
    assert command[-1].data[0] > 0
    out.close()
    count = len(command)
    out.send(np.array([0.002, 0.0]), None)
    out.stop()
    out.watch()
    assert len(command) == count
    np.testing.assert_array_equal(command[-1].data, [0.0, 0.0])


def test_twists_are_of_the_base_frame_and_end_in_zero() -> None:
    command_ = {"type": "twist", "joints": list(POSE), "unsafe_velocity": True, "gain": 0.0, "frame": "base"}
    out, command, _ = outputs(profile(TOOL, rate=100.0, command=command_))
    out.send(np.array([0, 0, 0, 0, 0, math.pi / 2]), None)
    out.send(np.array([0.004, 0, 0, 0, 0, math.pi / 2 + 0.006]), None)
    twist = command[-1].twist
    np.testing.assert_allclose(
        [twist.linear.x, twist.linear.y, twist.angular.x, twist.angular.z], [0.4, 0.0, 0.0, 0.6], atol=1e-6
    )
    out.stop()
    assert command[-1].twist.linear.x == 0.0


def test_a_gripper_hears_of_changes_only_and_of_where_they_end() -> None:
    grip = {**LIMITS["coordinates"][0], "name": "width", "unit": "m", "lower": 0.0, "upper": 0.1, "margin": 0.0}
    found = profile(
        limits={"coordinates": [*LIMITS["coordinates"], grip]},
        state={"joints": {"a": "ja", "b": "jb", "width": {"names": ["l", "r"]}}},
        gripper={"coordinate": "width", "hysteresis": 0.01, "scale": 0.001},
        home=None,
    )
    out, _, gripper = outputs(found)
    for width in [0.05, 0.052, 0.055, 0.058, 0.058, 0.058, 0.02, 0.02]:
        out.send(np.array([0.0, 0.0, width]), None)
    assert [round(m.data) for m in gripper] == [50, 58, 20]  # in the driver's millimetres
