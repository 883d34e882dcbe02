"""Environments whose step is a chunk: rewards, discounts, endings, windows, and being put back to where they were."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from toys import Dot, Script

from robopolicy.errors import TaskError
from robopolicy.evaluate.run import SEEDS
from robopolicy.features import Feature
from robopolicy.rl.envs import ChunkEnv, RewardConfig, Transition, training_seed
from robopolicy.task import TaskSpec


class Shape:
    """The windows and chunks of a policy, which is all that is asked of it here."""

    def __init__(self, task: type[Dot] | type[Script], n_obs_steps: int, n_action_steps: int) -> None:
        self.observation_features: dict[str, Feature] = {"x": task.observation_features["x"]}
        self.action_feature = task.action_feature
        self.n_obs_steps, self.n_action_steps = n_obs_steps, n_action_steps

    def act(self, *_: Any) -> np.ndarray:
        raise NotImplementedError


def scripted(
    n_obs_steps: int = 1, n_action_steps: int = 3, num_envs: int = 1, reward: RewardConfig | None = None, **task: Any
) -> ChunkEnv:
    return ChunkEnv(
        TaskSpec("toys:Script", task),
        Shape(Script, n_obs_steps, n_action_steps),
        num_envs=num_envs,
        num_workers=0,
        seed=0,
        reward=reward or RewardConfig(),
    )


def dots(num_envs: int = 4, num_workers: int = 0, n_obs_steps: int = 3, source: Literal["task", "best"] = "task") -> ChunkEnv:
    return ChunkEnv(
        TaskSpec("toys:Dot"),
        Shape(Dot, n_obs_steps, 2),
        num_envs=num_envs,
        num_workers=num_workers,
        seed=3,
        reward=RewardConfig(source=source),
    )


def idle(env: ChunkEnv) -> Transition:
    return env.step(np.zeros((env.num_envs, env.n_action_steps, *env.vector.action_feature.shape), np.float32))


def steps(window: np.ndarray) -> list[int]:
    """The step counts in the window of the first environment."""
    return [int(count) for count in window[0, :, 1]]


# --- rewards and discounts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("discounting", "reward", "discount"), [("step", 0.9801, 0.970299), ("chunk", 1.0, 0.99)])
def test_a_chunk_is_discounted_by_its_steps_or_once(
    discounting: Literal["chunk", "step"], reward: float, discount: float
) -> None:
    with scripted(rewards=(0, 0, 1), reward=RewardConfig(discounting=discounting)) as env:
        env.reset()
        transition = idle(env)
    np.testing.assert_allclose([transition.reward[0], transition.discount[0]], [reward, discount], rtol=1e-12)


@pytest.mark.parametrize(("discounting", "reward", "discount"), [("step", 2 + 0.99, 0.9801), ("chunk", 3.0, 0.99)])
def test_what_is_not_executed_does_not_count(discounting: Literal["chunk", "step"], reward: float, discount: float) -> None:
    with scripted(rewards=(2, 1, 5), max_episode_steps=2, reward=RewardConfig(discounting=discounting)) as env:
        env.reset()
        transition = idle(env)
    assert transition.executed.tolist() == [2]
    np.testing.assert_allclose([transition.reward[0], transition.discount[0]], [reward, discount], rtol=1e-12)
    assert transition.ended == [(False, 2.0, 3.0, 2)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [("task", [-2.0 + 0.5 + 0.2, 0.9 + 0.1]), ("success", [1.0, 1.0]), ("best", [0.5, 0.4])],
)
def test_what_a_step_is_worth(source: Literal["task", "success", "best"], expected: list[float]) -> None:
    told = {"rewards": (-2.0, 0.5, 0.2, 0.9, 0.1), "success": (2, 5), "max_episode_steps": 5}
    with scripted(**told, reward=RewardConfig(source=source)) as env:
        env.reset()
        for _ in range(2):  # the second episode starts anew
            worth = [idle(env), idle(env)]
            np.testing.assert_allclose([t.reward[0] for t in worth], expected, atol=1e-12)
    assert worth[0].ended == []
    assert worth[1].ended == [(True, 0.9, pytest.approx(-0.3), 5)]  # whatever the source


def test_the_best_of_an_episode_is_the_sum_of_its_rewards() -> None:
    rng = np.random.default_rng(0)
    with dots(num_envs=1, source="best") as env:
        env.reset()
        total, sums, largest = 0.0, [], []
        while len(sums) < 20:
            transition = env.step(rng.uniform(-1, 1, (1, 2, 2)))
            total += transition.reward[0]
            for ended in transition.ended:
                sums.append(total)
                largest.append(max(0.0, ended.max_reward))
                total = 0.0
    np.testing.assert_allclose(sums, largest, atol=1e-12)


# --- endings and windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_obs_steps", [1, 3])
@pytest.mark.parametrize(("ends", "flags"), [({"terminates": 5}, (True, False)), ({"max_episode_steps": 5}, (False, True))])
def test_what_an_episode_ended_with_is_not_what_the_next_one_begins_with(
    n_obs_steps: int, ends: dict[str, int], flags: tuple[bool, bool]
) -> None:
    with scripted(n_obs_steps, **ends) as env:
        first = env.reset()["x"]
        assert steps(first) == [0] * n_obs_steps
        before = idle(env)
        assert (before.terminated[0], before.truncated[0]) == (False, False)
        assert steps(before.obs["x"]) == [1, 2, 3][-n_obs_steps:]
        np.testing.assert_array_equal(before.obs["x"], before.final_obs["x"])
        over = idle(env)
        assert (over.terminated[0], over.truncated[0]) == flags
        assert over.executed.tolist() == [2]
        assert steps(over.final_obs["x"]) == [3, 4, 5][-n_obs_steps:]
        assert (over.final_obs["x"][0, :, 0] == first[0, 0, 0]).all()
        assert steps(over.obs["x"]) == [0] * n_obs_steps
        new = over.obs["x"][0, :, 0]
        assert (new != first[0, 0, 0]).all()
        after = idle(env).obs["x"]
        assert steps(after) == [1, 2, 3][-n_obs_steps:]
        assert (after[0, :, 0] == new[0]).all()


def test_a_window_longer_than_the_chunk_begins_with_the_first_observation() -> None:
    with scripted(4, 1) as env:
        env.reset()
        assert [steps(idle(env).obs["x"]) for _ in range(4)] == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]]


def test_episodes_end_one_by_one() -> None:
    """Environments that go on are not touched by a reset of others."""
    rng = np.random.default_rng(0)
    with dots(num_envs=5) as env, dots(num_envs=5) as other:
        env.reset()
        other.reset()
        lengths, mixed = np.zeros(5, int), 0
        for _ in range(30):
            actions = rng.uniform(-1, 1, (5, 2, 2)).astype(np.float32)
            transition = env.step(actions)
            lengths += transition.executed
            done = transition.terminated | transition.truncated
            mixed += 0 < done.sum() < 5
            assert [e.length for e in transition.ended] == lengths[done].tolist()
            assert [e.success for e in transition.ended] == transition.terminated[done].tolist()
            np.testing.assert_array_equal(transition.obs["x"][~done], transition.final_obs["x"][~done])
            assert (transition.obs["x"][done] != transition.final_obs["x"][done]).any(axis=(1, 2)).all()
            lengths[done] = 0
    assert mixed > 5


def test_workers_do_not_change_transitions() -> None:
    def played(num_workers: int) -> list[Any]:
        rng = np.random.default_rng(1)
        with dots(num_workers=num_workers) as env:
            env.reset()
            return [env.step(rng.uniform(-1, 1, (4, 2, 2)).astype(np.float32)) for _ in range(15)]

    alone = played(0)
    assert sum(len(t.ended) for t in alone) > 5
    for num_workers in (1, 2):
        for a, b in zip(alone, played(num_workers), strict=True):
            assert_same(a, b)


def assert_same(a: Transition, b: Transition) -> None:
    for one, two in zip((a.obs["x"], a.final_obs["x"], *a[2:7]), (b.obs["x"], b.final_obs["x"], *b[2:7]), strict=True):
        np.testing.assert_array_equal(one, two)
    assert a.ended == b.ended


# --- state --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["task", "best"])
def test_a_restored_environment_goes_on_to_the_bit(source: Literal["task", "best"]) -> None:
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (24, 4, 2, 2)).astype(np.float32)
    seen = set()
    with dots(source=source) as env, dots(source=source) as other:
        env.reset()
        for k in range(12):
            at = env.step(actions[k])
            state = {name: value.copy() for name, value in env.state().items()}
            seen.add(tuple(sorted(set(state["chunks"].tolist()))))
            np.testing.assert_array_equal(other.restore(state)["x"], at.obs["x"])
        assert any(chunks[0] == 0 and len(chunks) > 1 for chunks in seen)  # some just began, others are in their midst
        for k in range(12, 24):
            assert_same(env.step(actions[k]), other.step(actions[k]))


def test_a_fresh_environment_can_be_saved_too() -> None:
    with dots() as env, dots() as other:
        first = env.reset()
        assert env.state()["actions"].shape == (0, 2, 2)
        np.testing.assert_array_equal(other.restore(env.state())["x"], first["x"])


def test_no_two_training_episodes_share_a_seed_nor_any_with_evaluation() -> None:
    seeds = [training_seed(s, i, k) for s in range(3) for i in range(32) for k in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= SEEDS["training"] == max(SEEDS.values())
    assert max(seeds) < 2**31


# --- what goes wrong ----------------------------------------------------------------------------------------------------------


def test_observations_must_be_finite() -> None:
    with scripted(nan=6) as env:
        env.reset()
        idle(env)
        with pytest.raises(TaskError, match="'x' is not finite"):
            idle(env)


def test_rewards_must_be_finite() -> None:
    with scripted(rewards=(0.0, np.inf, 0.0)) as env:
        env.reset()
        with pytest.raises(TaskError, match="reward is not finite"):
            idle(env)


def test_a_task_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TaskError, match="shape"):
        ChunkEnv(TaskSpec("toys:Script"), Shape(Dot, 1, 1), num_envs=1, num_workers=0, seed=0, reward=RewardConfig())
