"""How wide may the clip be? One run for each clip range from the same base, and a figure of exploring success against steps.

The guard is told only to warn, so that a collapse is seen to its end; where it would have stopped the run is marked by a cross.

    python -m benchmarks.clip_sweep outputs/reach_base --method fpo --clips .003 .01 .03 .1 --out outputs/clips
    python -m benchmarks.clip_sweep outputs/reach_base --method reinflow --clips .01 .02 .05 --out outputs/clips_reinflow
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from robopolicy.rl.guard import Guard, GuardConfig
from robopolicy.train.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def run(args: argparse.Namespace, clip: float) -> Path:
    """Make the run of one clip unless it is there."""
    out: Path = args.out / f"{args.method}_{clip:g}"
    if (out / "report.html").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    line = [
        *(sys.executable, "-m", "robopolicy.cli", "finetune", args.base, "--method", args.method, "--out", out),
        *(
            f"method.clip={clip:g}",
            "guard.stop=false",
            "eval.episodes=0",
            "eval.test_episodes=0",
            "eval.films=0",
            *args.overrides,
        ),
    ]
    with (out / "log.txt").open("w") as log:
        subprocess.run(list(map(str, line)), stdout=log, stderr=log, env=environment, check=True)
    return out


def stopped(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The row at which the guard would have stopped the run; None: never."""
    guard = Guard(GuardConfig())
    for index, row in enumerate(rows):
        successes, episodes = round(row["train/success"] * row["train/episodes"]), int(row["train/episodes"])
        if guard(int(row["step"]), [1.0] * successes + [0.0] * (episodes - successes)) is not None:
            return index
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--method", default="fpo")
    parser.add_argument("--clips", nargs="+", type=float, default=[0.003, 0.01, 0.03, 0.1])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args, rest = parser.parse_known_args()
    args.overrides += rest
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda clip: run(args, clip), args.clips))
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=120)
    for clip, folder in zip(args.clips, folders, strict=True):
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/success" in row]
        steps = np.array([row["train/env_steps"] for row in rows]) / 1e6
        success = np.array([row["train/success"] for row in rows])
        smooth = np.convolve(success, np.ones(5) / 5, mode="valid")
        (line,) = axes.plot(steps[4:], smooth, label=f"clip {clip:g}")
        if (where := stopped(rows)) is not None:
            axes.plot(steps[where], success[where], "x", color=line.get_color(), markersize=9, markeredgewidth=2)
        tenth = max(1, len(success) // 10)
        ends = f"{success[:tenth].mean():.3f} -> {success[-tenth:].mean():.3f}, best {smooth.max():.3f}"
        fate = "" if where is None else f", the guard would have stopped it at iteration {rows[where]['step']}"
        print(f"clip {clip:<6g} exploring success {ends}{fate}")
    axes.set(
        xlabel="million environment steps", ylabel="exploring success", ylim=(0, 1), title=f"{args.method}: width of the clip"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out / "clips.png")
    print(args.out / "clips.png")


if __name__ == "__main__":
    main()
