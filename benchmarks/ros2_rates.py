"""Control of the virtual arm over real DDS for as long as asked: does the rate hold, how late is it, what does it cost?

Policy node (inference in a process of its own) and virtual arm in processes of their own; episodes one after another, so the arm
moves all the time. "Cameras on": both cameras are drawn and published, 15 pictures a second each, and received by this program.
Lateness, work and misses are the control thread's own (diagnostics, ten times a second, each with percentiles of the last 5 s);
the period is that of commands as they arrive here, another process, whose own jitter is in it.

    python -m benchmarks.ros2_rates outputs/quickstart --seconds 600 --json outputs/ros2_rates.json
    python -m benchmarks.ros2_rates outputs/quickstart --quick
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.ros2_cell import ARM
from benchmarks.ros2_common import command_line, program, wanderer
from benchmarks.ros2_watch import RANKS, Watch, WatchedCell, cpu_seconds, memory_mb, ranks, values
from hardware.ros2.profile import PROFILES, load_profile
from robopolicy.config import load_yaml
from robopolicy.evaluate.run import SEEDS
from robopolicy.provenance import provenance

EPISODE = 8.0  # [s]
_SETTLE = 1.0  # [s] of each episode that are left out: the first plan, the ramp


def measure(args: argparse.Namespace, rate: float, cameras: bool, folder: Path) -> dict[str, Any]:
    """One run."""
    profile_path = folder / f"virtual_{rate:g}.yaml"
    profile_path.write_text(yaml.safe_dump(load_yaml(PROFILES / "virtual.yaml") | {"rate": rate}))
    profile, load = load_profile(profile_path), [round(value, 2) for value in os.getloadavg()]
    arm = {"profile": profile_path, "cameras": cameras}
    policy = dict(args.policy) | {"profile": profile_path}
    with WatchedCell(args.checkpoint, folder / f"{rate:g}_{cameras}", arm, policy) as cell:
        watch = Watch(cell, profile, cameras)
        windows: list[tuple[float, float]] = []
        memory: list[tuple[float, dict[str, float]]] = []
        begun, seed, ran = time.monotonic(), SEEDS["validation"], 0.0
        used = {name: cpu_seconds(pid) for name, pid in cell.pids().items()}
        while ran < args.seconds:
            cell.begin(seed)
            start = time.monotonic()
            time.sleep(min(EPISODE, args.seconds - ran) + _SETTLE)
            end = time.monotonic()
            windows.append((start + _SETTLE, end))
            ran += end - start - _SETTLE
            memory.append((end - begun, {name: memory_mb(pid) for name, pid in cell.pids().items()}))
            seed += 1
        wall = time.monotonic() - begun
        cpu = {name: (cpu_seconds(pid) - used.get(name, 0.0)) / wall for name, pid in cell.pids().items()}
        factor = float(cell.record()["real_time_factor"])
        pids = dict(cell.pids())
    arrivals, moments = np.array(watch.commands), np.array([moment for moment, _ in watch.reports])
    periods = [np.diff(arrivals[(arrivals >= start) & (arrivals <= end)]) for start, end in windows]
    inside = [any(start <= moment <= end for start, end in windows) for moment in moments]
    reports = [report for (_, report), good in zip(watch.reports, inside, strict=True) if good]
    return {
        "rate": rate, "cameras": cameras, "seconds": ran, "episodes": len(windows), "load": [load, list(os.getloadavg())],
        "period_ms": ranks(1e3 * np.concatenate(periods)),
        "periods_above_1.5": float(np.mean(np.concatenate(periods) > 1.5 / rate)),
        "lateness_ms": _worst(reports, "lateness_ms"), "work_ms": _worst(reports, "work_ms"),
        "missed": _counted(reports, "missed"), "skipped": _counted(reports, "skipped"), "periods": _counted(reports, "periods"),
        "state_age_ms": ranks(1e3 * values(reports, "inputs", "age state")),
        "observation_to_command_ms": ranks(1e3 * values(reports, "inputs", "age command")),
        "inference_ms": {rank: found[-1] for rank in RANKS if len(found := values(reports, "inference", f"latency_ms {rank}"))},
        "cpu": cpu, "memory_mb": memory, "growth_mb_per_min": {name: growth(memory, name) for name in pids},
        "pictures_per_second": watch.pictures / wall, "real_time_factor": factor,
    }  # fmt: skip


def _worst(reports: Sequence[Any], name: str) -> dict[str, float]:
    """Of the percentiles of 5 s each: the median of the medians, and the largest of the others."""
    found = {rank: values(reports, "timing", f"{name} {rank}") for rank in RANKS}
    return {rank: float(np.median(v) if rank == "p50" else v.max()) for rank, v in found.items() if len(v)}


def _counted(reports: Sequence[Any], name: str) -> int:
    """How often, in all episodes; counters begin anew with each."""
    steps = np.diff(values(reports, "timing", name))
    return int(steps[steps > 0].sum())


def growth(memory: Sequence[tuple[float, dict[str, float]]], name: str) -> float:
    """Slope of resident memory without the first fifth, when everything is loaded once [MB per minute]; NaN: too short."""
    points = np.array([(moment / 60, entry[name]) for moment, entry in memory[len(memory) // 5 :] if name in entry])
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0]) if len(points) > 2 else float("nan")


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| Hz | cameras | s | missed | period ms p50 / p99 / max | lateness ms p50 / worst p99 / max | state age ms p50 / p99 "
        "| observation to command ms p50 / p99 | inference ms p50 / p99 | CPU arm / node / inference | growth MB/min | load |",
        "|" + "---|" * 12,
    ]
    for run in runs:
        cpu = " / ".join(f"{run['cpu'].get(name, 0):.0%}" for name in (ARM, "robopolicy_policy", "inference"))
        growths = " / ".join(f"{value:.2f}" for value in run["growth_mb_per_min"].values())
        share = run["missed"] / max(1, run["periods"])
        lines.append(
            f"| {run['rate']:g} | {'on' if run['cameras'] else 'off'} | {run['seconds']:.0f} "
            f"| {run['missed']} of {run['periods']} ({share:.2%}) | {_cells(run['period_ms'], 'p50', 'p99', 'max')} "
            f"| {_cells(run['lateness_ms'], 'p50', 'p99', 'max')} | {_cells(run['state_age_ms'], 'p50', 'p99')} "
            f"| {_cells(run['observation_to_command_ms'], 'p50', 'p99')} | {_cells(run['inference_ms'], 'p50', 'p99')} "
            f"| {cpu} | {growths} | {run['load'][0][0]} to {run['load'][1][0]:.2f} |"
        )
    return "\n".join(lines)


def _cells(figures: dict[str, float], *names: str) -> str:
    return " / ".join(f"{figures[name]:.2f}" if name in figures else "-" for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 250.0], help="of control [Hz]")
    parser.add_argument("--cameras", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--seconds", type=float, default=600.0, help="of control, each run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="100 Hz without cameras for 10 s, as CI runs it")
    args = parser.parse_args(argv)
    if args.quick:
        args.rates, args.cameras, args.seconds = [100.0], ["off"], 10.0
    found: dict[str, Any] = {"provenance": provenance(), "args": {k: str(v) for k, v in vars(args).items()}, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        args.checkpoint = args.checkpoint or wanderer(Path(folder) / "wanderer", image=False)
        for rate in args.rates:
            for cameras in args.cameras:
                found["runs"].append(measure(args, rate, cameras == "on", Path(folder)))
                print(table(found["runs"][-1:]), flush=True)
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(found, indent=1))
    print(table(found["runs"]))
    return 0


if __name__ == "__main__":
    program(main)
