"""A policy on the virtual arm over real DDS, node and arm in processes of their own, against plain simulation, seed by seed.

Plain simulation steps the task and the policy in turn: nothing is late, no safety filter. The virtual arm runs in real time, so a
busy machine delays it: the load average and the real-time factor are printed. Every episode is written when it ends; run again,
it goes on where it was.

    python -m benchmarks.ros2_episodes outputs/quickstart --out outputs/ros2_episodes
    python -m benchmarks.ros2_episodes --quick
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ros2_cell import Cell
from benchmarks.ros2_common import command_line, program, report, wanderer
from robopolicy.errors import RobopolicyError
from robopolicy.evaluate.run import SEEDS, evaluate
from robopolicy.evaluate.stats import mcnemar, success_difference, success_interval
from robopolicy.policy import load_policy
from robopolicy.provenance import provenance
from robopolicy.task import TaskSpec

EPISODE = 8.0  # at most [s of the simulated world]
_QUICK = 2.0  # the same of --quick
_WALL = 4.0  # times as long at most, by the wall clock
_POLL = 0.1  # [s]


def plain(checkpoint: str, task: str, seeds: Sequence[int], seconds: float) -> dict[int, bool]:
    """Success of each seed in plain simulation, episodes as long as on the virtual arm."""
    spec = TaskSpec(task)
    steps = round(seconds * spec.make().rate)
    found = evaluate(load_policy(checkpoint), TaskSpec(task, {"max_episode_steps": steps}), seeds, num_envs=10, progress=False)
    return {episode.seed: bool(episode.success) for episode in found.episodes}


def episode(cell: Cell, seed: int, seconds: float) -> dict[str, Any]:
    """One episode on the virtual arm."""
    load = round(os.getloadavg()[0], 2)
    first, begun = len(cell.said), time.monotonic()
    try:
        cell.begin(seed)
    except RobopolicyError as error:
        return {"seed": seed, "success": False, "refused": str(error), "load": load}
    before = cell.record()["steps"]
    while True:
        time.sleep(_POLL)
        record = cell.record()
        elapsed = (record["steps"] - before) * record["timestep"]
        over = elapsed > seconds or time.monotonic() - begun > _WALL * seconds
        if record["success"] or over or cell.mode in ("stopped", "estopped"):
            break
    stops = [f"{said.mode}: {said.cause}" for said in cell.said[first:] if said.mode in ("holding", "stopped")]
    stops = [stop for stop in stops if not stop.endswith("asked")]
    return {"seed": seed, "success": record["success"], "seconds": elapsed, "stops": stops, "load": load, "record": record}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    ros, sim = (np.array([found[key][seed]["success"] for seed in found["seeds"]], bool) for key in ("ros", "plain"))
    n, difference, test = len(ros), success_difference(sim, ros), mcnemar(sim, ros)
    rows = [found["ros"][seed] for seed in found["seeds"]]
    ran = [row["record"] for row in rows if "record" in row]

    def worst(key: str) -> str:
        return f"{max((record[key]['worst'] for record in ran if key in record), default=float('nan')):.3f}"

    loads, factors = [row["load"] for row in rows], [record["real_time_factor"] for record in ran]
    seeds = f"{found['seeds'][0]} to {found['seeds'][-1]}"
    lines = [
        f"n = {n} episodes, seeds {seeds}, at most {found['seconds']:g} s each; load {min(loads)} to {max(loads)}, "
        f"real-time factor {min(factors, default=0):.3f} to {max(factors, default=0):.3f}",
        "",
        "| | success | 95 % interval |",
        "|---|---|---|",
        f"| plain simulation | {sim.sum()}/{n} | {success_interval(int(sim.sum()), n)} |",
        f"| virtual arm over DDS | {ros.sum()}/{n} | {success_interval(int(ros.sum()), n)} |",
        f"| difference, paired | | {difference.signed()}, McNemar p = {test.p_value:.2f} |",
        "",
        f"Episodes with a hold or stop: {sum(bool(row.get('stops')) for row in rows)}; refused starts: "
        f"{sum('refused' in row for row in rows)}; reflexes of the arm: {sum(record['reflexes'] for record in ran)}.",
        f"Worst in the simulator, as shares of the rated limits: velocity {worst('velocity')}, "
        f"acceleration {worst('acceleration')}, jerk {worst('jerk')} (while it pushed against "
        f"nothing {worst('free_acceleration')}, {worst('free_jerk')}); beyond joint ranges {worst('position')} rad, "
        f"workspace {worst('workspace')} m, table {worst('table')} m (negative: room left).",
    ]  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--task", default="lift")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--first", type=int, default=SEEDS["test"], help="seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/ros2_episodes"))
    parser.add_argument("--quick", action="store_true", help="two short episodes, as CI runs it")
    args = parser.parse_args(argv)
    seconds = EPISODE
    if args.quick:
        args.episodes, args.out, seconds = 2, args.out / "quick", _QUICK
    seeds = [args.first + k for k in range(args.episodes)]
    path = args.out / "episodes.json"
    checkpoint = args.checkpoint or str(wanderer(args.out / "wanderer", image=False))
    found: dict[str, Any] = {"ros": {}, "plain": {}}
    if path.is_file():
        before = json.loads(path.read_text())
        found |= {key: {int(seed): row for seed, row in before[key].items()} for key in ("ros", "plain")}
    found |= {
        "seeds": seeds,
        "seconds": seconds,
        "provenance": provenance(),
        "args": {key: str(value) for key, value in vars(args).items()},
    }
    if missing := [seed for seed in seeds if seed not in found["plain"]]:
        found["plain"] |= {seed: {"success": success} for seed, success in plain(checkpoint, args.task, missing, seconds).items()}
    if missing := [seed for seed in seeds if seed not in found["ros"]]:
        arm = {"task": args.task, "cameras": False}
        with Cell(checkpoint, args.out, arm, dict(args.policy)) as cell:
            for seed in missing:
                found["ros"][seed] = row = episode(cell, seed, seconds)
                said = row.get("refused", row.get("stops"))
                print(f"{seed}: {'success' if row['success'] else 'failure'} {said or ''}", flush=True)
                path.write_text(json.dumps(found, indent=1))
    return report(table(found), args.out / "episodes.md")


if __name__ == "__main__":
    program(main)
