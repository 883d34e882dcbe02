"""Fine-tuning campaigns: every method from the same base, on several training seeds, each tested on the same 400 episodes.

Each run is the command that a user would type, in a folder of its own; runs that are there already are not made again. Prints a
table: success of the base and of the last checkpoint on the same test seeds, McNemar's p, environment steps, minutes. With
several training seeds the interval is of the success pooled over them (hierarchical bootstrap).

    python -m benchmarks.finetune BASE --task sparse_reach --methods dppo reinflow fpo --seeds 0 1 2 --out outputs/reach_rl
    python -m benchmarks.finetune BASE --methods fpo --out outputs/clips method.clip=0.01      # one point of a clip sweep
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.evaluate.record import load_evaluation
from robopolicy.evaluate.stats import pooled_interval


def command(args: argparse.Namespace, method: str, seed: int, out: Path) -> list[str]:
    """The command line of one run."""
    task = ["--task", args.task] if args.task else []
    task += [part for text in args.task_arg for part in ("--task-arg", text)]
    chosen = ["--method", method, "--preset", args.preset, "--out", str(out), f"seed={seed}", *args.overrides]
    return [sys.executable, "-m", "robopolicy.cli", "finetune", args.base, *task, *chosen]


def run(args: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Make one run unless it is there, and read its result. A run that fails is reported, and the others go on."""
    out = args.out / f"{method}_{seed}"
    result = out / "test" / "comparison.json"
    if not result.exists():
        line = command(args, method, seed, out) if not (out / "checkpoints").exists() else [
            sys.executable, "-m", "robopolicy.cli", "finetune", "--resume", str(out)
        ]  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (out / "log.txt").open("a") as log:
            code = subprocess.run(line, stdout=log, stderr=log, env=environment, check=False).returncode
        (out / "exit_code").write_text(str(code))
    if not result.exists():
        return {"method": method, "seed": seed, "failed": f"see {out}/log.txt"}
    document = json.loads(result.read_text())
    pair = document["pairs"][0]
    before, after = (load_evaluation(out / "test" / name / "eval.json") for name in ("base", "result"))
    return {
        "method": method,
        "seed": seed,
        "before": before,
        "after": after,
        "p": pair["mcnemar"]["p_value"],
        "collapsed": (out / "exit_code").read_text() == "3",
        **document["run"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="checkpoint to improve")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    parser.add_argument("--task")
    parser.add_argument("--task-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="+", default=["dppo", "reinflow", "fpo", "policyflow", "gaussian"])
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--out", type=Path, required=True)
    args, rest = parser.parse_known_args()
    args.overrides += rest
    started = time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        pairs = [(method, seed) for seed, method in itertools.product(args.seeds, args.methods)]
        rows = list(pool.map(lambda pair: run(args, *pair), pairs))
    print(f"{'method':12} {'seed':>4} {'before':>7} {'after':>7} {'gain':>6} {'p':>9} {'M steps':>8} {'minutes':>8}")
    for method in args.methods:
        mine = [row for row in rows if row["method"] == method]
        done = [row for row in mine if "failed" not in row]
        for row in mine:
            if "failed" in row:
                print(f"{method:12} {row['seed']:4} {row['failed']}")
                continue
            before, after = row["before"].success.mean, row["after"].success.mean
            print(
                f"{method:12} {row['seed']:4} {before:7.3f} {after:7.3f} {100 * (after - before):+6.1f} {row['p']:9.1e} "
                f"{row['env_steps'] / 1e6:8.2f} {row['minutes']:8.1f}"
                + ("  collapsed; its best checkpoint" if row["collapsed"] else "")
            )
        if len(done) > 1:
            pooled = pooled_interval([row["after"].successes for row in done], np.random.default_rng(0), same_seeds=True)
            print(f"{method:12}  all {'':7} {pooled}")
    print(f"{(time.time() - started) / 60:.1f} minutes, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
