"""Every task of the arm in both control modes: declarations, determinism, limits, bad actions, experts."""

import gymnasium.utils.env_checker
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.errors import TaskError
from robopolicy.task import Task, TaskSpec
from sim.arm import model as arm
from sim.arm import tee
from sim.arm.lift import Lift
from sim.arm.pusht import ArmPushT
from sim.arm.task import ArmTask

NAMES = ("reach", "lift", "stack", "arm_pusht")
MODES = ("ee", "joint")
_made: dict[tuple[str, str], ArmTask] = {}


def make(name: str, control: str = "ee") -> ArmTask:
    """One instance per task and mode for the whole module: compiling a model is the slow part."""
    if (name, control) not in _made:
        task = TaskSpec(name, {"control": control}).make()
        assert isinstance(task, ArmTask)
        _made[name, control] = task
    return _made[name, control]


def play(task: Task, seed: int, actions: np.ndarray) -> list[np.ndarray]:
    obs, _ = task.reset(seed=seed)
    trace = [np.concatenate([obs[name].ravel() for name in obs])]
    for action in actions:
        obs, reward, terminated, truncated, _ = task.step(action)
        trace.append(np.concatenate([np.append(obs[name].ravel(), reward) for name in obs]))
        if terminated or truncated:
            break
    return trace


@pytest.mark.parametrize("control", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_observations_and_actions_are_as_declared(name: str, control: str) -> None:
    task = make(name, control)
    obs, info = task.reset(seed=0)
    assert info == {"is_success": False}
    assert obs.keys() == task.observation_features.keys()
    for key, feature in task.observation_features.items():
        assert obs[key].shape == feature.shape
        assert obs[key].dtype == np.dtype(feature.dtype)
        assert feature.unit
        assert feature.rate == task.rate
        assert np.isfinite(obs[key]).all()
    assert task.action_feature.shape == task.action_space.shape
    assert len(task.action_feature.names) == task.action_feature.size
    assert task.action_feature.unit
    _, reward, _, _, info = task.step(task.action_space.low)
    assert 0.0 <= reward <= 1.0
    assert isinstance(info["is_success"], bool)


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_accepts_the_task(name: str) -> None:
    gymnasium.utils.env_checker.check_env(TaskSpec(name).make(), skip_render_check=True)


@pytest.mark.parametrize("control", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_same_seed_and_actions_give_the_same_episode_to_the_bit(name: str, control: str) -> None:
    task = make(name, control)
    rng = np.random.default_rng(3)
    actions = rng.uniform(task.action_space.low, task.action_space.high, size=(15, task.action_feature.size))
    first = play(task, 7, actions)
    play(task, 8, actions[::-1])  # something else in between leaves no trace
    again = play(task, 7, actions)
    other_instance = play(TaskSpec(name, {"control": control}).make(), 7, actions)
    other_seed = play(task, 9, actions)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first, other_instance, strict=True))
    assert not np.array_equal(first[0], other_seed[0])


def test_the_global_random_state_plays_no_part() -> None:
    task = make("stack")
    np.random.seed(0)  # noqa: NPY002
    a = task.reset(seed=5)[0]
    np.random.seed(1)  # noqa: NPY002
    b = task.reset(seed=5)[0]
    assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("control", MODES)
@given(seed=st.integers(0, 2**31), extreme=st.booleans())
@settings(max_examples=15, deadline=None)
def test_set_points_never_leave_position_and_velocity_limits(control: str, seed: int, extreme: bool) -> None:
    task = make("lift", control)
    task.reset(seed=seed)
    rng = np.random.default_rng(seed)
    low, high = task.action_space.low, task.action_space.high
    before = task.joint_set_point.copy()
    for _ in range(12):
        action = np.where(rng.random(len(low)) < 0.5, low - 1.0, high + 1.0) if extreme else rng.uniform(low, high)
        task.step(action)
        now = task.joint_set_point
        assert np.all(now >= arm.LOWER - 1e-9)
        assert np.all(now <= arm.UPPER + 1e-9)
        assert np.all(np.abs(now - before) <= arm.VELOCITY_LIMIT / task.rate + 1e-9)
        assert np.all(np.abs(task.joint_effort) <= arm.EFFORT_LIMIT + 1e-9)
        before = now.copy()


@pytest.mark.parametrize("control", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_bad_actions_name_what_is_wrong(name: str, control: str) -> None:
    task = make(name, control)
    task.reset(seed=0)
    size = task.action_feature.size
    with pytest.raises(TaskError, match=rf"shape \({size + 1},\); expected \({size},\)"):
        task.step(np.zeros(size + 1))
    bad = np.array(task.action_space.low)
    bad[-1] = np.nan
    with pytest.raises(TaskError, match=f"'{task.action_feature.names[-1]}' is not finite"):
        task.step(bad)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"control": "jiont"}, "did you mean 'joint'"), ({"obs": ["cube_poss"]}, "'cube_pos'")]
)
def test_bad_arguments_name_the_nearest_valid_one(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TaskSpec("lift", kwargs).make()


@pytest.mark.parametrize("control", MODES)
@pytest.mark.parametrize(("name", "episodes"), [("reach", 5), ("lift", 5), ("stack", 3), ("arm_pusht", 2)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_experts_succeed(name: str, episodes: int, control: str, noise: float) -> None:
    task = make(name, control)
    for seed in range(episodes):
        task.reset(seed=seed)
        expert = task.expert(np.random.default_rng(seed), noise)
        over = False
        while not over:
            action = expert.act()
            assert action.dtype == np.float32
            assert task.action_space.contains(action)
            _, _, terminated, truncated, info = task.step(action)
            over = terminated or truncated
        assert info["is_success"], f"seed {seed}"


def test_experts_differ_between_episodes_and_repeat_with_their_generator() -> None:
    task = make("lift")

    def first_action(seed: int) -> np.ndarray:
        task.reset(seed=0)
        return task.expert(np.random.default_rng(seed), noise=1.0).act()

    assert np.array_equal(first_action(1), first_action(1))
    assert not np.array_equal(first_action(1), first_action(2))


def test_lift_needs_the_cube_to_be_held_high_for_half_a_second() -> None:
    task = Lift()
    task.reset(seed=0)
    expert = task.expert(np.random.default_rng(0))
    high = 0
    for _ in range(100):
        obs, reward, terminated, _, info = task.step(expert.act())
        high = high + 1 if obs["cube_pos"][2] >= task.half + task.height else 0
        assert info["is_success"] == (high >= task.hold_steps)
        if terminated:
            break
    assert info["is_success"]
    assert reward == 1.0


def test_an_idle_arm_succeeds_at_nothing_and_is_truncated_in_time() -> None:
    task = Lift(max_episode_steps=7)
    obs, _ = task.reset(seed=0)
    hold = np.append(obs["ee_pos"], [0.0, 0.08])
    ends = [task.step(hold)[2:4] for _ in range(7)]
    assert ends == [(False, False)] * 6 + [(False, True)]


def test_coverage_is_one_on_the_mark_and_falls_with_distance() -> None:
    task = make("arm_pusht")
    assert isinstance(task, ArmPushT)
    task.reset(seed=0)
    values = []
    for offset in (0.0, 0.004, 0.02, 0.3):
        task.put_block(task.goal[0] + offset, task.goal[1], task.goal[2])
        values.append(task.coverage())
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0
    task.put_block(task.goal[0], task.goal[1], task.goal[2] + np.pi)
    assert task.coverage() < 0.6


def test_the_samples_of_the_t_have_its_area_and_centre() -> None:
    spacing = 0.002
    points = tee.sample_points(spacing)
    assert len(points) * spacing**2 == pytest.approx(tee.THICK * (tee.WIDTH + tee.STEM), rel=0.01)
    assert points.mean(axis=0) == pytest.approx([0.0, 0.0], abs=1e-3)
    assert np.all(tee.distance(points) <= 0.0)
