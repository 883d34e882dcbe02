"""Intercept: its rules, its expert with both ways around, its speed."""

from __future__ import annotations

import math
import time

import gymnasium.utils.env_checker
import numpy as np
import pytest

from robopolicy.errors import TaskError
from robopolicy.task import TaskSpec, find_task
from sim.intercept import PILLAR, RATE, RING, Intercept, InterceptExpert


def play(task: Intercept, expert: InterceptExpert) -> tuple[bool, bool]:
    """Whether the episode succeeded, and whether it ended by itself."""
    while True:
        action = expert.act()
        assert task.action_space.contains(action)
        _, _, terminated, truncated, info = task.step(action)
        if terminated or truncated:
            return info["is_success"], terminated


def test_observations_are_as_declared_and_units_are_right() -> None:
    task = Intercept()
    before, info = task.reset(seed=0)
    assert info == {"is_success": False}
    assert find_task("intercept") is Intercept
    gymnasium.utils.env_checker.check_env(Intercept(), skip_render_check=True)
    for _ in range(5):
        after, reward, *_ = task.step(np.array([0.0, 0.9]))
        assert reward == 0
        for name in ("agent", "target"):
            np.testing.assert_allclose(after[f"{name}_pos"] - before[f"{name}_pos"], after[f"{name}_vel"] / RATE, atol=1e-3)
        assert np.hypot(*after["target_pos"]) == pytest.approx(RING, rel=1e-5)
        before = after
    assert [task.observation_features[n].unit for n in before] == ["m", "m/s", "m", "m/s"]
    assert all(before[n].dtype == np.float32 and before[n].shape == (2,) for n in before)


def test_same_seed_and_actions_give_the_same_episode_and_the_target_turns() -> None:
    actions = np.random.default_rng(0).uniform(-0.9, 0.9, (200, 2))

    def run(task: Intercept, seed: int) -> np.ndarray:
        task.reset(seed=seed)
        return np.array([np.concatenate(list(task.step(action)[0].values())) for action in actions])

    task = Intercept()
    first = run(task, 3)
    run(task, 4)
    np.testing.assert_array_equal(first, run(task, 3))
    assert not np.array_equal(first, run(task, 4))
    turns = np.sign(first[:, 4] * first[:, 7] - first[:, 5] * first[:, 6])  # of the target around the pillar
    assert 2 <= (np.diff(turns) != 0).sum() <= 10


def test_three_catches_succeed_and_the_pillar_ends_it() -> None:
    task = Intercept()
    task.reset(seed=0)
    rewards, info = [], {"is_success": False}
    for caught in range(3):
        for _ in range(3):
            assert not info["is_success"]
            task.agent, task.agent_vel = task.target, (0.0, 0.0)
            _, reward, terminated, _, info = task.step(np.array(task.target))
            rewards.append(reward)
        assert reward == pytest.approx((caught + 1) / 3)
        if caught < 2:
            assert task.distance > 0.9  # it appeared on the other side
    assert info["is_success"]
    assert terminated
    task.reset(seed=0)
    task.agent = (PILLAR + 0.02, 0.0)
    for _ in range(5):
        _, _, terminated, _, info = task.step(np.zeros(2))
        if terminated:
            break
    assert terminated
    assert not info["is_success"]


def test_time_runs_out() -> None:
    task = Intercept(max_episode_steps=7)
    task.reset(seed=0)
    ends = [task.step(np.array([0.9, 0.9]))[2:4] for _ in range(7)]
    assert ends == [(False, False)] * 6 + [(False, True)]


def test_speed_and_acceleration_are_limited() -> None:
    task = Intercept()
    task.reset(seed=0)
    before = np.zeros(2)
    for k in range(60):
        obs = task.step(np.array([1.0, 1.0]) if k < 30 else np.array([-1.0, 1.0]))[0]
        assert np.hypot(*obs["agent_vel"]) <= 0.7 + 1e-6
        assert np.hypot(*(obs["agent_vel"] - before)) <= 4.0 / RATE + 1e-6
        before = obs["agent_vel"]


@pytest.mark.parametrize(("noise", "least"), [(0.0, 50), (0.7, 46)])
def test_the_expert_succeeds(noise: float, least: int) -> None:
    task, successes = Intercept(), 0
    for seed in range(50):
        task.reset(seed=seed)
        successes += play(task, task.expert(np.random.default_rng(seed), noise))[0]
    assert successes >= least


def test_from_opposite_the_expert_passes_on_either_side_and_from_the_side_on_the_nearer() -> None:
    def side(offset: float, draw: int) -> int:
        task = Intercept()
        task.reset(seed=0)
        task.agent, task.agent_vel, task.bearing, task.turning, task._until_turn = (-0.9, 0.0), (0.0, 0.0), offset, 0.0, 10**6
        expert = task.expert(np.random.default_rng(draw))
        while math.hypot(*task.agent) > 0.45:
            task.step(expert.act())
        return 1 if task.agent[1] > 0 else -1

    straight = [side(0.0, draw) for draw in range(40)]
    assert 10 <= straight.count(1) <= 30
    assert all(side(0.9, draw) == 1 for draw in range(20))
    assert all(side(-0.9, draw) == -1 for draw in range(20))


@pytest.mark.parametrize("action", [np.zeros(3), np.array([0.0, np.nan])])
def test_bad_actions_are_refused(action: np.ndarray) -> None:
    task = Intercept()
    task.reset(seed=0)
    with pytest.raises(TaskError, match="expected a finite position"):
        task.step(action)


def test_it_steps_fast() -> None:
    """20000 steps per second of CPU time; 130000 were measured."""
    task, count = Intercept(max_episode_steps=10**6), 4000
    task.reset(seed=0)
    action = np.array([0.6, 0.6])
    started = time.process_time()
    for _ in range(count):
        task.step(action)
    assert count / (time.process_time() - started) > 20_000


def test_it_draws_agent_target_and_pillar() -> None:
    task = TaskSpec("intercept", {"render_size": 96}).make()
    task.reset(seed=0)
    before = task.render()
    assert before.shape == (96, 96, 3)
    assert before.dtype == np.uint8
    assert (before[48, 48] == 120).all()
    for _ in range(20):
        task.step(np.array([0.9, 0.9]))
    assert (task.render() != before).any()
