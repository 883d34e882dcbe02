"""The robosuite adapter: seeds, units, declarations, experts, quiet."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import sim.robosuite as adapter
from robopolicy.errors import TaskError
from robopolicy.task import TaskSpec, find_task
from sim.robosuite import ACTION_LIMIT, RobosuiteTask
from sim.robosuite_experts import turn_to, yaw_of

NAMES = ("Lift", "Can", "Square", "Door", "Stack")


@pytest.fixture(scope="module", params=NAMES)
def task(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = getattr(adapter, request.param)()
    yield made
    made.close()


@pytest.fixture(scope="module")
def lift() -> Iterator[adapter.Lift]:
    made = adapter.Lift(render_size=64)
    yield made
    made.close()


def episode(task: RobosuiteTask, seed: int, steps: int = 12) -> list[dict[str, np.ndarray]]:
    """Observations of an episode of random actions."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 7)) * ACTION_LIMIT
    return [task.reset(seed=seed)[0], *(task.step(action)[0] for action in actions)]


def test_the_same_seed_is_the_same_episode_whatever_ran_before(task: RobosuiteTask) -> None:
    first = episode(task, 5)
    np.random.seed(1)  # noqa: NPY002  robosuite must not use the global generator either
    other = episode(task, 6, steps=20)  # leaves the gripper closed or open, the objects moved
    again = episode(task, 5)
    for a, b in zip(first, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    moved = [name for name in first[0] if not np.array_equal(first[0][name], other[0][name])]
    assert any(name.endswith("_pos") and name != "eef_pos" for name in moved)


def test_observations_are_as_declared(task: RobosuiteTask) -> None:
    observation, info = task.reset(seed=0)
    assert info == {"is_success": False}
    assert list(observation) == list(task.observation_features)
    for name, feature in task.observation_features.items():
        assert observation[name].shape == feature.shape
        assert observation[name].dtype == feature.dtype
        assert feature.unit in ("m", "rad", "quat_xyzw")
        assert feature.rate == 20
        if feature.unit == "quat_xyzw":
            assert np.linalg.norm(observation[name]) == pytest.approx(1, abs=1e-5)
    assert task.observation_space.contains(observation)
    assert task.action_space.contains(np.zeros(7, np.float32))


def test_a_fresh_environment_gives_the_same_episode(lift: adapter.Lift) -> None:
    episode(lift, 3)
    a, b = episode(lift, 8), episode(adapter.Lift(), 8)
    for one, two in zip(a, b, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.usefixtures("renderer")
def test_it_draws_the_scene(lift: adapter.Lift) -> None:
    lift.reset(seed=0)
    frame = lift.render()
    assert frame.shape == (64, 64, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 10


def test_actions_are_metres_and_radians_in_the_world(lift: adapter.Lift) -> None:
    """Repeated small displacements move the grip site along the axis that they name, and turn it about it."""
    for axis in range(3):
        before, _ = lift.reset(seed=0)
        for _ in range(10):
            after = lift.step(np.eye(7)[axis] * 0.03)[0]
        moved = after["eef_pos"] - before["eef_pos"]
        assert 0.05 < moved[axis] < 0.3
        assert np.abs(np.delete(moved, axis)).max() < 0.3 * moved[axis]
    before, _ = lift.reset(seed=0)
    for _ in range(10):
        after = lift.step(np.eye(7)[5] * 0.1)[0]
    turned = (Rotation.from_quat(after["eef_quat"]) * Rotation.from_quat(before["eef_quat"]).inv()).as_rotvec()
    assert 0.2 < turned[2] < 1.0
    assert np.abs(turned[:2]).max() < 0.1


def test_actions_beyond_the_limits_are_clipped(lift: adapter.Lift) -> None:
    lift.reset(seed=0)
    a = lift.step(np.full(7, 100.0))[0]
    lift.reset(seed=0)
    b = lift.step(ACTION_LIMIT)[0]
    np.testing.assert_array_equal(a["eef_pos"], b["eef_pos"])


def test_a_positive_gripper_command_closes(lift: adapter.Lift) -> None:
    widths = []
    for command in (-1.0, 1.0):
        lift.reset(seed=0)
        for _ in range(10):
            observation = lift.step(np.array([0, 0, 0, 0, 0, 0, command]))[0]
        widths.append(observation["gripper_qpos"][0] - observation["gripper_qpos"][1])
    assert widths[0] > 0.07
    assert widths[1] < 0.01


def test_the_sign_of_the_orientation_does_not_jump_while_the_arm_moves(lift: adapter.Lift) -> None:
    for seed in range(3):
        quats = np.array([observation["eef_quat"] for observation in episode(lift, seed, 40)])
        assert np.sum(quats[1:] * quats[:-1], axis=1).min() > 0.9


def test_an_episode_is_cut_at_its_limit() -> None:
    lift = adapter.Lift(max_episode_steps=3)
    lift.reset(seed=0)
    assert [lift.step(np.zeros(7))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_a_reset_compiles_nothing_and_costs_no_more_than_a_few_steps(task: RobosuiteTask) -> None:
    """A reset takes half a step and compiling the model thirty (of CPU time, which a busy machine does not touch)."""

    def cost(run: Callable[[int], object], count: int) -> float:
        started = time.process_time()
        for i in range(count):
            run(i)
        return (time.process_time() - started) / count

    task.reset(seed=0)
    model = task._env.sim.model._model
    step = cost(lambda _: task.step(np.zeros(7)), 10)
    assert cost(lambda seed: task.reset(seed=seed), 5) < 5 * step
    assert task._env.sim.model._model is model


@pytest.mark.parametrize(("name", "seeds", "noise"), [("Lift", 3, 1.0), ("Stack", 1, 0.0), ("Can", 1, 0.0)])
def test_experts_succeed(name: str, seeds: int, noise: float) -> None:
    task = TaskSpec(f"sim.robosuite:{name}").make()
    for seed in range(seeds):
        task.reset(seed=seed)
        expert = task.expert(np.random.default_rng(seed), noise)
        reward, ended, success = 0.0, False, False
        while not ended:
            action = expert.act()
            assert task.action_space.contains(action)
            _, reward, terminated, truncated, info = task.step(action)
            ended, success = terminated or truncated, info["is_success"]
        assert success
        assert reward == 1
        assert terminated
    task.close()


def test_a_task_without_an_expert_says_so() -> None:
    with pytest.raises(TaskError, match="'Door' has no scripted expert"):
        object.__new__(adapter.Door).expert(np.random.default_rng(0))


@settings(max_examples=60, deadline=None)
@given(tilt=st.tuples(*[st.floats(-0.4, 0.4)] * 3), yaw=st.floats(-4, 4))
def test_turning_repeatedly_points_down_and_along_the_yaw(tilt: tuple[float, float, float], yaw: float) -> None:
    rotation = Rotation.from_rotvec(tilt) * Rotation.from_quat([1, 0, 0, 0])
    for _ in range(60):
        rotation = Rotation.from_rotvec(0.3 * turn_to(rotation.as_quat(), yaw)) * rotation
    axes = rotation.as_matrix()
    np.testing.assert_allclose(axes[:, 2], [0, 0, -1], atol=1e-3)
    assert abs(np.sin(2 * (np.arctan2(axes[1, 1], axes[0, 1]) - yaw))) < 1e-2  # modulo a quarter turn


@given(yaw=st.floats(-3.1, 3.1))
def test_the_yaw_of_an_upright_body_is_its_heading(yaw: float) -> None:
    assert yaw_of(Rotation.from_rotvec([0, 0, yaw]).as_quat()) == pytest.approx(yaw, abs=1e-9)


def test_importing_is_cheap_and_building_is_quiet() -> None:
    script = """
import logging, os, sys
import sim.robosuite
assert not {"robosuite", "mujoco", "numba"} & set(sys.modules), "imported too early"
task = sim.robosuite.Lift()
task.reset(seed=0)
print(sorted(task.observation_features), os.environ["MUJOCO_GL"] in ("egl", "osmesa", "disabled"), "torch" in sys.modules)
logging.getLogger("robosuite_logs").error("an error comes through")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['cube_pos', 'cube_quat', 'eef_pos', 'eef_quat', 'gripper_qpos'] True False\n"
    assert len(done.stderr.strip().splitlines()) == 1
    assert "an error comes through" in done.stderr


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(TaskError, match=r"pip install -e '\.\[robosuite\]'"):
        adapter.Lift()


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_registered_by_name(name: str) -> None:
    assert find_task(f"robosuite_{name.lower()}") is getattr(adapter, name)
