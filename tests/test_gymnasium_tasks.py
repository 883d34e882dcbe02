"""Gymnasium's environments as tasks: the same numbers as gymnasium's own, declarations, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from robopolicy.errors import TaskError
from robopolicy.task import TaskSpec, find_task
from sim import gymnasium_tasks
from sim.gymnasium_tasks import Gymnasium


class Toy(gymnasium.Env[Any, Any]):
    """Observes and acts as told; succeeds at its third step."""

    metadata = {"render_modes": ["rgb_array"]}
    dt = 0.1

    def __init__(self, observed: gymnasium.Space[Any], acted: gymnasium.Space[Any], render_mode: str | None = None) -> None:
        self.observation_space, self.action_space, self.render_mode = observed, acted, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), float(action[0]), False, False, {"success": self.steps == 3}


def box(*shape: int, high: float = 1.0, dtype: Any = np.float32) -> Box:
    return Box(0 if dtype is np.uint8 else -high, high, shape, dtype)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("Toy-v0", entry_point=Toy, max_episode_steps=5)
    gymnasium.register("Endless-v0", entry_point=Toy)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"])
def test_it_is_gymnasiums_own_environment(name: str) -> None:
    task, peer, rng = TaskSpec("gymnasium", {"id": name}).make(), gymnasium.make(name), np.random.default_rng(0)
    assert isinstance(task, Gymnasium)
    assert task.max_episode_steps == 1000
    assert task.rate == pytest.approx(1 / peer.unwrapped.dt)  # type: ignore[attr-defined]
    state = task.observation_features["state"]
    assert (state.shape, state.dtype) == (peer.observation_space.shape, "float32")
    assert task.action_feature.shape == peer.action_space.shape
    for seed in (3, 4):
        ours, info = task.reset(seed=seed)
        theirs, _ = peer.reset(seed=seed)
        assert info["is_success"] is False
        for _ in range(25):
            np.testing.assert_array_equal(ours["state"], theirs.astype(np.float32))
            assert task.observation_space.contains(ours)
            action = rng.uniform(-1, 1, peer.action_space.shape).astype(np.float32)
            ours, reward, *ends, info = task.step(action * 1.5)  # clipped
            theirs, expected, *their_ends, _ = peer.step(np.clip(action * 1.5, peer.action_space.low, peer.action_space.high))
            assert reward == expected
            assert ends == their_ends
            assert info["is_success"] is False
            if any(ends):
                break
    task.close()


def test_episodes_depend_on_the_seed_alone() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 8)).astype(np.float32)

    def play(task: Gymnasium, seed: int) -> np.ndarray:
        start = task.reset(seed=seed)[0]
        return np.array([start["state"], *(task.step(action)[0]["state"] for action in actions)])

    task = Gymnasium("Ant-v5")
    first = play(task, 5)
    play(task, 6)
    np.testing.assert_array_equal(first, play(task, 5))
    np.testing.assert_array_equal(first, play(Gymnasium("Ant-v5"), 5))


def test_arguments_reach_gymnasium() -> None:
    task = Gymnasium("Hopper-v5", max_episode_steps=3, terminate_when_unhealthy=False)
    task.reset(seed=0)
    assert task.max_episode_steps == 3
    assert [task.step(np.zeros(3))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_a_dictionary_of_vectors_becomes_features_and_success_is_found() -> None:
    task = Gymnasium("Toy-v0", observed=Dict(near=box(3), goal=box(2, dtype=np.float64)), acted=box(1))
    observation, _ = task.reset(seed=0)
    assert {name: feature.shape for name, feature in task.observation_features.items()} == {"near": (3,), "goal": (2,)}
    assert {name: (value.shape, value.dtype.name) for name, value in observation.items()} == {
        "near": ((3,), "float32"),
        "goal": ((2,), "float32"),
    }
    assert task.rate == 10
    assert [task.step(np.zeros(1))[4]["is_success"] for _ in range(5)] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"id": "HalfCheeta-v5"}, "did you mean 'HalfCheetah-v5'"),
        ({"id": "HalfCheetah-v99"}, "did you mean 'HalfCheetah-v"),
        ({"id": "no_such_module:Thing-v0"}, "No module named 'no_such_module'"),
        ({}, "needs the environment's id"),
        ({"id": "Hopper-v5", "ctrl_cost_weigth": 1.0}, "unexpected keyword argument 'ctrl_cost_weigth'"),
        ({"id": "CartPole-v1"}, r"Discrete\(2\).*continuous"),
        ({"id": "Toy-v0", "observed": box(2), "acted": box(2, high=np.inf)}, "not bounded"),
        ({"id": "Toy-v0", "observed": box(8, 8, 3, high=255, dtype=np.uint8), "acted": box(2)}, "'state' is an array"),
        ({"id": "Toy-v0", "observed": Dict(a=box(2), mode=Discrete(3)), "acted": box(2)}, "'mode' is Discrete"),
        ({"id": "Endless-v0", "observed": box(2), "acted": box(2)}, "give max_episode_steps"),
    ],
)
def test_what_cannot_be_a_task_is_refused_with_the_reason(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message) as refused:
        TaskSpec("gymnasium", kwargs).make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("action", [np.zeros(5), np.full(6, np.nan)])
def test_bad_actions_are_refused(action: np.ndarray) -> None:
    task = Gymnasium("HalfCheetah-v5")
    task.reset(seed=0)
    with pytest.raises(TaskError, match="expected 6 finite numbers"):
        task.step(action)


DRAW = """
from sim.gymnasium_tasks import Gymnasium
task = Gymnasium("HalfCheetah-v5", width=96, height=64)
task.reset(seed=0)
frame = task.render()
print(frame.shape, frame.dtype, frame.std() > 10)
"""  # left open: nothing may complain at exit


@pytest.mark.usefixtures("renderer")
def test_it_draws_and_leaves_quietly() -> None:
    done = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "(64, 96, 3) uint8 True\n"
    assert done.stderr == ""


def test_without_a_renderer_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium_tasks, "renderer_available", lambda: None)
    with pytest.raises(TaskError, match="apt-get install libegl1"):
        Gymnasium("HalfCheetah-v5").render()


def test_it_is_registered_by_name() -> None:
    assert find_task("gymnasium") is Gymnasium
