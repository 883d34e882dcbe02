"""Windows: the index arithmetic against a brute force of its own, and gathers against slow reading."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.data.combine import pack
from robopolicy.data.episodes import Episodes
from robopolicy.data.windows import Pool, Windows, split_episodes, window_table
from robopolicy.errors import DataError
from robopolicy.features import Feature

FEATURES = {
    "state": Feature("state", (2,)),
    "grip": Feature("grip", (), "float64"),
    "image": Feature("image", (8, 8, 3), "uint8"),
    "action": Feature("action", (2,)),
}
LENGTHS = (9, 3, 1, 30)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set.zarr"
    rng = np.random.default_rng(0)
    with Episodes.create(path, FEATURES) as episodes:
        for length in LENGTHS:
            episodes.append(
                {
                    "state": rng.normal(size=(length, 2)).astype(np.float32),
                    "grip": rng.normal(size=length),
                    "image": rng.integers(0, 255, (length, 8, 8, 3), dtype=np.uint8),
                    "action": rng.normal(size=(length, 2)).astype(np.float32),
                }
            )
    return path


def brute_force(lengths: list[int], n_obs: int, horizon: int, n_act: int) -> list[list[tuple[int, bool]]]:
    """From the definition: pad the episode by repeating its edges, slide over the padded list, one window per position."""
    windows, offset = [], 0
    for length in lengths:
        steps = [(offset + i, False) for i in range(length)]
        padded = [(offset, True)] * (n_obs - 1) + steps + [(offset + length - 1, True)] * (n_act - 1)
        windows += [padded[i : i + horizon] for i in range(len(padded) - horizon + 1)]
        offset += length
    return windows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    n_obs=st.integers(1, 4),
    n_act=st.integers(1, 8),
    extra=st.integers(0, 8),
)
def test_the_table_agrees_with_brute_force(lengths: list[int], n_obs: int, n_act: int, extra: int) -> None:
    horizon = n_obs - 1 + n_act + extra
    table = window_table(np.cumsum(lengths), n_obs, horizon, n_act, np.arange(len(lengths)))
    expected = brute_force(lengths, n_obs, horizon, n_act)
    assert len(table) == len(expected)
    for (first, low, high), window in zip(table.tolist(), expected, strict=True):
        steps = [first + i for i in range(horizon)]
        assert [(min(max(s, low), high - 1), not low <= s < high) for s in steps] == window


def test_batches_hold_what_slow_reading_gives(path: Path) -> None:
    episodes = Episodes.open(path)
    windows = Windows(episodes, ["state", "grip", "image"], "action", n_obs_steps=2, horizon=8, n_action_steps=5)
    expected = brute_force(list(LENGTHS), 2, 8, 5)
    raw = {name: episodes.read(name, 0, episodes.num_steps) for name in FEATURES}
    order = np.random.default_rng(0).permutation(len(windows))
    batch = windows.batch(order)
    assert len(windows) == len(expected)
    for row, number in enumerate(order):
        steps, pad = zip(*expected[number], strict=True)
        for name in ("state", "grip", "image"):
            np.testing.assert_array_equal(batch["obs"][name][row], raw[name][list(steps[:2])].astype(batch["obs"][name].dtype))
        np.testing.assert_array_equal(batch["action"][row], raw["action"][list(steps)])
        assert batch["action_is_pad"][row].tolist() == list(pad)
    assert batch["obs"]["image"].dtype == np.uint8
    assert batch["obs"]["grip"].dtype == batch["action"].dtype == np.float32
    assert "image" not in windows.batch(order, images=False)["obs"]


def test_the_first_executed_row_belongs_to_the_newest_observation(path: Path) -> None:
    """Every step of an episode is the current step of exactly one window, and its action is row n_obs_steps - 1."""
    episodes = Episodes.open(path)
    windows = Windows(episodes, ["state"], "action", n_obs_steps=3, horizon=7, n_action_steps=5)
    batch = windows.batch(np.arange(len(windows)))
    state, action = (np.concatenate([episodes.episode(i)[k] for i in (0, 1, 2, 3)]) for k in ("state", "action"))
    np.testing.assert_array_equal(batch["obs"]["state"][:, -1], state)
    np.testing.assert_array_equal(batch["action"][:, 2], action)


def test_chosen_episodes_only(path: Path) -> None:
    episodes = Episodes.open(path)
    windows = Windows(episodes, ["state"], "action", 1, 4, 4, episode_ids=np.array([3]))
    assert len(windows) == LENGTHS[3]
    np.testing.assert_array_equal(windows.batch(np.arange(30))["obs"]["state"][:, 0], episodes.episode(3)["state"])


def test_a_pooled_buffer_is_not_filled_again_while_anything_holds_it(path: Path) -> None:
    windows = Windows(Episodes.open(path), ["state", "image"], "action", 2, 8, 5)
    rng = np.random.default_rng(0)
    held = [windows.batch(rng.integers(0, len(windows), 16)) for _ in range(3)]
    views = [torch.from_numpy(windows.batch(rng.integers(0, len(windows), 16))["action"])[3:] for _ in range(40)]
    copies = [b["obs"]["image"].copy() for b in held], [v.clone() for v in views]
    for _ in range(50):
        windows.batch(rng.integers(0, len(windows), 16))
    assert all(np.array_equal(b["obs"]["image"], c) for b, c in zip(held, copies[0], strict=True))
    assert all(torch.equal(v, c) for v, c in zip(views, copies[1], strict=True))


def test_a_pooled_buffer_is_used_again_once_free() -> None:
    pool = Pool()
    first = pool.take((4, 4), np.dtype(np.float32))
    address = first.ctypes.data
    assert pool.take((4, 4), np.dtype(np.float32)).ctypes.data != address
    del first
    assert pool.take((4, 4), np.dtype(np.float32)).ctypes.data == address


def frame_files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.suffix == ".npy"}


def images(path: Path) -> np.ndarray:
    windows = Windows(Episodes.open(path), ["image"], "action", 1, 1, 1)
    return windows.batch(np.arange(len(windows)))["obs"]["image"][:, 0]


def test_decoded_images_are_kept_and_renewed_when_the_store_changes(tmp_path: Path) -> None:
    path = tmp_path / "set.zarr"
    features = {name: FEATURES[name] for name in ("image", "action")}
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    with Episodes.create(path, features) as episodes:
        episodes.append({"image": stack[:20], "action": np.zeros((20, 2), np.float32)})
    np.testing.assert_array_equal(images(path), stack[:20])
    folder = tmp_path / "set.zarr.frames"
    first = frame_files(folder)
    images(path)
    assert frame_files(folder) == first
    with Episodes.open(path, "a") as episodes:
        episodes.append({"image": stack[20:], "action": np.zeros((20, 2), np.float32)})
    np.testing.assert_array_equal(images(path), stack)
    second = frame_files(folder)
    assert len(second) == 1
    assert second != first
    # The same number of frames with other content, as a re-recording at the same path makes.
    chunk = path / "data/image/c.0.0.0.0"
    other = tmp_path / "other.zarr"
    with Episodes.create(other, features) as episodes:
        episodes.append({"image": stack[::-1].copy(), "action": np.zeros((40, 2), np.float32)})
    chunk.write_bytes((other / "data/image/c.0.0.0.0").read_bytes())
    assert not np.array_equal(images(path)[:16], stack[:16])


def test_a_killed_decoding_leaves_no_cache_that_is_taken_for_whole(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = Episodes.open(path)
    reads = 0
    real = Episodes.read

    def killed(self: Episodes, name: str, start: int, stop: int) -> np.ndarray:
        nonlocal reads
        reads += name == "image"
        if reads == 2:
            raise KeyboardInterrupt
        return real(self, name, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Episodes, "read", killed)
        patch.setattr(Episodes, "blocks", lambda self, name: (self.read(name, a, a + 1) for a in range(self.num_steps)))
        with pytest.raises(KeyboardInterrupt):
            Windows(episodes, ["image"], "action", 1, 1, 1, cache_dir=tmp_path)
    assert frame_files(tmp_path) == set()
    windows = Windows(episodes, ["image"], "action", 1, 1, 1, cache_dir=tmp_path)
    np.testing.assert_array_equal(windows.batch(np.arange(43))["obs"]["image"][:, 0], episodes.read("image", 0, 43))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".npy"]


def test_a_zip_trains_as_its_directory(tmp_path: Path, path: Path) -> None:
    pack(path, tmp_path / "set.zarr.zip")
    np.testing.assert_array_equal(images(tmp_path / "set.zarr.zip"), images(path))


def test_a_full_disk_is_said_before_decoding(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robopolicy.data import cache

    monkeypatch.setattr(cache, "_SPARE", 2**62)
    with pytest.raises(DataError, match=r"free some space or set data\.cache_dir"):
        Windows(Episodes.open(path), ["image"], "action", 1, 1, 1, cache_dir=tmp_path)


def test_wrong_requests_name_the_mend(path: Path) -> None:
    episodes = Episodes.open(path)
    with pytest.raises(DataError, match="did you mean 'state'"):
        Windows(episodes, ["stat"], "action", 1, 4, 4)
    with pytest.raises(DataError, match="must fit into horizon"):
        Windows(episodes, ["state"], "action", 2, 4, 4)
    with pytest.raises(DataError, match="shorten the horizon"):
        Windows(episodes, ["state"], "action", 1, 64, 1)
    with pytest.raises(DataError, match="outside"):
        Windows(episodes, ["state"], "action", 1, 4, 4, episode_ids=np.array([4]))


@given(n=st.integers(0, 300), fraction=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_splits_are_disjoint_complete_and_repeatable(n: int, fraction: float, seed: int) -> None:
    train, val = split_episodes(n, fraction, seed)
    assert sorted([*train, *val]) == list(range(n))
    assert (len(val) > 0) == (fraction > 0 and n > 1)
    assert len(train) > 0 or n == 0
    again = split_episodes(n, fraction, seed)
    assert np.array_equal(train, again[0])
    assert np.array_equal(val, again[1])
