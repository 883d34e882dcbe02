"""Repair, merge, split, pack and unpack: what is sound comes through to the byte, and every result is whole or absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from robopolicy.data import combine
from robopolicy.data.check import check
from robopolicy.data.combine import merge, pack, split, unpack
from robopolicy.data.episodes import Episodes
from robopolicy.data.repair import repair
from robopolicy.errors import DataError
from robopolicy.features import Feature

FEATURES = {
    "state": Feature("state", (3,), unit="m", rate=10.0),
    "image": Feature("image", (8, 8, 3), "uint8"),
    "action": Feature("action", (2,)),
}
LENGTHS = (20, 15, 30, 10)
Values = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def make_episodes(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Values]:
    rng = np.random.default_rng(seed)
    return [
        {
            "state": rng.normal(size=(n, 3)).astype(np.float32),
            "image": rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8),
            "action": rng.normal(size=(n, 2)).astype(np.float32),
        }
        for n in lengths
    ]


def store(path: Path, episodes: list[Values], zarr_format: Any = 3, features: dict[str, Feature] = FEATURES) -> Path:
    with Episodes.create(path, features, zarr_format=zarr_format, attrs={"task": "toy"}) as target:
        for episode in episodes:
            target.append(episode)
    return path


def assert_holds(path: Path, expected: list[Values]) -> None:
    found = Episodes.open(path)
    assert len(found) == len(expected)
    for index, episode in enumerate(expected):
        for name, value in found.episode(index).items():
            np.testing.assert_array_equal(value, episode[name])


def set_ends(*ends: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        array = zarr.open_array(path, path="meta/episode_ends", mode="r+")
        array[:] = np.array(ends)

    return spoil


def set_value(array: str, step: int, value: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        zarr.open_array(path, path=array, mode="r+")[step, 0] = value

    return spoil


def cut_chunk(path: Path) -> None:
    chunk = path / "data/image/c.1.0.0.0"  # steps 16:32, of episodes 0 and 1
    chunk.write_bytes(chunk.read_bytes()[:-9])


def lose_chunk(path: Path) -> None:
    (path / "data/image/c.4.0.0.0").unlink()  # steps 64:75, of episodes 2 and 3


def shorten(path: Path) -> None:
    zarr.open_array(path, path="data/state", mode="r+").resize((70, 3))


def lose_ends(path: Path) -> None:
    shutil.rmtree(path / "meta/episode_ends")


def lose_array(path: Path) -> None:
    shutil.rmtree(path / "data/state")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("spoil", "kept", "dropped"),
    [
        (set_value("data/action", 22, np.nan), [0, 2, 3], ["episode 1"]),
        (cut_chunk, [2, 3], ["episode 0", "episode 1"]),
        (lose_chunk, [0, 1], ["episode 2", "episode 3"]),
        (shorten, [0, 1, 2], ["episode 3"]),
        (set_ends(20, 35, 65, 99), [0, 1, 2], ["episode 3"]),
        (set_ends(20, -35, 65, 75), [0, 3], ["episode 1", "episode 2"]),
        (set_ends(20, 19, 65, 75), [3], ["episode 0", "episode 1", "episode 2"]),
        (set_ends(20, 20, 65, 75), [0, None, 3], ["episode 1"]),  # what was episode 1 is now the beginning of episode 2
    ],
)
def test_repair_keeps_what_is_sound_and_says_what_it_dropped(
    tmp_path: Path, spoil: Callable[[Path], None], kept: list[int | None], dropped: list[str], in_place: bool
) -> None:
    episodes = make_episodes()
    path = store(tmp_path / "set.zarr", episodes)
    spoil(path)
    assert any(p.severity == "error" for p in check(path))
    out = None if in_place else tmp_path / "out.zarr"
    result = repair(path, out)
    mended = out or path
    assert check(mended) == []
    assert [line.split(":")[0].split(" (")[0] for line in result.dropped] == dropped
    assert result.episodes == len(Episodes.open(mended)) == len(kept)
    for index, number in enumerate(kept):
        if number is not None:
            for name, value in Episodes.open(mended).episode(index).items():
                np.testing.assert_array_equal(value, episodes[number][name])
    assert Episodes.open(mended).features == FEATURES
    assert Episodes.open(mended).attrs == {"task": "toy"}
    if in_place:
        assert result.backup == tmp_path / "set.zarr.damaged"
        assert any(p.severity == "error" for p in check(result.backup))
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        ["set.zarr", "set.zarr.damaged"] if in_place else ["out.zarr", "set.zarr"]
    )


def test_repair_without_ends_or_with_a_lost_array_keeps_the_rest(tmp_path: Path) -> None:
    path = store(tmp_path / "set.zarr", make_episodes())
    lose_ends(path)
    lose_array(path)
    result = repair(path, tmp_path / "out.zarr")
    assert (result.episodes, result.steps) == (1, 75)
    assert "state" not in Episodes.open(tmp_path / "out.zarr").features


def test_repair_gives_foreign_stores_declared_features_and_byte_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 8, 8, 3))
    root = zarr.open_group(tmp_path / "f.zarr", mode="w", zarr_format=2)
    root.create_array("data/img", data=image.astype(np.float32))
    root.create_array("data/action", data=rng.normal(size=(30, 2)))
    root.create_array("meta/episode_ends", data=np.array([10, 30], np.int32))
    repair(tmp_path / "f.zarr", tmp_path / "out.zarr")
    out = Episodes.open(tmp_path / "out.zarr")
    assert out.declared
    assert out.zarr_format == 2
    assert out.features["img"] == Feature("img", (8, 8, 3), "uint8")
    np.testing.assert_array_equal(out.read("img", 0, 30), image)
    assert check(tmp_path / "out.zarr") == []


def test_repair_that_can_save_nothing_writes_nothing(tmp_path: Path) -> None:
    path = store(tmp_path / "set.zarr", make_episodes((5,)))
    set_value("data/action", 2, np.inf)(path)
    with pytest.raises(DataError, match="not one episode is sound"):
        repair(path, tmp_path / "out.zarr")
    with pytest.raises(DataError, match="not one episode is sound"):
        repair(path)
    assert [p.name for p in tmp_path.iterdir()] == ["set.zarr"]


def test_a_damaged_zip_is_repaired_into_a_zip(tmp_path: Path) -> None:
    episodes = make_episodes()
    path = store(tmp_path / "set.zarr", episodes)
    set_value("data/action", 2, np.nan)(path)
    zipped = tmp_path / "set.zarr.zip"
    pack(path, zipped)
    repair(zipped)
    assert_holds(zipped, episodes[1:])
    repair(path, tmp_path / "other.zip")
    assert_holds(tmp_path / "other.zip", episodes[1:])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_merge_puts_episodes_one_after_the_other(tmp_path: Path, zarr_format: Any) -> None:
    a, b = make_episodes((4, 20), 0), make_episodes((17,), 1)
    store(tmp_path / "a.zarr", a, zarr_format)
    store(tmp_path / "b.zarr", b)
    assert merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr") == 3
    assert_holds(tmp_path / "c.zarr", [*a, *b])
    merged = Episodes.open(tmp_path / "c.zarr")
    assert merged.zarr_format == zarr_format
    assert [m["store"] for m in merged.attrs["merged"]] == ["a.zarr", "b.zarr"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (Feature("state", (3,), unit="px", rate=10.0), "'state' has unit 'm'"),
        (Feature("state", (3,), unit="m", rate=20.0), "'state' has rate 10.0"),
        (None, "'state' is in"),
    ],
)
def test_merge_refuses_features_that_differ(tmp_path: Path, changed: Feature | None, message: str) -> None:
    features = {**FEATURES, "state": changed} if changed else {k: v for k, v in FEATURES.items() if k != "state"}
    store(tmp_path / "a.zarr", make_episodes((4,)))
    store(tmp_path / "b.zarr", [{k: v for k, v in e.items() if k in features} for e in make_episodes((4,))], features=features)
    with pytest.raises(DataError, match=message):
        merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def test_a_merge_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path / "a.zarr", make_episodes((4, 5)))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(combine, "_copy", stop)
    with pytest.raises(KeyboardInterrupt):
        merge([tmp_path / "a.zarr"], tmp_path / "c.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_split_deals_every_episode_once(tmp_path: Path) -> None:
    episodes = make_episodes(tuple(range(2, 12)))
    path = store(tmp_path / "set.zarr", episodes)
    parts = split(path, [0.7, 0.2, 0.1], tmp_path / "parts", seed=3)
    assert [p.name for p in parts] == ["set_train.zarr", "set_val.zarr", "set_test.zarr"]
    opened = [Episodes.open(p) for p in parts]
    assert [len(o) for o in opened] == [7, 2, 1]
    chosen = [i for o in opened for i in o.attrs["split"]["episodes"]]
    assert sorted(chosen) == list(range(10))
    for part in opened:
        assert_holds(part.path, [episodes[i] for i in part.attrs["split"]["episodes"]])
    with pytest.raises(DataError, match="already exists"):
        split(path, [0.7, 0.3], tmp_path / "parts")


@pytest.mark.parametrize("fractions", [[], [0.0, 0.5], [-0.1], [0.8, 0.3], [float("nan")], [0.2, 0.2, 0.2, 0.2, 0.2]])
def test_split_refuses_impossible_fractions(tmp_path: Path, fractions: list[float]) -> None:
    path = store(tmp_path / "set.zarr", make_episodes((3, 3)))
    with pytest.raises(DataError, match=r"fractions|too few"):
        split(path, fractions, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_pack_and_unpack_are_inverses_and_refuse_to_overwrite(tmp_path: Path) -> None:
    episodes = make_episodes()
    path = store(tmp_path / "set.zarr", episodes)
    pack(path, tmp_path / "set.zip")
    unpack(tmp_path / "set.zip", tmp_path / "again.zarr")
    assert_holds(tmp_path / "again.zarr", episodes)
    with Episodes.open(tmp_path / "again.zarr", "a") as again:
        again.append(episodes[0])
    for action in (lambda: pack(path, tmp_path / "set.zip"), lambda: unpack(tmp_path / "set.zip", tmp_path / "again.zarr")):
        with pytest.raises(DataError, match="already exists"):
            action()
    for action, message in (
        (lambda: pack(path, tmp_path / "set.tar"), "does not end in .zip"),
        (lambda: pack(tmp_path / "set.zip", tmp_path / "x.zip"), "no directory"),
        (lambda: unpack(path, tmp_path / "x.zarr"), "no zip archive"),
        (lambda: unpack(tmp_path / "set.zip", tmp_path / "x.zip"), "ends in .zip"),
    ):
        with pytest.raises(DataError, match=message):
            action()
    writer = Episodes.open(path, "a")
    with pytest.raises(DataError, match="written by another"):
        pack(path, tmp_path / "busy.zip")
    writer.close()


def test_repair_in_place_leaves_sound_and_read_only_stores_alone(tmp_path: Path) -> None:
    path = tmp_path / "sound.zarr"
    features = {"x": Feature("x", (2,), unit="m", rate=10.0)}
    with Episodes.create(path, features) as episodes:
        episodes.append({"x": np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)})
    with pytest.raises(DataError, match="nothing to repair in place"):
        repair(path)
    path.chmod(0o555)
    with pytest.raises(DataError, match="is read-only; repair a copy with --out"):
        repair(path)
    path.chmod(0o755)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sound.zarr"]
