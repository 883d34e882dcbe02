"""Kill -9 a recording process again and again, and count what is lost.

A child records episodes of state, image and action without end, alternately as a stream (EpisodeWriter) and at once
(Episodes.append), and says "ack N" when the library reports episode N stored. The parent reads the store while the child writes,
kills the child at a random moment, and checks every byte of every episode. Prints one line of JSON; exit 1 if anything was lost.

    python benchmarks/crash_recording.py --kills 50
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robopolicy.data.check import check
from robopolicy.data.episodes import Episodes
from robopolicy.data.writer import EpisodeWriter
from robopolicy.errors import DataError
from robopolicy.features import Feature

FEATURES = {
    "state": Feature("state", (7,), unit="m", rate=20.0),
    "image": Feature("image", (48, 48, 3), "uint8", rate=20.0),
    "action": Feature("action", (7,), unit="m", rate=20.0),
}


def make_episode(index: int) -> dict[str, np.ndarray]:
    """Episode number ``index``: random numbers that both processes can make."""
    rng = np.random.default_rng(index)
    length = int(rng.integers(1, 80))
    return {
        "state": rng.normal(size=(length, 7)).astype(np.float32),
        "image": rng.integers(0, 255, (length, 48, 48, 3), dtype=np.uint8),
        "action": rng.normal(size=(length, 7)).astype(np.float32),
    }


def record(path: Path) -> None:
    """Record for ever."""
    with Episodes.open(path, "a") as episodes:
        print("ready", flush=True)
        while True:
            episode = make_episode(len(episodes))
            if len(episodes) % 2:
                index = episodes.append(episode)
            else:
                with EpisodeWriter(episodes, block=16, wait=True) as writer:
                    for step in range(len(episode["action"])):
                        writer.add({name: value[step] for name, value in episode.items()})
                    index = writer.commit()
            print(f"ack {index}", flush=True)


def holds(episodes: Episodes, start: int = 0) -> bool:
    """Whether episodes from ``start`` on are what was recorded, to the byte."""
    for index in range(start, len(episodes)):
        expected = make_episode(index)
        found = episodes.episode(index)
        if any(not np.array_equal(found[name], expected[name]) for name in FEATURES):
            return False
    return True


def run(path: Path, kills: int, zarr_format: Literal[2, 3], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    Episodes.create(path, FEATURES, zarr_format=zarr_format).close()
    acknowledged = in_progress = lost = damaged = reads = bad_reads = 0
    pace = 0.3  # seconds an episode takes
    for _ in range(kills):
        command = [sys.executable, __file__, "--record", str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError("the recording process did not start")
        # By progress rather than by the clock: up to 3 more episodes, then a part of the time that one takes, on any machine.
        began, before, target = time.monotonic(), acknowledged, acknowledged + int(rng.integers(0, 4))
        stored = before
        while stored < target and time.monotonic() < began + 120:
            try:
                reader = Episodes.open(path)
                stored = len(reader)
                bad_reads += not holds(reader, max(0, stored - 2))
            except DataError as error:
                print(f"concurrent read: {error}", file=sys.stderr)
                bad_reads += 1
            reads += 1
        if stored > before:
            pace = (time.monotonic() - began) / (stored - before)
        time.sleep(rng.uniform(0, pace))
        child.send_signal(signal.SIGKILL)
        said = child.stdout.read().splitlines()
        acks = [int(line[4:]) for line in said if line.startswith("ack ") and line[4:].isdigit()]
        child.wait()
        acknowledged = max([acknowledged, *(a + 1 for a in acks)])
        try:
            episodes = Episodes.open(path)
            stored = len(episodes)
            damaged += not holds(episodes) or any(p.severity == "error" for p in check(path))
        except DataError as error:
            print(f"after a kill: {error}", file=sys.stderr)
            damaged += 1
            stored = 0
        lost += max(0, acknowledged - stored)
        in_progress += stored > acknowledged  # committed, but killed before it could say so
        acknowledged = max(acknowledged, stored)
    return {
        "kills": kills,
        "zarr_format": zarr_format,
        "episodes_acknowledged": acknowledged,
        "episodes_lost": lost,
        "damaged_stores": damaged,
        "committed_without_ack": in_progress,
        "concurrent_reads": reads,
        "bad_concurrent_reads": bad_reads,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--zarr-format", type=int, choices=[2, 3], default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record is not None:
        record(args.record)
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder) / "set.zarr", args.kills, args.zarr_format, args.seed)
    print(json.dumps(result))
    return 1 if result["episodes_lost"] or result["damaged_stores"] or result["bad_concurrent_reads"] else 0


if __name__ == "__main__":
    sys.exit(main())
