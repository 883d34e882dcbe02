"""Push-T against the recordings of people, against gym-pusht, and against its declaration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import zarr
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.errors import TaskError
from robopolicy.task import find_task
from sim.pusht import BOARD, CENTRE, CORNERS, KEYPOINTS, RADIUS, SUCCESS_COVERAGE, PushT, PushTEnv, keypoints, noisy_sensors


@pytest.fixture(scope="module")
def human() -> Any:
    return zarr.open_group(store=str(shared_data("pusht_human") / "pusht_cchi_v7_replay.zarr"), mode="r")


@pytest.fixture(scope="module")
def ends(human: Any) -> np.ndarray:
    return np.asarray(human["meta/episode_ends"][:])


# ---- the recordings ----------------------------------------------------------------------------------------------------------


def test_replaying_peoples_actions_reproduces_what_they_saw(human: Any, ends: np.ndarray) -> None:
    """Published oracle: median error 0.000 px, at least 83 % of episodes under 0.5 px (contact is chaotic)."""
    states, actions = human["data/state"][:], human["data/action"][:]
    starts = np.concatenate([[0], ends[:-1]])
    task, worst = PushT("state"), []
    for start, end in list(zip(starts, ends, strict=True))[:30]:
        task.set_state(states[start])
        errors = []
        for t in range(start, end - 1):
            task.step(actions[t])
            errors.append(np.abs(task.state[:4] - states[t + 1, :4]).max())
        worst.append(max(errors))
    assert np.median(worst) < 0.0005
    assert np.mean(np.array(worst) < 0.5) >= 0.83


def test_rewards_equal_the_published_ones_exactly(human: Any, ends: np.ndarray) -> None:
    """``next.reward[t]`` is the reward of the state that follows, within an episode."""
    table = pyarrow.parquet.read_table(
        shared_data("lerobot_pusht_v3_parquet") / "data" / "chunk-000" / "file-000.parquet", columns=["next.reward"]
    )
    published = np.array(table["next.reward"])
    rows = np.setdiff1d(np.arange(0, len(published) - 1, 17), ends - 1)
    task = PushT("state")
    coverage = np.array([task.set_state(state)[1]["coverage"] for state in human["data/state"][:][rows + 1]])
    assert coverage.min() < 0.01
    assert coverage.max() > 0.8
    np.testing.assert_array_equal(np.clip(coverage / SUCCESS_COVERAGE, 0, 1).astype(np.float32), published[rows])


def test_keypoints_are_the_recorded_ones(human: Any) -> None:
    """Recorded keypoints lag the recorded pose by up to 2 px while the block is being hit; elsewhere they agree to float32."""
    computed = keypoints(human["data/state"][:, 2:].astype(np.float64))
    error = np.abs(computed - human["data/keypoint"][:].reshape(-1, 18)).max(axis=1)
    assert np.median(error) < 3e-5
    assert np.mean(error < 0.01) > 0.9
    assert error.max() < 2.5


def test_images_look_like_the_recorded_ones(human: Any) -> None:
    """A newer pygame rasterises some edge pixels differently; 4.5 would be the error of a block left where it was before."""
    task, errors = PushT("image"), []
    recorded = human["data/img"][:161]  # one chunk of the store
    for t in range(0, 161, 10):
        observation, _ = task.set_state(human["data/state"][t])
        errors.append(np.abs(observation["image"].astype(np.float64) - recorded[t]).mean())
    assert np.max(errors) < 0.25


def test_recorded_episodes_start_where_reset_can_start(human: Any, ends: np.ndarray) -> None:
    """Undoing the turn about the centre of mass gives whole pixels: people's episodes come from the same distribution."""
    first = human["data/state"][:][np.concatenate([[0], ends[:-1]])].astype(np.float64)
    task = PushT("state")
    drawn = np.array([task.reset(seed=seed) and task.state for seed in range(300)])
    for states in (first, drawn):
        angle = states[:, 4]
        turned = np.stack([-np.sin(angle), np.cos(angle)], axis=1) * CENTRE[1]
        upright = states[:, 2:4] + turned - CENTRE
        np.testing.assert_allclose(upright, np.round(upright), atol=1e-3)
        assert upright.min() > 99.5
        assert upright.max() < 399.5
        np.testing.assert_array_equal(states[:, :2], np.round(states[:, :2]))
        assert states[:, :2].min() >= 50
        assert states[:, :2].max() < 450
    assert np.ptp(drawn[:, 4]) > 6


# ---- gym-pusht ---------------------------------------------------------------------------------------------------------------


def test_steps_equal_gym_pushts_to_the_bit() -> None:
    task, peer, rng = PushT("state"), PushTEnv(), np.random.default_rng(0)
    touched = 0
    for seed in range(8):
        task.reset(seed=seed)
        peer._setup()
        agent_x, agent_y = task.state[:2].tolist()
        block = list(task._world.block.position)
        peer.agent.position, peer.block.angle, peer.block.position = [agent_x, agent_y], task._world.block.angle, block
        start = task.state
        for _ in range(10):
            action = rng.uniform(0, BOARD, 2)
            for _ in range(8):
                _, reward, _, _, info = task.step(action)
                theirs, their_reward, _, _, their_info = peer.step(action)
                np.testing.assert_array_equal(task.state, theirs)
                assert abs(reward - their_reward) < 1e-15
                assert abs(info["coverage"] - their_info["coverage"]) < 1e-15
        touched += not np.array_equal(task.state[2:], start[2:])
    assert touched > 4


def test_images_equal_gym_pushts_to_the_pixel() -> None:
    task = PushT("image")
    for seed in range(10):
        image = task.reset(seed=seed)[0]["image"]
        np.testing.assert_array_equal(image, task._world._render())


def test_the_shape_is_gym_pushts() -> None:
    world = PushT()._world
    np.testing.assert_array_equal(CORNERS[:, :4], [[tuple(v) for v in shape.get_vertices()] for shape in world._block_shapes])
    assert tuple(world.block.center_of_gravity) == CENTRE
    assert np.linalg.norm(CORNERS.reshape(-1, 2) - CENTRE, axis=1).max() < RADIUS  # else overlap could be overlooked


# ---- the task ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(x=st.floats(-100, 600), y=st.floats(-100, 600), angle=st.floats(-20, 20), dx=st.floats(-50, 50), turn=st.floats(-7, 7))
def test_keypoints_move_rigidly_with_the_block(x: float, y: float, angle: float, dx: float, turn: float) -> None:
    points = keypoints(np.array([x, y, angle])).reshape(9, 2)
    moved = keypoints(np.array([[x + dx, y, angle], [x, y, angle + turn]])).reshape(2, 9, 2)
    np.testing.assert_allclose(moved[0], points + np.array([dx, 0]), atol=1e-9)
    cos, sin = math.cos(turn), math.sin(turn)
    np.testing.assert_allclose(moved[1] - [x, y], (points - [x, y]) @ np.array([[cos, sin], [-sin, cos]]), atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    agent=st.tuples(st.floats(20, 490), st.floats(20, 490)),
    block=st.tuples(st.floats(0, 512), st.floats(0, 512)),
    angle=st.floats(-7, 7),
)
def test_a_state_that_is_set_is_the_state(agent: tuple[float, float], block: tuple[float, float], angle: float) -> None:
    task = PushT("state")
    observation, info = task.set_state(np.array([*agent, *block, angle]))
    np.testing.assert_allclose(task.state[:4], [*agent, *block], atol=1e-9)
    assert math.isclose(math.cos(task.state[4] - angle), 1.0, abs_tol=1e-9)
    np.testing.assert_allclose(observation["agent_pos"], agent, rtol=1e-6)
    assert 0 <= info["coverage"] <= 1


def test_the_block_on_its_target_is_success_and_ends_the_episode() -> None:
    task = PushT("state")
    task.set_state(np.array([50, 50, 256, 256, math.pi / 4]))
    _, reward, terminated, truncated, info = task.step(np.array([50.0, 50.0]))
    assert reward == 1
    assert terminated
    assert info["is_success"]
    assert info["coverage"] == pytest.approx(1, abs=1e-12)
    assert not truncated


def test_episodes_depend_on_the_seed_alone() -> None:
    actions = np.random.default_rng(0).uniform(0, BOARD, (30, 2))

    def episode(task: PushT) -> np.ndarray:
        task.reset(seed=7)
        return np.array([task.step(action) and task.state for action in actions])

    used = PushT()
    used.reset(seed=3)
    for action in actions[::-1]:
        used.step(action)
    np.testing.assert_array_equal(episode(used), episode(PushT("state")))


def test_an_episode_is_cut_after_300_steps() -> None:
    task = PushT("state")
    task.set_state(np.array([50, 50, 350, 350, 0.0]))
    ends = [task.step(np.array([50.0, 50.0]))[2:4] for _ in range(300)]
    assert ends == [(False, False)] * 299 + [(False, True)]


@pytest.mark.parametrize("obs", ["state", "keypoints", "image"])
def test_observations_and_frames_are_as_declared(obs: Any) -> None:
    task = PushT(obs, render_size=256)
    for observation in (task.reset(seed=0)[0], task.step(np.array([900.0, -50.0]))[0]):  # clipped to the board
        assert set(observation) == set(task.observation_features)
        for name, feature in task.observation_features.items():
            assert observation[name].shape == feature.shape
            assert observation[name].dtype == feature.dtype
        assert task.observation_space.contains(observation)
    frame = task.render()
    assert frame.shape == (256, 256, 3)
    assert frame.dtype == np.uint8
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 10  # smooth edges between at least four colours


def test_images_show_the_block_where_it_is() -> None:
    """The first image as well: gym-pusht draws shapes where they were at the last physics step."""
    task = PushT("image")
    near = task.set_state(np.array([50, 50, 150, 150, 0.0]))[0]["image"]
    far = task.set_state(np.array([50, 50, 400, 350, 0.0]))[0]["image"]
    assert np.abs(near.astype(int) - far).sum() > 10_000
    assert KEYPOINTS.shape == (9, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PushT("stat"), "did you mean 'state'"),  # type: ignore[arg-type]
        (lambda: PushT(render_size=0), "render_size 0"),
        (lambda: PushT().set_state(np.zeros(4)), "5 finite numbers"),
        (lambda: PushT().set_state(np.full(5, np.nan)), "5 finite numbers"),
        (lambda: PushT().expert(np.random.default_rng(0)), "no scripted expert"),
    ],
)
def test_wrong_use_is_explained(make: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make()


def test_it_is_registered_by_name() -> None:
    assert find_task("pusht") is PushT


# ---- poor sensors ------------------------------------------------------------------------------------------------------------


def test_noisy_sensors_are_a_function_of_the_seed_and_leave_the_world_as_it_is() -> None:
    clean, first, again = PushT(), PushT(noise=(40, 15, 0.1)), PushT(noise=(40, 15, 0.1))
    again.reset(seed=8)  # what came before does not matter
    for seed in (3, 4):
        runs = []
        for task in (clean, first, again):
            obs = [task.reset(seed=seed)[0]] + [task.step(np.array([200.0, 300.0]))[0] for _ in range(5)]
            runs.append(obs)
        for a, b, c in zip(*runs, strict=True):
            assert set(b) - set(a) == {"agent_pos_noisy", "keypoints_noisy"}
            assert all(np.array_equal(a[name], b[name]) for name in a)
            assert all(np.array_equal(b[name], c[name]) for name in b)
            assert not np.array_equal(b["agent_pos"], b["agent_pos_noisy"])


def test_the_errors_of_noisy_sensors_have_the_declared_spread() -> None:
    state = np.tile([100.0, 200.0, 250.0, 300.0, 1.0], (20_000, 1))
    seen = noisy_sensors(state, (40, 15, 0.1), np.random.default_rng(0))
    assert seen["agent_pos_noisy"].std(axis=0) == pytest.approx([40, 40], rel=0.03)
    # a point at distance r from the origin of the block moves by 15 px and by r times the error of the angle
    spread = np.hypot(15, 0.1 * np.abs(KEYPOINTS[4]).max())
    assert keypoints(state[:1, 2:])[0, 8:10] == pytest.approx(seen["keypoints_noisy"].mean(axis=0)[8:10], abs=2)
    assert seen["keypoints_noisy"].std(axis=0)[8:10].max() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("arguments", [{"noise": (1, 2)}, {"noise": (1, 2, -1)}, {"noise": (1, 2, 3), "obs": "state"}])
def test_noise_that_is_none_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="noise"):
        PushT(**arguments)
