"""Fault campaign: a policy moves the virtual arm over DDS, an input goes wrong, and the simulator says what the arm did.

For every fault and seed: the episode of the seed begins; at a moment drawn from the seed, while the arm moves, the fault sets in
and stays for 1.5 s. Measured in the simulator, not in the node: the time from the fault until targets stop changing,
and until no joint moves; the worst position, velocity, acceleration, jerk and height, of joints and of commands. From the node:
its mode and the cause it states; whether it goes on by itself when the fault goes, or when it is started again.

Every cell is written when it ends; run again, it goes on where it was. Cameras need a policy that sees ``image``; the one that is
made here when none is given does.

    python -m benchmarks.ros2_faults outputs/quickstart --seeds 20 --out outputs/ros2_faults
    python -m benchmarks.ros2_faults --streams camera --seeds 20 --out outputs/ros2_faults_camera
    python -m benchmarks.ros2_faults --quick
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ros2_cell import POLICY, Cell
from benchmarks.ros2_common import WANDERER_TASK, command_line, program, report, setting, wanderer
from hardware.ros2.services import until
from robopolicy.errors import RobopolicyError
from robopolicy.evaluate.run import SEEDS
from robopolicy.evaluate.stats import success_interval
from robopolicy.provenance import provenance


class Fault(NamedTuple):
    """Parameters of the virtual arm, and how long they are set [s]: holds of more than a second end in a stop."""

    settings: Mapping[str, float | bool]
    seconds: float = 1.5


# What is meant to be borne is borne (few, short, doubled, out of order); the rest must hold the arm.
FAULTS = {
    "none": Fault({}),
    "drop all": Fault({"drop": 1.0}),
    "drop all for 0.6 s": Fault({"drop": 1.0}, 0.6),
    "drop half": Fault({"drop": 0.5}),
    "delay 0.05 s": Fault({"delay": 0.05}),
    "delay 0.5 s": Fault({"delay": 0.5}),
    "duplicate all": Fault({"duplicate": 1.0}),
    "reorder half": Fault({"reorder": 0.5}),
    "NaN in all": Fault({"nan": 1.0}),
    "NaN in a fifth": Fault({"nan": 0.2}),
    "frozen": Fault({"freeze": True}),
    "stuck": Fault({"stuck": True}),
    "wrong names": Fault({"wrong_names": 1.0}),
    "wrong length": Fault({"wrong_length": 1.0}),
    "clock -0.5 s": Fault({"clock_jump": -0.5}),
    "clock +0.5 s": Fault({"clock_jump": 0.5}),
    "clock -1 h": Fault({"clock_jump": -3600.0}),
}
QUICK = (  # one of each kind
    "drop all", "delay 0.5 s", "duplicate all", "reorder half", "NaN in all", "frozen", "wrong names", "wrong length",
    "clock -0.5 s",
)  # fmt: skip
_QUICK = 1.0  # so long at most [s]: the arm holds, and goes on by itself
_RECOVER = 2.0  # after it [s]
_MOVING = 0.1  # the arm moved so shortly before the fault [s]
_TRIES = 5
# Beyond these something is wrong, whatever the fault: joint ranges [rad], workspace and table [m], shares of rated limits.
BOUNDS = {
    "position": 0.0, "workspace": 0.01, "table": 0.0, "velocity": 1.0, "command_workspace": 0.001, "command_table": 0.001,
    "command_velocity": 1.0, "command_acceleration": 1.0, "command_jerk": 1.0,
}  # fmt: skip


def run_cell(cell: Cell, stream: str, fault: str, seed: int, longest: float = math.inf) -> dict[str, Any]:
    """One fault in one episode, for ``longest`` at most [s]."""
    rng, (settings, seconds) = np.random.default_rng(seed), FAULTS[fault]
    for _ in range(_TRIES):
        cell.begin(seed)
        until(lambda: cell.mode == "running", 5.0)
        time.sleep(float(rng.uniform(0.3, 1.0)))
        before = cell.record()
        set_at = time.monotonic()
        cell.faults(stream, settings)
        moved = before["moved_at"]
        if cell.mode == "running" and moved is not None and before["time"] - moved < _MOVING:
            break
    else:
        raise RobopolicyError(f"seed {seed}: the arm did not move in {_TRIES} tries; is the policy alive? See the logs")
    time.sleep(min(seconds, longest))
    record = cell.record()
    begun = record["faults_set_at"] if settings else set_at
    during = [said for said in cell.said if said.time >= set_at]
    stopped = next((said for said in during if said.mode in ("holding", "stopped", "estopped")), None)
    mode, success = cell.mode, record["success"]
    row: dict[str, Any] = {"stream": stream, "fault": fault, "seed": seed, "load": round(os.getloadavg()[0], 2), "mode": mode}
    row["cause"] = next((said.cause for said in reversed(during) if said.cause), "") if stopped else ""
    row["to_hold"] = max(0.0, record["commanded_at"] - begun) if stopped and mode != "running" else None
    row["to_still"] = max(0.0, record["moved_at"] - begun) if stopped and mode != "running" else None
    row["holds"] = sum(said.mode == "holding" for said in during)
    cell.trigger("virtual_arm", "clear_faults")
    row["after"] = _recovery(cell, mode, success)
    record = cell.record()
    row |= {"success": record["success"], "reflexes": record["reflexes"], "real_time_factor": record["real_time_factor"]}
    row["put_in"] = record["faults"][stream]
    return row | {"worst": {key: value["worst"] for key, value in record.items() if isinstance(value, dict) and "worst" in value}}


def _recovery(cell: Cell, mode: str, success: bool) -> str:
    """What happens when the fault is gone."""
    if mode == "running":
        return "ran on"
    if until(lambda: cell.mode == "running", _RECOVER):
        return "by itself"
    try:
        cell.trigger(POLICY, "start")
    except RobopolicyError as error:
        return f"start refused: {error}".replace("the service 'robopolicy_policy/start' refused: ", "")
    return "by start" if until(lambda: cell.mode == "running", _RECOVER) else f"start, then {cell.mode}"


def violations(row: Mapping[str, Any]) -> list[str]:
    """What was beyond its bound in one cell."""
    found = [key for key, bound in BOUNDS.items() if row["worst"].get(key, -1.0) > bound]
    return found + ["reflex"] * (row["reflexes"] > 0)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line for each fault."""

    def spread(values: list[float]) -> str:
        return f"{np.median(values):.2f} / {max(values):.2f}" if values else ""

    loads, factors = [row["load"] for row in rows], [row["real_time_factor"] for row in rows]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"{len(rows)} cells, seeds {seeds[0]} to {seeds[-1]}; load {min(loads)} to {max(loads)}, "
        f"real-time factor {min(factors):.3f} to {max(factors):.3f}. Times in s, median / worst, measured in the simulator.",
        "",
        "| stream | fault | n | held | until commands stand | until joints stand | stated cause | afterwards | beyond limits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stream, fault in dict.fromkeys((row["stream"], row["fault"]) for row in rows):
        cells = [row for row in rows if (row["stream"], row["fault"]) == (stream, fault)]
        held = [row for row in cells if row["to_hold"] is not None]
        causes = ", ".join(sorted({" ".join(row["cause"].split(":")[0].split()[:2]) for row in held}))
        ends = ["held, ran on" if row["after"] == "ran on" and row.get("holds") else row["after"] for row in cells]
        after = ", ".join(f"{name} {ends.count(name)}" for name in sorted(set(ends)))
        bad = sorted({name for row in cells for name in violations(row)})
        lines.append(
            f"| {stream} | {fault} | {len(cells)} | {len(held)} | {spread([row['to_hold'] for row in held])} | "
            f"{spread([row['to_still'] for row in held])} | {causes} | {after} | {', '.join(bad) or 'none'} |"
        )
    broken = sum(bool(violations(row)) for row in rows)
    told = (*BOUNDS, "free_workspace", "acceleration", "jerk", "free_acceleration", "free_jerk")
    worst = {key: max(row["worst"].get(key, -np.inf) for row in rows) for key in told}
    unseen = sum("command_jerk" not in row["worst"] for row in rows)
    above, free = (
        sum(max(row["worst"].get(kind + key, 0.0) for key in ("acceleration", "jerk")) > 1.0 for row in rows)
        for kind in ("", "free_")
    )
    lines += [
        "",
        f"Cells with anything beyond its bound: {broken} of {len(rows)}, {success_interval(broken, len(rows))}.",
        "Worst of all: " + ", ".join(f"{key} {value:.3f}" for key, value in worst.items()) + ".",
        "Joint ranges in rad, workspace and table in m (negative: room left), the rest shares of the rated limits; acceleration "
        "and jerk without `command` are of the simulated joints, over 20 ms, late commands included; `free`: only while the arm "
        f"had not pushed against anything for 0.3 s. Joints were above the rated ones in {above} cells, in {free} of them "
        "freely. A late command stops the arm for a moment; drivers that smooth for longer (`--arm lookahead=0.05`) do not show "
        f"it. In {unseen} cells commands never came regularly enough for their acceleration and jerk to be judged.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--task", default="lift")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=SEEDS["validation"], help="seed")
    parser.add_argument("--streams", nargs="+", default=["state", "poses"], choices=["state", "poses", "camera"])
    parser.add_argument(
        "--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS)
    )
    parser.add_argument(
        "--arm", action="append", default=[], type=setting, metavar="NAME=VALUE", help="parameter of the virtual arm"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/ros2_faults"))
    parser.add_argument("--quick", action="store_true", help="one seed, a fault of each kind, of joint states, as CI runs it")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.streams, args.faults, args.out = 1, ["state"], list(QUICK), args.out / "quick"
    path = args.out / "faults.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in rows if "workspace" not in row["worst"] or "command_workspace" in row["worst"]]  # of an older program
    done = {(row["stream"], row["fault"], row["seed"]) for row in rows}
    cells = [(s, f, args.first + k) for k in range(args.seeds) for s in args.streams for f in args.faults]
    if missing := [key for key in cells if key not in done]:
        camera, size = "camera" in args.streams, WANDERER_TASK["image_size"]
        checkpoint = args.checkpoint or wanderer(args.out / "wanderer", camera)
        arm: dict[str, Any] = {"task": args.task, "cameras": camera}
        arm |= {} if args.checkpoint else {"image_height": size, "image_width": size}
        with Cell(checkpoint, args.out, arm | dict(args.arm), dict(args.policy)) as cell:
            for stream, fault, seed in missing:
                rows.append(row := run_cell(cell, stream, fault, seed, _QUICK if args.quick else math.inf))
                held = "" if row["to_hold"] is None else f"held after {row['to_hold']:.2f} s ({row['cause']}), "
                print(f"{stream}, {fault}, {seed}: {held}{row['after']}  {' '.join(violations(row))}", flush=True)
                settings = {key: str(value) for key, value in vars(args).items()}
                path.write_text(json.dumps({"provenance": provenance(), "args": settings, "rows": rows}, indent=1))
    asked = [row for row in rows if (row["stream"], row["fault"], row["seed"]) in set(cells)]
    return report(table(asked), args.out / "faults.md")


if __name__ == "__main__":
    program(main)
