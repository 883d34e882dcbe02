"""Demonstrations by a policy: the store holds what the policy saw and did, whole episodes only, and a student trains on it."""

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from walk import Walk

from robopolicy.cli import main
from robopolicy.data.check import check
from robopolicy.data.demos import record
from robopolicy.data.episodes import Episodes
from robopolicy.data.rollouts import origin_of, record_rollouts
from robopolicy.data.windows import Windows
from robopolicy.errors import DataError, EvaluationError, TaskError
from robopolicy.evaluate.run import SEEDS
from robopolicy.features import Feature
from robopolicy.policy import load_policy
from robopolicy.task import Task, TaskSpec
from robopolicy.train.checkpoint import read_document

START = SEEDS["rollouts"]


class Hill(Task):
    """Push a point towards 0 with at most 0.3 per step; every third seed is hopeless. Observes more than the policy reads."""

    rate = 10.0
    max_episode_steps = 13
    action_feature = Feature("push", (1,), unit="m", rate=10.0)

    def __init__(self, ends: bool = True, hopeless: int = 3) -> None:
        self.ends, self.hopeless = ends, hopeless
        self.observation_features = {
            "x": Feature("x", (1,), unit="m", rate=10.0),
            "image": Feature("image", (4, 4, 3), "uint8", rate=10.0),
        }
        self.action_space = gymnasium.spaces.Box(-0.3, 0.3, (1,), np.float64)  # 0.3 is no float32

    def _observe(self) -> dict[str, np.ndarray]:
        return {"x": np.array([self.x], np.float32), "image": np.full((4, 4, 3), 10 * self.steps, np.uint8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert seed is not None
        super().reset(seed=seed)
        self.seed, self.steps, self.x = seed, 0, float(self.np_random.uniform(-2, 2))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.x += float(np.clip(np.float64(action[0]), -0.3, 0.3)) + 0.01 * float(self.np_random.normal())
        self.steps += 1
        success = abs(self.x) < 0.1 and self.seed % self.hopeless != 0
        return (
            self._observe(),
            float(success),
            success and self.ends,
            self.steps >= self.max_episode_steps,
            {"is_success": success},
        )


class Pusher:
    """Pulls the first observed vector towards 0, with noise and beyond what the task allows; row by row."""

    n_obs_steps, n_action_steps = 2, 4

    def __init__(self, task: Task, gain: float = 0.9) -> None:
        self.name, feature = next(iter(task.observation_features.items()))
        self.observation_features, self.action_feature, self.gain = {self.name: feature}, task.action_feature, gain

    def act(self, obs: Mapping[str, np.ndarray], generator: Sequence[torch.Generator]) -> np.ndarray:
        noise = np.stack([torch.randn(4, *self.action_feature.shape, generator=g).numpy() for g in generator])
        return (-self.gain * obs[self.name][:, -1:] + 0.05 * noise).astype(np.float32)


HILL = TaskSpec("test_data_rollouts:Hill")


def contents(path: Path) -> list[dict[str, np.ndarray]]:
    episodes = Episodes.open(path)
    return [episodes.episode(i) for i in range(len(episodes))]


def assert_same(a: Sequence[Mapping[str, np.ndarray]], b: Sequence[Mapping[str, np.ndarray]]) -> None:
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("success_only", [True, False])
def test_the_store_is_what_a_replay_of_its_actions_gives(tmp_path: Path, ends: bool, success_only: bool) -> None:
    spec = TaskSpec(HILL.name, {"ends": ends})
    path = tmp_path / "set.zarr"
    recorded = record_rollouts(Pusher(Hill()), spec, path, 9, success_only=success_only, seed_start=START + 5, num_envs=4)
    store = Episodes.open(path)
    failed = store.attrs["seeds"]["failed"]
    assert recorded.failed == failed == [s for s in range(START + 5, store.attrs["seeds"]["stop"]) if s % 3 == 0]
    seeds = [s for s in range(START + 5, store.attrs["seeds"]["stop"]) if not (success_only and s in failed)]
    assert recorded.tried == len(seeds) + success_only * len(failed)
    assert len(seeds) == len(store) == recorded.episodes == 9
    largest = 0.0
    for seed, episode in zip(seeds, contents(path), strict=True):
        task, success = Hill(ends), False
        observation, _ = task.reset(seed=seed)
        for x, image, push in zip(episode["x"], episode["image"], episode["push"], strict=True):
            np.testing.assert_array_equal(x, observation["x"])  # to the last bit
            np.testing.assert_array_equal(image, observation["image"])
            observation, _, terminated, truncated, info = task.step(push)
            success |= info["is_success"]
            largest = max(largest, abs(float(push[0])))
        assert terminated or truncated  # whole, also where the task goes on after its success
        assert success == (seed not in failed)
    assert largest == np.float32(0.3)  # the policy asked for more


def same_in_all_ways(tmp_path: Path, policy: Pusher, spec: TaskSpec, ways: Sequence[dict[str, int]]) -> None:
    results = []
    for index, way in enumerate(ways):
        path = tmp_path / f"{index}.zarr"
        recorded = record_rollouts(policy, spec, path, 6, success_only=True, **way)
        results.append((recorded, Episodes.open(path).attrs["seeds"], contents(path)))
    assert results[0][0].failed
    assert len({len(episode[policy.name]) for episode in results[0][2]}) > 1  # so that episodes end out of order
    for recorded, seeds, episodes in results[1:]:
        assert (recorded, seeds) == results[0][:2]
        assert_same(episodes, results[0][2])


def test_the_result_does_not_depend_on_how_many_run_together(tmp_path: Path) -> None:
    policy = Pusher(Hill())
    same_in_all_ways(tmp_path, policy, HILL, [{"num_envs": 1}, {"num_envs": 3}, {"num_envs": 50}])
    record_rollouts(policy, HILL, tmp_path / "other.zarr", 6, success_only=True, noise_seed=1)
    assert not np.array_equal(contents(tmp_path / "other.zarr")[0]["push"], contents(tmp_path / "0.zarr")[0]["push"])


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    policy, spec = Pusher(Walk(), gain=-0.08), TaskSpec("walk:Walk")  # succeeds if it gets far enough
    same_in_all_ways(tmp_path, policy, spec, [{"num_envs": 3}, {"num_envs": 3, "num_workers": 2}])


def test_a_checkpoint_rolls_out_and_a_student_trains_on_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """demos -> train -> data rollout -> train, with the commands; and the provenance says all of it."""
    line = TaskSpec("test_data_demos:Line", {"hopeless": 4})
    record(line, tmp_path / "demos.zarr", 12, noise=0.02)
    config: dict[str, Any] = {
        "name": "teacher",
        "task": {"name": line.name, "args": dict(line.kwargs)},
        "data": {"path": str(tmp_path / "demos.zarr"), "observations": ["place"], "val_fraction": 0.0},
        "policy": {"horizon": 6, "n_action_steps": 4, "net": {"type": "mlp", "width": 32, "depth": 1}},
        "train": {"steps": 60, "lr": 3e-3, "warmup_steps": 1, "batch_size": 64, "device": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    teacher, student, out = (str(tmp_path / name) for name in ("teacher", "student", "rollouts.zarr"))
    assert main(["train", str(tmp_path / "c.yaml"), "--out", teacher]) == 0
    capsys.readouterr()
    rollout = ["data", "rollout", teacher, "--success-only", "--episodes", "5", "--num-envs", "4", "--seed-start", "410000"]
    assert main([*rollout, "--noise-seed", "2", "--steps", "3", "--noise", ".5", "--out", out]) == 0
    said = capsys.readouterr()
    store = Episodes.open(out)
    seeds = store.attrs["seeds"]
    tried = seeds["stop"] - 410_000
    assert f"5 episodes, {store.num_steps} steps; the policy succeeded on 5 of {tried} seeds" in said.out
    assert f"success 5/{tried}" in said.err
    assert seeds["start"] == 410_000
    assert {s for s in range(410_000, seeds["stop"]) if s % 4 == 0} <= set(seeds["failed"])
    assert store.attrs["task"] == line.name
    assert store.attrs["task_args"] == {"hopeless": 4}
    assert (store.attrs["success_only"], store.attrs["noise_seed"], store.attrs["num_envs"]) == (True, 2, 4)
    assert store.attrs["sampler"]["num_steps"] == 3
    assert store.attrs["initial_noise"] == 0.5
    origin = store.attrs["policy"]
    assert origin == origin_of(teacher)
    assert origin["sha256"] == read_document(Path(origin["checkpoint"]) / "policy")["sha256"]
    assert origin["provenance"]["experiment"] == "teacher"
    assert origin["provenance"]["step"] == 60
    assert check(out) == []
    assert store.features == Episodes.open(tmp_path / "demos.zarr").features
    windows = Windows(store, ["place"], "action", n_obs_steps=2, horizon=6, n_action_steps=4)
    assert len(windows) > 0
    assert main(["train", str(tmp_path / "c.yaml"), "name=student", f"data.path={out}", "train.steps=3", "--out", student]) == 0
    assert load_policy(student).action_feature == load_policy(teacher).action_feature
    assert main([*rollout, "--out", out]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_policy_that_keeps_failing_stops_and_says_how_often_it_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, hopeless = Pusher(Hill()), TaskSpec(HILL.name, {"hopeless": 1})
    with pytest.raises(TaskError, match=r"failed on 200 seeds in a row, the last 400199, and succeeded on 0 of 200 \(0\.0%\)"):
        record_rollouts(policy, hopeless, tmp_path / "set.zarr", 3, success_only=True)
    assert len(Episodes.open(tmp_path / "set.zarr")) == 0
    monkeypatch.setattr("robopolicy.data.rollouts._PATIENCE", 3)
    assert record_rollouts(policy, hopeless, tmp_path / "all.zarr", 5).episodes == 5  # unless failures are wanted


class Diverged(Pusher):
    def act(self, obs: Mapping[str, np.ndarray], generator: Sequence[torch.Generator]) -> np.ndarray:
        return np.full((len(generator), 4, 1), np.nan, np.float32)


def test_a_diverged_policy_stores_nothing(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"NaN or infinity in the episode of seed 400000"):
        record_rollouts(Diverged(Hill()), HILL, tmp_path / "set.zarr", 3)
    assert contents(tmp_path / "set.zarr") == []


def test_seeds_that_run_out_are_an_error_and_the_store_keeps_what_it_has(tmp_path: Path) -> None:
    last = SEEDS["training"] - 4
    with pytest.raises(DataError, match=r"seeds ran out at 500000 with [23] of 4 episodes; start at a lower seed"):
        record_rollouts(Pusher(Hill()), HILL, tmp_path / "set.zarr", 4, success_only=True, seed_start=last)
    assert 2 <= len(contents(tmp_path / "set.zarr")) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed_start": SEEDS["test"]}, "no demonstration shows a test"),
        ({"seed_start": SEEDS["training"] - 2}, "start within them"),
        ({"episodes": 0}, "expected at least"),
        ({"num_envs": 0}, "expected at least"),
        ({"num_workers": -1}, "expected at least"),
        ({"noise_seed": -1}, "expected at least"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        record_rollouts(Pusher(Hill()), HILL, tmp_path / "set.zarr", **{"episodes": 3, **arguments})
    assert not any(tmp_path.iterdir())


def test_a_task_that_does_not_fit_the_policy_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the policy needs observation 'x' and the task has agent_pos"):
        record_rollouts(Pusher(Hill()), TaskSpec("pusht"), tmp_path / "set.zarr", 3)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_keeps_the_episodes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Episodes.extend

    def full_at_three(self: Episodes, block: Mapping[str, np.ndarray]) -> None:
        if len(self) == 3:
            monkeypatch.setattr("robopolicy.data.store.write_file", full)
        append(self, block)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Episodes, "extend", full_at_three)
    with pytest.raises(DataError, match=r"No space left.*the 3 committed episodes are intact"):
        record_rollouts(Pusher(Hill()), HILL, tmp_path / "set.zarr", 6, num_envs=2)
    monkeypatch.undo()
    record_rollouts(Pusher(Hill()), HILL, tmp_path / "whole.zarr", 6, num_envs=2)
    assert_same(contents(tmp_path / "set.zarr"), contents(tmp_path / "whole.zarr")[:3])


def test_kill_9_half_way_leaves_a_store_of_whole_episodes(tmp_path: Path) -> None:
    code = (
        "from test_data_rollouts import *; "
        f"record_rollouts(Pusher(Hill()), HILL, {str(tmp_path / 'set.zarr')!r}, 90_000, success_only=True, num_envs=4)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    stored, deadline = 0, time.monotonic() + 120
    while stored < 3 and time.monotonic() < deadline:
        assert child.poll() is None
        stored = len(Episodes.open(tmp_path / "set.zarr")) if (tmp_path / "set.zarr").exists() else 0
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p for p in check(tmp_path / "set.zarr") if p.severity == "error"] == []
    found, seeds = contents(tmp_path / "set.zarr"), Episodes.open(tmp_path / "set.zarr").attrs["seeds"]
    assert len(found) >= 3
    record_rollouts(Pusher(Hill()), HILL, tmp_path / "whole.zarr", len(found), success_only=True, num_envs=4)
    assert_same(found, contents(tmp_path / "whole.zarr"))
    assert seeds["start"] == START
    assert seeds["stop"] - START - len(seeds["failed"]) >= len(found)
