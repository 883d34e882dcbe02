"""What a delay costs each way of real-time execution: success and boundary jumps against injected delay, one figure.

    python -m benchmarks.delay run intercept --policy outputs/intercept_flow --prefix outputs/intercept_prefix \\
        --head outputs/intercept_same_noise --out outputs/delay
    python -m benchmarks.delay run pusht --policy outputs/pusht_flow --delays 0 4 8 --out outputs/delay
    python -m benchmarks.delay show --out outputs/delay --figure docs/realtime.png

Every cell (task, method, delay) is a file of its own under ``--out``; a cell that exists is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robopolicy.deploy.delayed import MODES, Setting, evaluate_delayed
from robopolicy.evaluate.record import write_json
from robopolicy.evaluate.run import SEEDS
from robopolicy.policy import Policy, load_policy, read_provenance
from robopolicy.task import TaskSpec


class Method(NamedTuple):
    """How a policy is carried out: which checkpoint, and what is done with it."""

    checkpoint: str
    planner: Setting
    executor: Setting
    style: str  # colour and marker in the figure
    each_tick: bool = False  # replans as often as inference allows
    costly: bool = False


METHODS: Mapping[str, Method] = {
    "synchronous pause": Method("policy", *MODES["pause"], "#888888 s"),
    "naive asynchronous": Method("policy", *MODES["latest"], "#d62728 o"),
    "temporal ensembling": Method("policy", *MODES["ensemble"], "#ff9896 v", each_tick=True, costly=True),
    "BID": Method("policy", *MODES["bid"], "#9467bd D", costly=True),
    "RTC": Method("policy", *MODES["rtc"], "#1f77b4 o"),
    "RTC, identity Jacobian": Method("policy", *MODES["rtc_identity"], "#aec7e8 ^"),
    "training-time RTC": Method("prefix", *MODES["rtc_trained"], "#17becf P"),
    "real-time iteration": Method("policy", *MODES["rti"], "#2ca02c o"),
    "one-step head": Method("head", *MODES["latest"], "#bcbd22 x"),
    "one-step head, RTC": Method("head", *MODES["rtc"], "#8c564b x"),
    "one-step head, one step of RTI": Method("head", {"type": "rti", "steps": 1}, "latest", "#ff7f0e x"),
}


def cell_path(out: Path, task: str, method: str, delay: int) -> Path:
    return out / task / f"{method.replace(' ', '_').replace(',', '')}_{delay}.json"


def run_cell(policy: Policy, spec: TaskSpec, method: Method, delay: int, seeds: range, num_envs: int) -> dict[str, Any]:
    started, busy = time.perf_counter(), time.process_time()
    done = evaluate_delayed(
        policy,
        spec,
        seeds,
        delay=delay,
        planner=method.planner,
        executor=method.executor,
        replan=max(delay, 1) if method.each_tick else None,
        num_envs=num_envs,
        progress=False,
    )
    evaluation = done.evaluation
    return {
        "task": spec.name,
        "delay": delay,
        "n": len(evaluation.episodes),
        "first_seed": seeds.start,
        "success": evaluation.success._asdict(),
        "max_reward": evaluation.max_reward._asdict(),
        "mean_length": evaluation.summary.mean_length,
        "ended_early": sum(not e.success and e.length < max(x.length for x in evaluation.episodes) for e in evaluation.episodes),
        "realtime": done.realtime.model_dump(mode="json"),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
        "outcomes": "".join("1" if e.success else "0" for e in evaluation.episodes),
    }


def run(args: argparse.Namespace) -> None:
    """Run the cells that do not exist yet."""
    folders = {"policy": args.policy, "prefix": args.prefix, "head": args.head}
    policies = {name: load_policy(folder) for name, folder in folders.items() if folder}
    task = read_provenance(args.policy)["task"]
    spec = TaskSpec(task["name"], task.get("args", {}))
    start = SEEDS[args.seeds]
    for name, method in METHODS.items():
        if (args.methods and name not in args.methods) or method.checkpoint not in policies:
            continue
        for delay in args.delays:
            path = cell_path(args.out, args.name, name, delay)
            if path.exists():
                continue
            episodes = args.costly_episodes or args.episodes if method.costly else args.episodes
            seeds = range(start, start + episodes)
            cell = run_cell(policies[method.checkpoint], spec, method, delay, seeds, args.num_envs)
            write_json(path, {"method": name, "checkpoint": str(folders[method.checkpoint]), **cell})
            print(line(json.loads(path.read_text())), flush=True)


def line(cell: Mapping[str, Any]) -> str:
    s, r = cell["success"], cell["realtime"]
    return (
        f"{cell['method']:24s} d={cell['delay']}  success {s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}] n={cell['n']}"
        f"  jump p95 {r['jump_p95']:.3g}  jerk {r['jerk']:.3g}  calls {r['calls']:.2f}  starved {r['starved']:.2f}"
        f"  s={r['replan']}  cpu {cell['cpu_seconds']:.0f} s"
    )


def load_cells(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/*.json"))]


def show(args: argparse.Namespace) -> None:
    """Print every cell, the tables of the page, and draw the figure."""
    for folder in sorted(path for path in args.out.iterdir() if path.is_dir()):
        cells = {(c["method"], c["delay"]): c for c in (json.loads(p.read_text()) for p in sorted(folder.glob("*.json")))}
        delays = sorted({delay for _, delay in cells})
        for title, value in (
            ("success %", lambda c: f"{100 * c['success']['mean']:.0f}"),
            ("p95 boundary jump", lambda c: f"{c['realtime']['jump_p95']:.3g}"),
        ):
            print(f"\n{folder.name}: {title}\n\n| | {' | '.join(f'd = {d}' for d in delays)} |\n|---|{'---|' * len(delays)}")
            for name in METHODS:
                row = [value(cells[name, d]) if (name, d) in cells else "" for d in delays]
                if any(row):
                    print(f"| {name} | {' | '.join(row)} |")
        for cell in cells.values():
            print(line(cell))
    if args.figure:
        draw(load_cells(args.out), args.figure)


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two panels for each task: success with its 95 % interval, and the p95 boundary jump."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = sorted({cell["task"] for cell in cells})
    figure, axes = plt.subplots(len(tasks), 2, figsize=(9.5, 3.4 * len(tasks)), squeeze=False)
    handles: dict[str, Any] = {}
    for (left, right), task in zip(axes, tasks, strict=True):
        for offset, (name, method) in enumerate(METHODS.items()):
            mine = sorted((c for c in cells if c["method"] == name and c["task"] == task), key=lambda c: int(c["delay"]))
            if not mine:
                continue
            colour, marker = method.style.split()
            x = [c["delay"] + 0.05 * (offset - 4.5) for c in mine]
            mean = [c["success"]["mean"] for c in mine]
            below = [m - c["success"]["low"] for m, c in zip(mean, mine, strict=True)]
            above = [c["success"]["high"] - m for m, c in zip(mean, mine, strict=True)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4, "lw": 1.2}
            handles[name] = left.errorbar(x, mean, [below, above], elinewidth=0.7, **style)
            right.plot([c["delay"] for c in mine], [c["realtime"]["jump_p95"] for c in mine], **style)
        left.set(title=task, ylabel="success", ylim=(0, 1), xlabel="delay [control steps]")
        right.set(title=task, ylabel="p95 boundary jump [units of the action]", xlabel="delay [control steps]", yscale="log")
        for axis in (left, right):
            axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.14 / len(tasks) + 0.01, 1, 1))
    figure.savefig(path, dpi=80)
    print(f"figure {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    runs = verbs.add_parser("run", help="run the cells of one task")
    runs.add_argument("name", help="folder of this task's cells")
    runs.add_argument("--policy", required=True, help="checkpoint of several steps")
    runs.add_argument("--prefix", help="one trained with policy.loss.prefix")
    runs.add_argument("--head", help="one of one step")
    runs.add_argument("--delays", type=int, nargs="+", default=list(range(9)))
    runs.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all with a checkpoint")
    runs.add_argument("--episodes", type=int, default=400)
    runs.add_argument("--costly-episodes", type=int, help="of temporal ensembling and BID")
    runs.add_argument("--num-envs", type=int, default=100)
    runs.add_argument("--seeds", default="test", choices=SEEDS)
    runs.add_argument("--out", type=Path, required=True)
    runs.set_defaults(act=run)
    shows = verbs.add_parser("show", help="tables and the figure")
    shows.add_argument("--out", type=Path, required=True)
    shows.add_argument("--figure", type=Path)
    shows.set_defaults(act=show)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.act(args)


if __name__ == "__main__":
    main()
