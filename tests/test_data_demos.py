"""Demonstrations: what is stored is what the expert saw and did, for any number of workers; and the verbs around them."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from robopolicy.cli import main
from robopolicy.data.demos import record
from robopolicy.data.episodes import Episodes
from robopolicy.errors import DataError, TaskError
from robopolicy.features import Feature
from robopolicy.task import Task, TaskSpec


class Line(Task):
    """Walk to the goal on a line; seeds divisible by ``hopeless`` end in failure."""

    observation_features = {"place": Feature("place", (2,), unit="m", rate=10.0)}
    action_feature = Feature("action", (1,), unit="m", rate=10.0)
    rate = 10.0

    def __init__(self, hopeless: int = 5, max_episode_steps: int = 30) -> None:
        self.hopeless, self.max_episode_steps = hopeless, max_episode_steps
        self.action_space = gymnasium.spaces.Box(-0.2, 0.2, (1,))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert seed is not None
        self.seed, self.steps = seed, 0
        self.place, self.goal = np.random.default_rng(seed).uniform(-1, 1, 2)
        return self._observe(), {}

    def _observe(self) -> dict[str, np.ndarray]:
        return {"place": np.array([self.place, self.goal], np.float32)}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.place += float(np.clip(action[0], -0.2, 0.2))
        self.steps += 1
        success = abs(self.place - self.goal) < 0.05 and self.seed % self.hopeless != 0
        return self._observe(), float(success), success, self.steps >= self.max_episode_steps, {"is_success": success}

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Any:
        task = self

        class Walker:
            def act(self) -> np.ndarray:
                return np.array([np.clip(task.goal - task.place, -0.2, 0.2) + noise * rng.normal()])

        return Walker()


class Orphan(Line):
    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Any:
        return Task.expert(self, rng, noise)


LINE = TaskSpec("test_data_demos:Line")


def contents(path: Path) -> list[dict[str, np.ndarray]]:
    episodes = Episodes.open(path)
    return [episodes.episode(i) for i in range(len(episodes))]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    results = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.zarr"
        recorded = record(LINE, path, 6, noise=0.02, workers=workers)
        assert recorded.failed == [0, 5]
        results.append((contents(path), Episodes.open(path).attrs["seeds"]))
    assert results[0][1] == results[1][1] == {"start": 0, "stop": 8, "failed": [0, 5]}
    for a, b in zip(results[0][0], results[1][0], strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_observations_are_those_before_each_action(tmp_path: Path) -> None:
    record(LINE, tmp_path / "set.zarr", 3, seed_start=11)
    for seed, episode in zip((11, 12, 13), contents(tmp_path / "set.zarr"), strict=True):
        task = Line()
        observation, _ = task.reset(seed=seed)
        for place, action in zip(episode["place"], episode["action"], strict=True):
            np.testing.assert_array_equal(place, observation["place"])
            observation, *_, info = task.step(action)
        assert info["is_success"]  # replayed open loop, the stored actions succeed


def test_provenance_and_features_are_stored(tmp_path: Path) -> None:
    record(TaskSpec("test_data_demos:Line", {"hopeless": 3}), tmp_path / "set.zarr", 2, noise=0.01, seed_start=3)
    episodes = Episodes.open(tmp_path / "set.zarr")
    assert episodes.features == {**Line.observation_features, "action": Line.action_feature}
    assert episodes.attrs["task"] == "test_data_demos:Line"
    assert episodes.attrs["task_args"] == {"hopeless": 3}
    assert episodes.attrs["noise"] == 0.01
    assert episodes.attrs["seeds"] == {"start": 3, "stop": 6, "failed": [3]}
    assert "zarr" in episodes.attrs["versions"]


def test_failures_are_kept_when_asked(tmp_path: Path) -> None:
    recorded = record(LINE, tmp_path / "set.zarr", 3, keep_failures=True)
    assert recorded.failed == [0]
    assert np.diff(Episodes.open(tmp_path / "set.zarr").ends, prepend=0)[0] == 30


def test_an_unfit_expert_stops_and_keeps_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"failed on 50 seeds in a row.*lower the noise"):
        record(TaskSpec("test_data_demos:Line", {"hopeless": 1}), tmp_path / "set.zarr", 3)
    assert len(Episodes.open(tmp_path / "set.zarr")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed_start": 99_999}, "validation seeds begin"),
        ({"seed_start": -1}, "expected at least"),
        ({"noise": -1.0}, "expected at least"),
        ({"workers": 0}, "expected at least"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        record(LINE, tmp_path / "set.zarr", 3, **arguments)
    assert not (tmp_path / "set.zarr").exists()


def test_a_task_without_an_expert_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no scripted expert"):
        record(TaskSpec("test_data_demos:Orphan"), tmp_path / "set.zarr", 1)
    assert not (tmp_path / "set.zarr").exists()


def test_the_verbs_work_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, both, zipped = (str(tmp_path / name) for name in ("a.zarr", "b.zarr", "both.zarr", "both.zarr.zip"))
    line = "test_data_demos:Line"
    assert main(["data", "demos", line, "--episodes", "4", "--out", a, "--workers", "1", "--noise", "0.01"]) == 0
    assert "4 episodes" in capsys.readouterr().out
    assert (
        main(
            ["data", "demos", line, "--episodes", "4", "--out", b, "--workers", "1", "--seed-start", "50", "--set", "hopeless=9"]
        )
        == 0
    )
    assert main(["data", "demos", line, "--episodes", "4", "--out", b]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["data", "merge", a, b, "--out", both]) == 0
    assert main(["data", "check", both]) == 0
    assert "clean" in capsys.readouterr().out
    assert main(["data", "info", both]) == 0
    said = capsys.readouterr().out
    assert "8 episodes" in said
    assert "unit m" in said
    assert main(["data", "split", both, "--fractions", ".75,.25", "--out-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "both_train.zarr"), str(tmp_path / "both_val.zarr")]
    assert main(["data", "pack", both, "--out", zipped]) == 0
    assert main(["data", "unpack", zipped, "--out", str(tmp_path / "c.zarr")]) == 0
    assert main(["data", "repair", zipped, "--out", str(tmp_path / "d.zarr")]) == 0
    assert "8 episodes" in capsys.readouterr().out


def test_info_on_a_foreign_store_drafts_a_config_that_opens_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml
    import zarr

    from robopolicy.config import parse
    from robopolicy.data.episodes import FeatureSource

    root = zarr.open_group(tmp_path / "f.zarr", mode="w", zarr_format=2)
    root.create_array("data/state", data=np.zeros((9, 4), np.float32))
    root.create_array("data/img", data=np.arange(9 * 8 * 8 * 3).reshape(9, 8, 8, 3).astype(np.float32) % 256)
    root.create_array("meta/episode_ends", data=np.array([9]))
    assert main(["data", "info", str(tmp_path / "f.zarr")]) == 0
    said = capsys.readouterr().out
    draft = yaml.safe_load(said[said.index("data:") :])
    sources = {name: parse(FeatureSource, value) for name, value in draft["data"]["features"].items()}
    assert Episodes.open(tmp_path / "f.zarr", features=sources).features["img"].is_image
