"""Episodes: what is written is read back, in both zarr formats, and an append happens entirely or not at all."""

import errno
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.config import parse
from robopolicy.data import store as store_module
from robopolicy.data.check import check
from robopolicy.data.combine import pack
from robopolicy.data.episodes import Episodes, FeatureSource
from robopolicy.errors import ConfigError, DataError
from robopolicy.features import Feature

FEATURES = {
    "position": Feature("position", (3,), unit="m", names=("x", "y", "z"), rate=10.0),
    "image": Feature("image", (16, 16, 3), "uint8", rate=10.0),
    "gripper": Feature("gripper", (), "float64", rate=10.0),
    "action": Feature("action", (2,), unit="m", rate=10.0),
}


def make_episode(seed: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "position": rng.normal(size=(length, 3)).astype(np.float32),
        "image": rng.integers(0, 255, (length, 16, 16, 3), dtype=np.uint8),
        "gripper": rng.normal(size=length),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
    }


def assert_holds(path: Path, expected: list[dict[str, np.ndarray]]) -> None:
    episodes = Episodes.open(path)
    assert len(episodes) == len(expected)
    for index, episode in enumerate(expected):
        found = episodes.episode(index)
        assert found.keys() == episode.keys()
        for name, value in episode.items():
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_is_appended_is_read_back(tmp_path: Path, zarr_format: Any) -> None:
    path = tmp_path / "set.zarr"
    written = [make_episode(i, length) for i, length in enumerate([5, 40, 1, 17])]
    with Episodes.create(path, FEATURES, zarr_format=zarr_format, attrs={"task": "toy"}) as episodes:
        assert [episodes.append(e) for e in written] == [0, 1, 2, 3]
    assert_holds(path, written)
    read = Episodes.open(path)
    assert read.features == FEATURES
    assert read.attrs == {"task": "toy"}
    assert read.ends.tolist() == [5, 45, 46, 63]
    assert read.ends.dtype == np.int64
    assert read.zarr_format == zarr_format
    np.testing.assert_array_equal(read.read("gripper", 44, 47), np.concatenate([e["gripper"] for e in written])[44:47])


def test_format_2_uses_only_what_zarr_2_readers_know(tmp_path: Path) -> None:
    path = tmp_path / "set.zarr"
    Episodes.create(path, FEATURES, zarr_format=2).append(make_episode(0, 5))
    for metadata in path.rglob(".zarray"):
        value = json.loads(metadata.read_text())
        assert value["compressor"]["id"] == "blosc"
        assert value["filters"] is None
        assert value["zarr_format"] == 2
    assert not list(path.rglob("zarr.json"))
    assert zarr.open_group(path, mode="r", zarr_format=2)["meta/episode_ends"][:].tolist() == [5]


@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), reopen=st.booleans())
def test_any_sequence_of_lengths_survives(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], reopen: bool) -> None:
    path = tmp_path_factory.mktemp("set") / "set.zarr"
    written = [make_episode(i, length) for i, length in enumerate(lengths)]
    episodes = Episodes.create(path, FEATURES)
    for episode in written:
        if reopen:
            episodes.close()
            episodes = Episodes.open(path, "a")
        episodes.append(episode)
    assert_holds(path, written)


def test_a_zip_reads_like_its_directory_and_refuses_appending(tmp_path: Path) -> None:
    path, zipped = tmp_path / "set.zarr", tmp_path / "set.zarr.zip"
    written = [make_episode(0, 20), make_episode(1, 3)]
    with Episodes.create(path, FEATURES) as episodes:
        for episode in written:
            episodes.append(episode)
    pack(path, zipped)
    assert_holds(zipped, written)
    with pytest.raises(DataError, match="unpack"):
        Episodes.open(zipped, "a")
    with pytest.raises(DataError, match="pack"):
        Episodes.create(tmp_path / "new.zip", FEATURES)


def test_two_writers_exclude_each_other_and_readers_do_not_mind(tmp_path: Path) -> None:
    path = tmp_path / "set.zarr"
    first = Episodes.create(path, FEATURES)
    first.append(make_episode(0, 4))
    with pytest.raises(DataError, match="written by another"):
        Episodes.open(path, "a")
    assert len(Episodes.open(path)) == 1
    first.close()
    with Episodes.open(path, "a") as second:
        second.append(make_episode(1, 4))
    with pytest.raises(DataError, match="mode='a'"):
        first.append(make_episode(2, 4))


def test_an_episode_in_progress_is_invisible_to_any_reader(tmp_path: Path) -> None:
    path = tmp_path / "set.zarr"
    episodes = Episodes.create(path, FEATURES)
    first, second = make_episode(0, 20), make_episode(1, 30)
    episodes.append(first)
    episodes.extend(second)
    assert_holds(path, [first])
    root = zarr.open_group(path, mode="r")
    assert {root[f"data/{name}"].shape[0] for name in FEATURES} == {20}  # foreign readers assert equal lengths
    with pytest.raises(DataError, match="in progress"):
        episodes.append(first)
    episodes.commit()
    assert_holds(path, [first, second])


def test_rollback_forgets_the_episode_in_progress(tmp_path: Path) -> None:
    path = tmp_path / "set.zarr"
    episodes = Episodes.create(path, FEATURES)
    first, second = make_episode(0, 20), make_episode(1, 30)
    episodes.append(first)
    episodes.extend(make_episode(2, 50))
    episodes.rollback()
    episodes.append(second)
    assert_holds(path, [first, second])


class Crash(BaseException):
    """Stands for kill -9: nothing catches it, and nothing is written after it."""


@contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException, before_rename: bool) -> Iterator[list[Path]]:
    """Let the ``nth`` file written by the store fail, before its rename or just after it."""
    written: list[Path] = []
    real = store_module.replacing

    @contextmanager
    def replacing(path: Path) -> Iterator[Any]:
        written.append(path)
        if len(written) == nth + 1 and before_rename:
            (path.parent / f".{path.name}.x.partial").write_bytes(b"half")  # what a real kill leaves
            raise error
        with real(path) as file:
            yield file
        if len(written) == nth + 1:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "replacing", replacing)
        yield written


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("before_rename", [True, False])
def test_a_kill_at_every_single_write_loses_at_most_the_episode_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zarr_format: Any, before_rename: bool
) -> None:
    features = {name: FEATURES[name] for name in ("image", "action")}

    def episode(seed: int, length: int) -> dict[str, np.ndarray]:
        return {name: value for name, value in make_episode(seed, length).items() if name in features}

    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill does not lose what the kernel has; this is about order
    committed = [episode(0, 10), episode(1, 25)]  # the last chunk of images is shared with what comes next
    new, later = episode(2, 20), episode(3, 3)
    nth = outcomes = 0
    while True:
        path = tmp_path / f"{nth}.zarr"
        episodes = Episodes.create(path, features, zarr_format=zarr_format)
        for value in committed:
            episodes.append(value)
        try:
            with failing_at(monkeypatch, nth, Crash(), before_rename):
                episodes.append(new)
        except Crash:
            episodes.close()  # the process is gone
        else:
            break
        survived = len(Episodes.open(path)) == 3  # killed after the commit: the episode may be there, and then wholly
        outcomes |= 1 + survived
        assert_holds(path, [*committed, new] if survived else committed)
        with Episodes.open(path, "a") as again:
            assert len(again) == 2 + survived
            assert {a.shape[0] for a in again._arrays.values()} == {again.num_steps}
            again.append(later)
        assert_holds(path, [*committed, *([new] if survived else []), later])
        assert not list(path.rglob("*.partial"))
        nth += 1
    assert nth >= 5
    assert outcomes == (1 if before_rename else 3)


def test_a_full_disk_keeps_earlier_episodes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.zarr"
    episodes = Episodes.create(path, FEATURES)
    first, second = make_episode(0, 20), make_episode(1, 5)
    episodes.append(first)
    for nth in range(10):
        full = OSError(errno.ENOSPC, "No space left on device")
        with failing_at(monkeypatch, nth, full, True), pytest.raises(DataError, match=r"No space left.*1 committed.*free some"):
            episodes.append(make_episode(2, 40))
        assert_holds(path, [first])
    episodes.append(second)  # the same object goes on once there is space
    assert_holds(path, [first, second])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("position"), "lacks feature 'position'"),
        (lambda e: e.update(speed=np.zeros((4, 1))), "undeclared feature 'speed'"),
        (lambda e: e.update(position=np.zeros((4, 2))), "shape"),
        (lambda e: e.update(position=np.zeros((3, 3))), "different lengths"),
        (lambda e: e["position"].__setitem__((1, 2), np.nan), "NaN"),
        (lambda e: e["action"].__setitem__((3, 0), np.inf), "NaN or infinity"),
        (lambda e: e.update(image=e["image"].astype(np.float32)), "does not convert"),
        (lambda e: e.update(image=e["image"].astype(np.int64) + 200), "do not fit uint8"),
        (lambda e: e.update({k: v[:0] for k, v in e.items()}), "no steps"),
        (lambda e: e.update(position=np.array([["a", "b", "c"]] * 4)), "does not convert"),
    ],
)
def test_a_bad_episode_is_refused_and_nothing_is_written(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "set.zarr"
    episodes = Episodes.create(path, FEATURES)
    first = make_episode(0, 4)
    episodes.append(first)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    episode = make_episode(1, 4)
    change(episode)
    with pytest.raises(DataError, match=message):
        episodes.append(episode)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    assert_holds(path, [first])


def foreign(path: Path, zarr_format: Any = 2, ends: Any = (30, 50)) -> Path:
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    rng = np.random.default_rng(0)
    root.create_array("data/state", data=rng.normal(size=(50, 5)).astype(np.float32), chunks=(16, 5))
    root.create_array("data/keypoint", data=rng.normal(size=(50, 9, 2)).astype(np.float32), chunks=(16, 9, 2))
    root.create_array("data/img", data=rng.integers(0, 256, (50, 8, 8, 3)).astype(np.float32), chunks=(16, 8, 8, 3))
    root.create_array("data/action", data=rng.normal(size=(50, 2)), chunks=(16, 2))
    root.create_array("meta/episode_ends", data=np.array(ends, np.int64), chunks=(64,))
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_foreign_stores_get_inferred_features_and_mapped_ones(tmp_path: Path, zarr_format: Any) -> None:
    path = foreign(tmp_path / "f.zarr", zarr_format)
    plain = Episodes.open(path)
    assert not plain.declared
    assert plain.features["img"].is_image  # float images of integers 0..255 are read as bytes
    assert plain.features["action"] == Feature("action", (2,), "float64")
    sources = {
        "agent": FeatureSource(key="state", columns=(0, 2), unit="px", names=("x", "y"), rate=10.0),
        "points": FeatureSource(key="keypoint", shape=(18,)),
        "action": FeatureSource(dtype="float32"),
    }
    mapped = Episodes.open(path, features=sources)
    raw = zarr.open_group(path, mode="r")
    assert mapped.features["agent"] == Feature("agent", (2,), "float32", "px", ("x", "y"), 10.0)
    np.testing.assert_array_equal(mapped.read("agent", 3, 9), raw["data/state"][3:9, :2])
    np.testing.assert_array_equal(mapped.read("points", 3, 9), raw["data/keypoint"][3:9].reshape(6, 18))
    np.testing.assert_array_equal(mapped.read("img", 3, 9), raw["data/img"][3:9].astype(np.uint8))
    assert mapped.read("action", 0, 1).dtype == np.float32


def test_appending_to_a_foreign_store_keeps_its_layout(tmp_path: Path) -> None:
    path = foreign(tmp_path / "f.zarr")
    zarr.consolidate_metadata(path, zarr_format=2)
    with Episodes.open(path, "a") as episodes:
        episodes.append({name: episodes.read(name, 0, 7) for name in episodes.features})
    raw = zarr.open_group(path, mode="r")
    assert raw["meta/episode_ends"][:].tolist() == [30, 50, 57]
    assert raw["data/img"].dtype == np.float32
    np.testing.assert_array_equal(raw["data/img"][50:57], raw["data/img"][:7])
    assert not (path / ".zmetadata").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FeatureSource(key="stat"), "did you mean 'state'"),
        (FeatureSource(key="state", columns=(3, 6)), "5 columns"),
        (FeatureSource(key="keypoint", shape=(17,)), "does not reshape"),
    ],
)
def test_a_mapping_that_does_not_fit_names_the_mend(tmp_path: Path, source: FeatureSource, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Episodes.open(foreign(tmp_path / "f.zarr"), features={"x": source})


def test_float_images_convert_only_when_they_hold_bytes(tmp_path: Path) -> None:
    path = foreign(tmp_path / "f.zarr")
    image = zarr.open_group(path, mode="r+")["data/img"]
    image[40, 0, 0, 0] = 0.5
    with pytest.raises(DataError, match=r"'img'.*not all integers"):
        Episodes.open(path, features={"img": FeatureSource(dtype="uint8")}).read("img", 30, 50)
    image[:] = image[:] / 255
    with pytest.raises(DataError, match="scaled image"):
        Episodes.open(path, features={"img": FeatureSource(dtype="uint8")}).read("img", 0, 50)


@pytest.mark.parametrize(
    "value", [{"columns": [2, 1]}, {"columns": [0]}, {"dtype": "float3"}, {"colums": [0, 1]}, {"shape": "x"}, {"rate": "fast"}]
)
def test_a_malformed_source_is_a_config_error(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse(FeatureSource, value)


def test_damage_in_arrays_that_are_not_named_does_not_hinder(tmp_path: Path) -> None:
    path = foreign(tmp_path / "f.zarr")
    metadata = path / "data/keypoint/.zarray"
    metadata.write_text(metadata.read_text().replace('"<f4"', '"|O"'))
    with pytest.raises(DataError, match="object"):
        Episodes.open(path)
    episodes = Episodes.open(path, features={"state": FeatureSource(), "action": FeatureSource()})
    assert "keypoint" not in episodes.features
    assert episodes.read("state", 0, 50).shape == (50, 5)


def test_all_zero_chunks_are_stored_so_that_missing_ones_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "set.zarr"
    feature = {"action": Feature("action", (2,))}
    with Episodes.create(path, feature) as episodes:
        episodes.append({"action": np.zeros((10, 2), np.float32)})
    chunk = next(p for p in (path / "data/action").iterdir() if p.name.startswith("c."))
    chunk.unlink()
    with pytest.raises(DataError, match=r"chunk.*missing"):
        Episodes.open(path)


def test_zip_entries_that_lead_outside_are_refused(tmp_path: Path) -> None:
    for name in ("../evil", "/abs/evil", "data/../../evil", "C:\\evil", "..\\evil"):
        path = tmp_path / "evil.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("zarr.json", "{}")
            archive.writestr(name, "x")
        with pytest.raises(DataError, match="leads outside"):
            Episodes.open(path)


def test_the_human_push_t_set_reads_with_a_mapping() -> None:
    path = shared_data("pusht_human") / "pusht_cchi_v7_replay.zarr"
    sources = {
        "agent_pos": FeatureSource(key="state", columns=(0, 2), unit="px", rate=10.0),
        "keypoints": FeatureSource(key="keypoint", shape=(18,), unit="px", rate=10.0),
        "image": FeatureSource(key="img", dtype="uint8", rate=10.0),
        "action": FeatureSource(unit="px", rate=10.0),
    }
    episodes = Episodes.open(path, features=sources)
    assert (len(episodes), episodes.num_steps) == (206, 25_650)
    first = episodes.episode(0)
    assert first["image"].dtype == np.uint8
    assert first["image"].shape == (161, 96, 96, 3)
    assert first["keypoints"].shape == (161, 18)
    np.testing.assert_array_equal(first["agent_pos"], first["state"][:, :2])
    # The action is the position that the agent is sent to, so the agent follows it.
    lag = np.linalg.norm(first["action"][:-1] - first["agent_pos"][1:], axis=1)
    assert np.median(lag) < 20


def test_gaps_beyond_the_last_episode_are_no_damage(tmp_path: Path) -> None:
    """A writer was killed while publishing, and the next one while removing what that one had left."""
    path = tmp_path / "set.zarr"
    expected = [make_episode(0, 20)]
    with Episodes.create(path, FEATURES) as episodes:
        episodes.append(expected[0])
    file = path / "data" / "image" / "zarr.json"
    value = json.loads(file.read_text())
    value["shape"][0] = 80
    file.write_text(json.dumps(value))
    assert [p.severity for p in check(path)] == ["warning"]
    assert_holds(path, expected)
    expected.append(make_episode(1, 25))
    with Episodes.open(path, "a") as episodes:
        episodes.append(expected[1])
    assert_holds(path, expected)
