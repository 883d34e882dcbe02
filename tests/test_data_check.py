"""`data check` on values: each kind of suspicious data is found, named and explained; sound data are called clean."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import shared_data

from robopolicy.data.check import check
from robopolicy.data.episodes import Episodes
from robopolicy.features import Feature

FEATURES = {
    "joints": Feature("joints", (3,), unit="rad", rate=10.0),
    "quat": Feature("quat", (4,), unit="quat_xyzw", rate=10.0),
    "timestamp": Feature("timestamp", (), "float64", unit="s", rate=10.0),
    "image": Feature("image", (8, 8, 3), "uint8", rate=10.0),
    "action": Feature("action", (3,), unit="rad/s", rate=10.0),
}
Values = dict[str, np.ndarray]


def make_episodes() -> list[Values]:
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(12):
        length = 50
        quat = rng.normal(size=(length, 4))
        episodes.append(
            {
                "joints": np.cumsum(rng.normal(size=(length, 3)) * 0.05, axis=0).astype(np.float32),
                "quat": (quat / np.linalg.norm(quat, axis=1, keepdims=True)).astype(np.float32),
                "timestamp": 100.0 + np.arange(length) / 10 + rng.uniform(-0.002, 0.002, length),
                "image": rng.integers(0, 255, (length, 8, 8, 3), dtype=np.uint8),
                "action": rng.normal(size=(length, 3)).astype(np.float32),
            }
        )
    return episodes


def store(path: Path, episodes: Iterable[Values]) -> Path:
    with Episodes.create(path, FEATURES) as target:
        for episode in episodes:
            target.append(episode)
    return path


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # many small stores; durability is tested elsewhere


def test_sound_data_are_clean(tmp_path: Path) -> None:
    assert check(store(tmp_path / "set.zarr", make_episodes())) == []


def degrees(e: list[Values]) -> None:
    for episode in e:
        episode["joints"] = np.degrees(episode["joints"])


def stuck_entry(e: list[Values]) -> None:
    e[4]["joints"][:, 1] = 0.25


def stuck_camera(e: list[Values]) -> None:
    e[7]["image"][10:45] = e[7]["image"][9]


def off_norm(e: list[Values]) -> None:
    e[3]["quat"][5] *= 1.5


def lost_frames(e: list[Values]) -> None:
    e[2]["timestamp"][20:] += 0.7


def clock_back(e: list[Values]) -> None:
    e[2]["timestamp"][20:] -= 3.0


def wrong_rate(e: list[Values]) -> None:
    for episode in e:
        episode["timestamp"] = 100.0 + np.arange(50) / 30


def constant(e: list[Values]) -> None:
    for episode in e:
        episode["action"][:, 2] = 1.0


def recorded_twice(e: list[Values]) -> None:
    for episode in e:
        for value in episode.values():
            value[30:33] = value[29]
        episode["timestamp"][30:33] = episode["timestamp"][29]


def garbage(e: list[Values]) -> None:
    e[0]["action"][3, 0] = 3e8


def black(e: list[Values]) -> None:
    for episode in e:
        episode["image"][:] = 0


@pytest.mark.parametrize(
    ("spoil", "where", "severity", "text"),
    [
        (degrees, "data/joints", "warning", "3 entries (0, 1, 2) reaches 58.55, which looks like degrees (declared rad)"),
        (stuck_entry, "data/joints", "warning", "entry 1 does not change in episode 4"),
        (stuck_camera, "data/image", "warning", "longest 360:395"),
        (off_norm, "data/quat", "error", "not of unit length at 1 steps, the first 155"),
        (lost_frames, "data/timestamp", "warning", "1 steps are more than 50 % off"),
        (clock_back, "data/timestamp", "error", "does not increase at 1 steps, the first 120"),
        (wrong_rate, "data/timestamp", "warning", "30 Hz; declared 10 Hz"),
        (constant, "data/action", "warning", "entry 2 is constant (1) through all episodes"),
        (recorded_twice, "data", "warning", "36 steps (6.0%) repeat the step before in every feature"),
        (garbage, "data/action", "warning", "reaches 3e+08"),
        (black, "data/image", "warning", "every pixel of every image is 0"),
    ],
)
def test_suspicious_values_are_found(
    tmp_path: Path, spoil: Callable[[list[Values]], None], where: str, severity: str, text: str
) -> None:
    episodes = make_episodes()
    spoil(episodes)
    problems = check(store(tmp_path / "set.zarr", episodes))
    found = [p for p in problems if p.where == where and p.severity == severity and text in p.text]
    assert len(found) == 1, [str(p) for p in problems]
    assert found[0].mend


def test_nan_and_inf_written_by_others_are_located(tmp_path: Path) -> None:
    path = store(tmp_path / "set.zarr", make_episodes())
    array = zarr.open_array(path, path="data/action", mode="r+")
    array[120, 1] = np.nan
    array[121, 0] = np.inf
    (problem,) = check(path)
    assert problem.severity == "error"
    assert "at 2 steps, the first 120" in problem.text
    assert "drop episode 2" in problem.mend


def test_foreign_images_and_angles_are_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    root = zarr.open_group(tmp_path / "f.zarr", mode="w", zarr_format=2)
    root.create_array("data/scaled", data=rng.random((40, 8, 8, 3)).astype(np.float32))
    root.create_array("data/bytes", data=rng.integers(0, 256, (40, 8, 8, 3)).astype(np.float32))
    root.create_array("data/joint_position", data=rng.uniform(-90, 90, (40, 6)))
    root.create_array("meta/episode_ends", data=np.array([20, 40]))
    texts = {p.where: p.text for p in check(tmp_path / "f.zarr")}
    assert "encoders expect uint8" in texts["data/scaled"]
    assert "4 times as large as uint8" in texts["data/bytes"]
    assert "looks like degrees (no unit declared)" in texts["data/joint_position"]


def test_features_with_different_rates_are_noticed(tmp_path: Path) -> None:
    features = {"a": Feature("a", (1,), rate=10.0), "b": Feature("b", (1,), rate=30.0)}
    rng = np.random.default_rng(0)
    with Episodes.create(tmp_path / "set.zarr", features) as target:
        target.append({k: rng.normal(size=(9, 1)).astype(np.float32) for k in features})
    assert any("different rates (a 10 Hz, b 30 Hz)" in p.text for p in check(tmp_path / "set.zarr"))


def test_leftovers_of_a_killed_writer_are_warnings_and_vanish_on_append(tmp_path: Path) -> None:
    path = store(tmp_path / "set.zarr", make_episodes())
    episodes = Episodes.open(path, "a")
    episodes.extend(make_episodes()[0])
    episodes.close()  # killed before commit
    problems = check(path)
    assert problems
    assert {p.severity for p in problems} == {"warning"}
    assert all("killed writer" in p.text for p in problems)
    Episodes.open(path, "a").close()
    assert check(path) == []


def test_the_human_push_t_set_has_one_oddity_its_float_images(tmp_path: Path) -> None:
    """On its first 11 episodes; the whole set, which takes 8 s, gives the same (docs/data.md)."""
    source = shared_data("pusht_human") / "pusht_cchi_v7_replay.zarr"
    chunks = 10
    for array in [p.parent for p in source.rglob(".zarray")]:
        target = tmp_path / array.relative_to(source)
        target.mkdir(parents=True)
        metadata = json.loads((array / ".zarray").read_text())
        if array.name == "episode_ends":
            ends = zarr.open_array(source, path="meta/episode_ends", mode="r")[:]
            metadata["shape"] = [int((ends <= chunks * 161).sum())]
        else:
            metadata["shape"][0] = chunks * 161
        (target / ".zarray").write_text(json.dumps(metadata))
        for chunk in array.iterdir():
            if chunk.name.split(".")[0].isdecimal() and int(chunk.name.split(".")[0]) < chunks:
                (target / chunk.name).symlink_to(chunk)
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    problems = [p for p in check(tmp_path) if "beyond the last episode end" not in p.text]  # the cut is not at an episode's end
    assert [(p.severity, p.where) for p in problems] == [("warning", "data/img")]
    assert "float32 with integers" in problems[0].text
