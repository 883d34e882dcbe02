"""EpisodeWriter: the control loop never waits, and errors reach it on the next call."""

import errno
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopolicy.data.episodes import Episodes
from robopolicy.data.writer import EpisodeWriter
from robopolicy.errors import DataError
from robopolicy.features import Feature

FEATURES = {"state": Feature("state", (3,)), "image": Feature("image", (8, 8, 3), "uint8"), "action": Feature("action", (2,))}


def make_step(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "state": rng.normal(size=3).astype(np.float32),
        "image": rng.integers(0, 255, (8, 8, 3), dtype=np.uint8),
        "action": rng.normal(size=2).astype(np.float32),
    }


@pytest.fixture
def episodes(tmp_path: Path) -> Episodes:
    return Episodes.create(tmp_path / "set.zarr", FEATURES)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_steps_come_back_as_added_whatever_the_block(episodes: Episodes, length: int) -> None:
    rng = np.random.default_rng(0)
    with EpisodeWriter(episodes, block=8) as writer:
        for number in range(2):
            steps = [make_step(rng) for _ in range(length)]
            for step in steps:
                writer.add(step)
                for value in step.values():
                    kept = value.copy()
                    value[:] = 0  # the writer has its own copy
                    step[next(k for k, v in step.items() if v is value)] = kept
            assert writer.commit() == number
            stored = Episodes.open(episodes.path).episode(number)
            for name in FEATURES:
                np.testing.assert_array_equal(stored[name], np.stack([s[name] for s in steps]))


def test_discarded_and_abandoned_episodes_leave_no_trace(episodes: Episodes) -> None:
    rng = np.random.default_rng(0)
    with EpisodeWriter(episodes, block=4) as writer:
        for _ in range(10):
            writer.add(make_step(rng))
        writer.discard()
        for _ in range(3):
            writer.add(make_step(rng))
        writer.commit()
        for _ in range(10):
            writer.add(make_step(rng))
    assert Episodes.open(episodes.path).ends.tolist() == [3]
    with pytest.raises(DataError, match="closed"):
        writer.add(make_step(rng))


def test_an_empty_episode_is_refused(episodes: Episodes) -> None:
    with EpisodeWriter(episodes) as writer, pytest.raises(DataError, match="no steps"):
        writer.commit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("image"), "lacks feature 'image'"),
        (lambda s: s.update(imag=s["image"]), "undeclared feature 'imag'"),
        (lambda s: s.update(state=np.zeros(4)), "shape"),
        (lambda s: s.update(state=np.array([0, np.nan, 0])), "NaN"),
        (lambda s: s.update(image=s["image"] / 255), "does not convert"),
    ],
)
def test_a_bad_step_is_refused_at_once_and_the_episode_goes_on(episodes: Episodes, change: Any, message: str) -> None:
    rng = np.random.default_rng(0)
    with EpisodeWriter(episodes, block=4) as writer:
        writer.add(make_step(rng))
        step = make_step(rng)
        change(step)
        with pytest.raises(DataError, match=message):
            writer.add(step)
        writer.add(make_step(rng))
        writer.commit()
    assert Episodes.open(episodes.path).ends.tolist() == [2]


@pytest.fixture
def release(episodes: Episodes, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, the disk hangs."""
    event, real = threading.Event(), episodes.extend

    def slow(block: Any) -> None:
        event.wait(30)
        real(block)

    monkeypatch.setattr(episodes, "extend", slow)
    return event


def test_add_does_not_wait_for_a_slow_disk_and_gives_up_when_too_much_waits(episodes: Episodes, release: threading.Event) -> None:
    rng = np.random.default_rng(0)
    writer = EpisodeWriter(episodes, block=4, max_blocks=5)
    slowest = 0.0
    for _ in range(20):
        step = make_step(rng)
        start = time.perf_counter()
        writer.add(step)
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1.0  # the disk hangs for as long as the test likes

    def fill() -> None:
        for _ in range(20):
            writer.add(make_step(rng))

    with pytest.raises(DataError, match="too slow"):
        fill()
    with pytest.raises(DataError, match=r"too slow.*discard"):
        writer.add(make_step(rng))
    release.set()
    with pytest.raises(DataError, match="too slow"):
        writer.commit()
    writer.discard()
    writer.add(make_step(rng))
    assert writer.commit() == 0
    writer.close()
    assert Episodes.open(episodes.path).ends.tolist() == [1]


def test_steps_from_files_wait_for_a_slow_disk(episodes: Episodes, release: threading.Event) -> None:
    steps = [make_step(np.random.default_rng(seed)) for seed in range(64)]
    with EpisodeWriter(episodes, block=2, max_blocks=1, wait=True) as writer:
        timer = threading.Timer(0.3, release.set)
        timer.start()
        for step in steps:
            writer.add(step)
        assert release.is_set(), "it has waited"
        assert writer.commit() == 0
        timer.cancel()
    assert Episodes.open(episodes.path).ends.tolist() == [64]


def test_waiting_ends_with_a_disk_that_fails(episodes: Episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(block: Any) -> None:
        raise DataError("No space left")

    monkeypatch.setattr(episodes, "extend", full)
    rng = np.random.default_rng(0)
    with EpisodeWriter(episodes, block=2, max_blocks=1, wait=True) as writer:
        for _ in range(64):
            try:
                writer.add(make_step(rng))
            except DataError:
                break
        with pytest.raises(DataError, match="No space left"):
            writer.commit()


def test_a_full_disk_is_reported_by_the_next_call_and_costs_one_episode(
    episodes: Episodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robopolicy.data import store

    rng = np.random.default_rng(0)
    writer = EpisodeWriter(episodes, block=2)
    writer.add(make_step(rng))
    writer.commit()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_file", full)
        writer.add(make_step(rng))
        writer.add(make_step(rng))
        with pytest.raises(DataError, match=r"No space left"):
            writer.commit()
    writer.discard()
    writer.add(make_step(rng))
    assert writer.commit() == 1
    writer.close()
    assert Episodes.open(episodes.path).ends.tolist() == [1, 2]
