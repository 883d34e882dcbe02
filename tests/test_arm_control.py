"""Kinematics of the arm against MuJoCo and against themselves; servos that track."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.arm import model as arm
from sim.arm.control import Kinematics, Servo, down_quat_wxyz
from sim.arm.lift import Lift
from sim.render import mujoco

KINEMATICS = Kinematics()
MODEL = mujoco.MjModel.from_xml_string(arm.scene())

joint_angles = st.lists(st.floats(0.05, 0.95), min_size=7, max_size=7).map(
    lambda s: arm.LOWER + np.array(s) * (arm.UPPER - arm.LOWER)
)


@given(q=joint_angles)
@settings(max_examples=30, deadline=None)
def test_forward_kinematics_agree_with_the_simulated_arm(q: np.ndarray) -> None:
    data = mujoco.MjData(MODEL)
    data.qpos[:7] = q
    mujoco.mj_forward(MODEL, data)
    pos, rotation = KINEMATICS.forward(q)
    assert pos == pytest.approx(data.site("ee").xpos, abs=1e-12)
    assert rotation == pytest.approx(data.site("ee").xmat.reshape(3, 3), abs=1e-12)


@given(q=joint_angles)
@settings(max_examples=20, deadline=None)
def test_jacobian_is_the_derivative_of_forward_kinematics(q: np.ndarray) -> None:
    KINEMATICS.forward(q)
    jacobian = KINEMATICS.jacobian().copy()
    step = 1e-6
    for i in range(7):
        moved = q.copy()
        moved[i] += step
        after, turned = (a.copy() for a in KINEMATICS.forward(moved))
        before, straight = KINEMATICS.forward(q)
        assert (after - before) / step == pytest.approx(jacobian[:3, i], abs=1e-5)
        spin = (turned @ straight.T - np.eye(3)) / step  # skew matrix of the angular velocity
        assert [spin[2, 1], spin[0, 2], spin[1, 0]] == pytest.approx(jacobian[3:, i], abs=1e-5)


@given(x=st.floats(0.32, 0.62), y=st.floats(-0.28, 0.28), z=st.floats(0.02, 0.36), yaw=st.floats(-1.5, 1.5))
@settings(max_examples=40, deadline=None)
def test_inverse_kinematics_reach_the_whole_workspace(x: float, y: float, z: float, yaw: float) -> None:
    q = KINEMATICS.inverse(arm.home(), np.array([x, y, z]), down_quat_wxyz(yaw), iterations=40)
    pos, rotation = KINEMATICS.forward(q)
    assert pos == pytest.approx([x, y, z], abs=1e-3)
    assert rotation[:, 2] == pytest.approx([0.0, 0.0, -1.0], abs=1e-2)
    assert np.arctan2(rotation[1, 0], rotation[0, 0]) == pytest.approx(yaw, abs=1e-2)
    assert np.all((q >= arm.LOWER) & (q <= arm.UPPER))


def test_home_points_the_gripper_down_where_it_says() -> None:
    pos, rotation = KINEMATICS.forward(arm.home(0.5, 0.1))
    assert pos == pytest.approx([0.5, 0.0, 0.1], abs=1e-9)
    assert rotation == pytest.approx(np.diag([1.0, -1.0, -1.0]), abs=1e-9)


def test_a_commanded_pose_moves_in_a_straight_line() -> None:
    servo = Servo(rate=20.0)
    start = servo.kinematics.forward(servo.set_point)[0].copy()
    goal = start + np.array([0.1, 0.15, -0.1])
    direction = (goal - start) / np.linalg.norm(goal - start)
    for _ in range(12):
        servo.set_point = servo.pose_target(goal, 0.3)
        way = servo.kinematics.forward(servo.set_point)[0] - start
        assert np.linalg.norm(way - (way @ direction) * direction) < 2e-3
    assert np.linalg.norm(way - (goal - start)) < 1e-3


def test_the_arm_settles_on_its_command() -> None:
    task = Lift(max_episode_steps=100)
    obs, _ = task.reset(seed=1)
    goal = np.array([0.5, -0.1, 0.2, 0.5, 0.05])
    for _ in range(60):
        obs, *_ = task.step(goal)
    assert obs["ee_pos"] == pytest.approx(goal[:3], abs=1e-3)
    assert obs["gripper_width"][0] == pytest.approx(0.05, abs=1e-3)
    assert np.abs(obs["qvel"]).max() < 1e-3


def test_the_arm_carries_its_rated_payload_within_its_torques() -> None:
    model = mujoco.MjModel.from_xml_string(
        arm.scene(tool='<geom type="sphere" size="0.03" pos="0 0 0.10" mass="3" contype="0" conaffinity="0"/>')
    )
    data = mujoco.MjData(model)
    model.body_gravcomp[model.body("hand").id] = 0.0  # the controller does not know of the payload
    q = KINEMATICS.inverse(arm.home(), np.array([0.6, 0.0, 0.2]), down_quat_wxyz(0.0), iterations=30)
    data.qpos[:7] = data.act[:7] = q
    mujoco.mj_step(model, data, 800)
    assert np.all(np.abs(data.qfrc_actuator[:7]) < 0.9 * arm.EFFORT_LIMIT)
    assert data.qpos[:7] == pytest.approx(q, abs=0.02)
