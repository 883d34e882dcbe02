"""SparseReach: the same model as Reacher-v5, its reward, its expert, its speed."""

from __future__ import annotations

import time

import gymnasium
import gymnasium.utils.env_checker
import numpy as np
import pytest

from robopolicy.errors import TaskError
from robopolicy.task import TaskSpec, find_task
from sim.reacher import SparseReach, reaching
from sim.render import mujoco


@pytest.fixture(scope="module")
def task() -> SparseReach:
    return SparseReach(render_size=64)


def tip(task: SparseReach) -> np.ndarray:
    """Position [m] of the fingertip by MuJoCo's own kinematics."""
    mujoco.mj_kinematics(task._model, task._data)
    return task._data.body("fingertip").xpos[:2].copy()


def test_seeds_and_steps_are_those_of_reacher_v5(task: SparseReach) -> None:
    peer, rng = gymnasium.make("Reacher-v5").unwrapped, np.random.default_rng(0)
    for seed in range(3):
        task.reset(seed=seed)
        peer.reset(seed=seed)
        for _ in range(48):
            np.testing.assert_array_equal(task.joints, peer.data.qpos[:2])
            np.testing.assert_array_equal(task.target, peer.data.qpos[2:])
            np.testing.assert_array_equal(task.joint_vel, peer.data.qvel[:2])
            action = rng.uniform(-1, 1, 2)
            observation = task.step(action)[0]
            theirs = peer.step(action)[0]
            np.testing.assert_allclose(observation["joint_cos_sin"], theirs[:4], rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(observation["target_pos"], theirs[4:6], rtol=1e-6)
            np.testing.assert_allclose(observation["joint_vel"], theirs[6:8], rtol=1e-6, atol=1e-6)


def test_observations_and_actions_are_as_declared(task: SparseReach) -> None:
    observation, info = task.reset(seed=0)
    assert info == {"is_success": False}
    assert list(observation) == list(task.observation_features)
    assert sum(feature.size for feature in task.observation_features.values()) == 8
    for name, feature in task.observation_features.items():
        assert observation[name].shape == feature.shape
        assert observation[name].dtype == feature.dtype
        assert feature.unit
        assert feature.rate == task.rate
    assert task.action_feature.unit == "1"
    assert find_task("sparse_reach") is SparseReach
    gymnasium.utils.env_checker.check_env(SparseReach(), skip_render_check=True)


def test_same_seed_and_actions_give_the_same_episode_to_the_bit(task: SparseReach) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (48, 2))

    def play(task: SparseReach, seed: int) -> np.ndarray:
        start = task.reset(seed=seed)[0]
        steps = [task.step(action)[0] for action in actions]
        return np.array([np.concatenate(list(observation.values())) for observation in [start, *steps]])

    first = play(task, 7)
    play(task, 8)  # something else in between leaves no trace
    np.testing.assert_array_equal(first, play(task, 7))
    np.testing.assert_array_equal(first, play(SparseReach(), 7))
    assert not np.array_equal(first[0], play(task, 9)[0])


def test_reward_counts_the_steps_within_two_centimetres_and_success_needs_four_in_a_row(task: SparseReach) -> None:
    """At rest on the target; then thrown off it; and the episode goes on to its limit."""
    task.reset(seed=0)
    task._qpos[:2], task._qvel[:] = reaching(task.target)[0], 0.0
    outcomes = []
    for i in range(48):
        _, reward, terminated, truncated, info = task.step(np.zeros(2) if i < 6 else np.ones(2))
        away = float(np.hypot(*(tip(task) - task.target)))
        assert task.distance == pytest.approx(away, abs=1e-9)
        assert reward == float(away <= 0.02)
        assert not terminated
        assert truncated == (i == 47)
        outcomes.append(info["is_success"])
    assert outcomes[:6] == [False] * 3 + [True] * 3
    assert not any(outcomes[12:16])


def test_both_joint_configurations_reach_the_target(task: SparseReach) -> None:
    for seed in range(50):
        task.reset(seed=seed)
        for joints in reaching(task.target):
            task._qpos[:2] = joints
            assert task.distance < 1e-6 or np.hypot(*task.target) < 0.02  # nearer the elbow's limit is in the way


@pytest.mark.parametrize(("noise", "least"), [(0.0, 40), (1.0, 36), (2.0, 28)])
def test_the_expert_succeeds_less_often_with_more_noise(task: SparseReach, noise: float, least: int) -> None:
    successes = 0
    for seed in range(40):
        task.reset(seed=seed)
        expert = task.expert(np.random.default_rng(seed), noise)
        over = success = False
        while not over:
            action = expert.act()
            assert task.action_space.contains(action)
            _, _, _, over, info = task.step(action)
            success |= info["is_success"]
        successes += success
    assert successes >= least


@pytest.mark.parametrize("action", [np.zeros(3), np.array([0.0, np.nan])])
def test_bad_actions_are_refused(task: SparseReach, action: np.ndarray) -> None:
    task.reset(seed=0)
    with pytest.raises(TaskError, match="expected two finite shares of the torque"):
        task.step(action)


def test_it_steps_fast(task: SparseReach) -> None:
    """8000 steps per second of CPU time, which a busy machine does not touch; 40000 were measured."""
    task.reset(seed=0)
    action, count = np.array([0.1, -0.1]), 3000
    started = time.process_time()
    for _ in range(count):
        task.step(action)
    assert count / (time.process_time() - started) > 8000


@pytest.mark.usefixtures("renderer")
def test_it_draws_arm_and_target() -> None:
    task = TaskSpec("sparse_reach", {"render_size": 64}).make()
    task.reset(seed=0)
    frame = task.render()
    assert frame.shape == (64, 64, 3)
    for _ in range(20):
        task.step(np.array([0.3, 0.3]))
    assert np.abs(task.render().astype(int) - frame).max() > 50  # the arm moved in it
    task.close()
