"""Worlds that stand in for an arm: what they measure, keep and record."""

import numpy as np
import pytest

from robopolicy.deploy.clock import FakeClock
from robopolicy.errors import TaskError
from robopolicy.robot import Measured
from sim.arm.robot import ArmModel, SimArm
from sim.arm.task import ArmTask


@pytest.mark.parametrize("name", ["reach", "lift", "stack", "arm_pusht"])
def test_what_is_measured_is_observed_as_the_task_observes_it_to_the_bit(name: str) -> None:
    robot, model = SimArm(name, FakeClock(0.0)), ArmModel(name)
    task = robot.task
    rng = np.random.default_rng(0)
    for seed in range(3):
        obs, _ = task.reset(seed=seed)
        for _ in range(10):
            measured = Measured(task.positions, task.velocities, task.poses())
            assert_equal(model.observe(measured), obs)
            obs, *_ = task.step(rng.uniform(task.action_space.low, task.action_space.high))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def test_a_missing_pose_or_picture_is_named() -> None:
    still = np.zeros(8)
    with pytest.raises(TaskError, match="input 'cube' is missing; found cup"):
        ArmModel("lift").observe(Measured(still, still, {"cup": np.zeros(7)}))
    seeing = ArmModel("lift", obs=("qpos", "image"), image_size=32)
    with pytest.raises(TaskError, match=r"'front' must have shape \(32, 32, 3\), found \(16, 16, 3\)"):
        seeing.observe(Measured(still, still, {"front": np.zeros((16, 16, 3), np.uint8)}))
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    assert (seeing.observe(Measured(still, still, {"front": picture}))["image"] == picture).all(), "needs no poses"


def test_other_tasks_are_not_of_the_arm() -> None:
    with pytest.raises(TaskError, match="task 'pusht' is not one of our arm"):
        ArmModel("pusht")


def test_a_robot_follows_its_targets_and_actions_are_searched_from_where_it_was_reset() -> None:
    clock = FakeClock(0.0)
    robot = SimArm("lift", clock)
    robot.reset(100_000)
    assert isinstance(robot.task, ArmTask)
    here = robot.state().positions
    action = np.array([*(robot.task.ee_pos + np.array([0.0, 0.02, 0.0])), 0.0, 0.05])
    targets = [robot.targets(action) for _ in range(5)][-1]
    assert np.abs(targets[:7] - here[:7]).max() < 0.2
    robot.command(targets)
    clock.time += 1.0
    assert robot.state().positions == pytest.approx(targets, abs=2e-3)
    assert robot.task.ee_pos == pytest.approx(action[:3], abs=2e-3)
