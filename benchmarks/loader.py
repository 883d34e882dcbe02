"""Training windows per second, state alone and with 96 x 96 images, against the same windows through lerobot's dataset.

The same frames are written to both formats: ours as zarr, lerobot's as parquet with PNG images (its lossless form). Both sides
read the same random windows (2 observations, 16 actions) on one thread and make batches of 64 as their training loops do: ours
gathers into pooled arrays and leaves images uint8 until they are on the device; lerobot decodes, converts to float32 CHW and
collates. A row gives ours with that conversion included. Frames are generated: a T of changing pose on white, as in Push-T.

    python -m benchmarks.loader --peer-python ~/lerobot/bin/python
    python -m benchmarks.loader --episodes 10 --rounds 3 --json outputs/loader.json
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.timing import Block, Peer, Times, conditions, finish, measure, print_rows, rows, take_turns
from robopolicy.data.episodes import Episodes
from robopolicy.data.windows import Windows
from robopolicy.errors import RobopolicyError
from robopolicy.features import Feature

FPS, HORIZON, LENGTH, BATCH = 10, 16, 100, 64
PEER_BATCHES = 2  # per block; ours takes many more in less time
OUR_BATCHES = 40
T_SHAPE = np.array([(-4, 0), (4, 0), (4, 2), (1, 2), (1, 8), (-1, 8), (-1, 2), (-4, 2)], float) * 4.0


def frames(episodes: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """``episodes`` of 100 steps each: state and action [N, 2], image [N, 96, 96, 3], ends [E]."""
    steps = episodes * LENGTH
    state = np.cumsum(rng.normal(size=(steps, 2)), axis=0).astype(np.float32)
    image = np.full((steps, 96, 96, 3), 255, np.uint8)
    for i in range(steps):
        angle, centre = rng.uniform(0, 2 * np.pi), rng.uniform(30, 66, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        cv2.fillPoly(image[i], [(T_SHAPE @ turn.T + centre).astype(np.int32)], (119, 136, 153), cv2.LINE_AA)
        x, y = rng.integers(5, 91, 2).tolist()
        cv2.circle(image[i], (x, y), 4, (65, 105, 225), -1, cv2.LINE_AA)
    action = (state + rng.normal(size=state.shape)).astype(np.float32)
    return {"state": state, "action": action, "image": image, "ends": np.arange(LENGTH, steps + 1, LENGTH)}


def write_ours(data: dict[str, np.ndarray], path: Path) -> None:
    names = [name for name in data if name != "ends"]
    features = {n: Feature(n, data[n].shape[1:], str(data[n].dtype), unit="" if n == "image" else "px", rate=FPS) for n in names}
    with Episodes.create(path, features) as episodes:
        for end in data["ends"].tolist():
            episodes.append({name: data[name][end - LENGTH : end] for name in names})


def draw(windows: Windows, count: int, rng: np.random.Generator) -> tuple[list[np.ndarray], list[list[int]]]:
    """``count`` batches of random windows: as indices of ours, and as the frame of lerobot's that is each window's newest."""
    ours, theirs = [], []
    for _ in range(count):
        chosen = rng.integers(len(windows), size=BATCH)
        first, low, high = windows.table[chosen].T
        ours.append(chosen)
        theirs.append(np.clip(first + 1, low, high - 1).tolist())
    return ours, theirs


def compare(data: dict[str, np.ndarray], folder: Path, rounds: int, peer: Peer | None) -> list[dict[str, Any]]:
    """All ways of reading the data, taking turns; speedups are per window."""
    rng = np.random.default_rng(0)
    write_ours(data, folder / "ours.zarr")
    obs = [name for name in ("state", "image") if name in data]
    windows = Windows(Episodes.open(folder / "ours.zarr"), obs, "action", n_obs_steps=2, horizon=HORIZON, n_action_steps=8)

    def as_given(index: np.ndarray) -> None:
        batch = windows.batch(index)
        for value in (*batch["obs"].values(), batch["action"], batch["action_is_pad"]):
            torch.from_numpy(value)

    def as_float(index: np.ndarray) -> None:
        torch.from_numpy(windows.batch(index)["obs"]["image"]).permute(0, 1, 4, 2, 3).float().div_(255).contiguous()

    def ours(read: Any) -> Block:
        def block() -> Times:
            indices = iter(draw(windows, OUR_BATCHES, rng)[0])
            return measure(lambda: read(next(indices)), OUR_BATCHES)

        return block

    contestants = {"ours": ours(as_given)}
    if "image" in data:
        contestants["ours, images to float32 CHW"] = ours(as_float)
    if peer is not None:
        np.savez(folder / "frames.npz", allow_pickle=False, **data)
        root = str(folder / "theirs")
        peer.ask(verb="write", frames=str(folder / "frames.npz"), root=root, fps=FPS)
        asked = {"verb": "load", "root": root, "fps": FPS, "horizon": HORIZON, "threads": 1}
        contestants = {"lerobot": lambda: peer.times(**asked, batches=draw(windows, PEER_BATCHES, rng)[1]), **contestants}
    return rows(take_turns(contestants, rounds), None if peer is None else "lerobot", "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that has lerobot 0.4.4 (see benchmarks/README.md)")
    parser.add_argument("--episodes", type=int, default=20, help="of 100 steps each")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each side, after one that warms up")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"started": conditions()}
    data = frames(arguments.episodes, np.random.default_rng(0))
    try:
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(Peer(arguments.peer_python)) if arguments.peer_python else None
            document["peer"] = peer.versions if peer else None
            for title, names in (("state", ("state", "action", "ends")), ("state and image 96 x 96", tuple(data))):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                table = compare({name: data[name] for name in names}, folder, arguments.rounds, peer)
                print_rows(f"{title}: batches of {BATCH} windows; speedups in CPU time [min, max]", table, "windows", BATCH)
                document[title] = table
    except RobopolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish(document, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
