"""kill -9 of the policy node, of its inference process and of the virtual arm, while the arm moves: what did the arm do?

Position controllers hold the last target when nobody commands any more, so a killed node leaves an arm that stands; a killed
inference process is noticed by the node, which brakes; a killed arm leaves a node without measurements, which must hold and say
so. What the arm did comes from the simulator's own record; times are until its joints stood (below 0.01 rad/s). An arm that is
stopped while it pushes against something creeps on towards its target: those trials are told apart.

    python -m benchmarks.ros2_kill outputs/quickstart --seeds 20 --json outputs/ros2_kill.json
    python -m benchmarks.ros2_kill outputs/quickstart --quick
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ros2_cell import ARM, POLICY
from benchmarks.ros2_common import command_line, program, wanderer
from benchmarks.ros2_watch import Watch, WatchedCell
from hardware.ros2 import shm
from hardware.ros2.profile import load_profile
from hardware.ros2.services import until
from robopolicy.evaluate.run import SEEDS
from robopolicy.provenance import provenance

VICTIMS = ("node", "inference", "arm")
_RATIOS = ("velocity", "acceleration", "jerk", "free_acceleration", "free_jerk")


def trial(args: argparse.Namespace, victim: str, seed: int, folder: Path) -> dict[str, Any]:
    """Start everything, let the arm move, kill one process, and look."""
    profile, load = load_profile("virtual"), round(os.getloadavg()[0], 2)
    with WatchedCell(args.checkpoint, folder / f"{victim}_{seed}", {"cameras": False}, dict(args.policy)) as cell:
        watch = Watch(cell, profile, cameras=False)
        cell.begin(seed)
        moving = until(lambda: _speed(watch, profile.rate) > 0.1, 20.0)  # somewhere in the approach
        time.sleep(0.2 + 0.05 * (seed % 10))
        pids = cell.pids()
        pid, inference = pids[{"node": POLICY, "inference": "inference", "arm": ARM}[victim]], pids.get("inference")
        speed = _speed(watch, profile.rate)
        left = shm.segments(pid)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        said = len(cell.said)
        time.sleep(args.watch)
        found: dict[str, Any] = {"victim": victim, "seed": seed, "load": load, "moving": moving, "speed": speed}
        arrivals = np.array(watch.commands)
        found["last_command_s"] = float(arrivals[-1] - killed)
        found["inference_alive"] = inference is not None and inference in cell.pids().values()
        if victim != "arm":
            record = cell.record()
            found["still_s"] = None if record["moved_at"] is None else max(0.0, record["moved_at"] - killed)
            found["pushed"] = record["pushed_at"] is not None and record["pushed_at"] > killed
            found["reflexes"] = record["reflexes"]
            found |= {key: record[key]["worst"] for key in _RATIOS if key in record}
            found["travel_rad"] = _travel(record, watch, killed, profile.command.joints)
        if victim != "node":
            later = cell.said[said:]
            found["said"] = [f"{entry.mode}: {entry.cause}" for entry in later]
            found["said_s"] = later[0].time - killed if later else None
            moved = np.array([step.max() > 1e-7 for step in np.abs(np.diff(watch.targets[: len(arrivals)], axis=0))])
            found["targets_moved_s"] = float(arrivals[1:][moved][-1] - killed) if moved.any() else 0.0
        shm.remove(path for path in shm.leftovers(age=0.0) if shm.belongs(path, left))  # what a killed process cannot
        return found


def _speed(watch: Watch, rate: float) -> float:
    """Of the last commands, the fastest joint [rad/s]."""
    last = np.array(watch.targets[-10:])
    return float(np.abs(np.diff(last, axis=0)).max() * rate) if len(last) > 2 else 0.0


def _travel(record: dict[str, Any], watch: Watch, killed: float, joints: Sequence[str]) -> float:
    """How far the joint that went farthest came from where it was told to be at the kill [rad]."""
    before = [target for moment, target in zip(watch.commands, watch.targets, strict=True) if moment <= killed]
    return float(np.abs(np.array([record["positions"][name] for name in joints]) - before[-1]).max())


def table(trials: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| killed | n | pushed nothing: n | stands after s p50 / max | travel rad p50 / max | pushed: stands | travel | reflexes "
        "| worst velocity, acceleration, jerk; the last two while it pushed nothing, all / rated | last moving command s max "
        "| node said | inference alive |",
        "|" + "---|" * 12,
    ]
    for victim in dict.fromkeys(entry["victim"] for entry in trials):
        rows = [entry for entry in trials if entry["victim"] == victim]
        seen = [row for row in rows if "pushed" in row]  # by the simulator: it lived on
        free, pushed = ([row for row in seen if row["pushed"] == kind] for kind in (False, True))

        def two(key: str, rows: list[dict[str, Any]]) -> str:
            values = [row[key] for row in rows if row.get(key) is not None]
            return f"{np.median(values):.2f} / {max(values):.2f}" if values else "-"

        count, reflexes = (f"{len(free)}", f"{sum(row['reflexes'] for row in seen)}") if seen else ("-", "-")
        times = (f"{two('still_s', kind)} | {two('travel_rad', kind)}" for kind in (free, pushed))
        worst = ", ".join(f"{max(row[key] for row in seen if key in row):.2f}" for key in _RATIOS if any(key in r for r in seen))
        said = sorted({re.sub(r"[\d.]+", "#", text) for row in rows for text in row.get("said", ())})
        last = max(row.get("targets_moved_s", row["last_command_s"]) for row in rows)
        lines.append(
            f"| {victim} | {len(rows)} | {count} | {' | '.join(times)} | {reflexes} | {worst or '-'} | {last:.2f} "
            f"| {'; '.join(said) or '-'} | {sum(row['inference_alive'] for row in rows)} |"
        )
    loads = [entry["load"] for entry in trials]
    return "\n".join([*lines, "", f"Load {min(loads)} to {max(loads)}."])


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--seeds", type=int, default=20, help="trials of each")
    parser.add_argument("--watch", type=float, default=3.0, help="so long after the kill [s]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one trial of each, as CI runs it")
    args = parser.parse_args(argv)
    seeds = range(SEEDS["validation"], SEEDS["validation"] + (1 if args.quick else args.seeds))
    trials: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        args.checkpoint = args.checkpoint or wanderer(Path(folder) / "wanderer", image=False)
        for seed in seeds:  # victims take turns, so that drift of the machine meets all alike
            for victim in args.victims:
                trials.append(trial(args, victim, seed, Path(folder)))
                print(json.dumps(trials[-1]), flush=True)
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps({"provenance": provenance(), "trials": trials}, indent=1))
    print(table(trials))
    return 0


if __name__ == "__main__":
    program(main)
