"""The whole control path in real time: our arm, a policy in its thread, executor, interpolation, safety filter; at 250 Hz.

Runs episodes of the task one after another for as long as asked, idle and under load (a process that multiplies on every core),
and with SCHED_FIFO (control 60, inference 50) where that is permitted, and prints what docs/deploy.md defines: missed deadlines,
lateness, age of information, latency of inference, CPU, success. The load average is that of the machine before each run: "idle"
means nothing of ours.

    python benchmarks/control_loop.py outputs/quickstart
    python benchmarks/control_loop.py outputs/quickstart --seconds 60 --runs idle load fifo fifo_load --json outputs/control.json
    python benchmarks/control_loop.py outputs/quickstart --simulate 100      # faster than time, on a fake clock
"""

# ruff: noqa: E402  (the path is mended before the imports)

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Run as a script, its folder would come first on the path; what is measured is the installed package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch

from robopolicy.deploy.clock import Clock, FakeClock, SystemClock
from robopolicy.deploy.control import ControlConfig, ControlLoop
from robopolicy.deploy.engine import Engine, EngineConfig, InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.limits import load_limits
from robopolicy.deploy.planner import make_planner
from robopolicy.deploy.safety import SafetyFilter
from robopolicy.evaluate.run import SEEDS
from robopolicy.policy import Policy, load_policy
from robopolicy.provenance import provenance
from sim.arm.robot import SimArm

EPISODE = 8.0  # at most [s]
RUNS = ("idle", "load", "fifo", "fifo_load")


def build(policy: Policy, clock: Clock, args: argparse.Namespace, delay: float | None, fifo: int | None) -> ControlLoop:
    """The loop; with ``delay`` [s] inference is pretended to take so long, otherwise it has a thread."""
    robot = SimArm(args.task, clock)
    scale = {"velocity": args.scale, "acceleration": args.scale, "jerk": args.scale}
    safety = SafetyFilter(load_limits("arm", rate=args.rate, scale=scale), robot.kinematics)
    generator = torch.Generator().manual_seed(args.seed)
    planner, row = make_planner(args.planner, policy), 1.0 / robot.task.rate
    if delay is None:
        engine = Engine(planner, row, clock, generator, EngineConfig(fifo=None if fifo is None else fifo - 10))
    else:
        engine = InlineEngine(planner, row, clock, generator, delay=delay)
    config = ControlConfig(n_obs_steps=policy.n_obs_steps, replan=args.replan or policy.n_action_steps, fifo=fifo, log_size=10**6)
    return ControlLoop(robot, engine, make_executor(args.executor), safety, clock, config)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that compute without pause."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_compute, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    time.sleep(3.0 if workers else 0.0)
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _compute() -> None:
    a = np.random.default_rng(0).normal(size=(200, 200))
    while True:
        a = a @ a
        a /= np.abs(a).max()


def measure(loop: ControlLoop, seconds: float | None, episodes: int | None) -> dict[str, Any]:
    """Episodes one after another, for ``seconds`` of control or so many episodes."""
    robot = loop.robot
    assert isinstance(robot, SimArm)
    ran, seed, successes, refused = 0.0, SEEDS["validation"], 0, 0
    lengths: list[float] = []
    wall, cpu, stopped = time.perf_counter(), time.process_time(), 0
    while (seconds is not None and ran < seconds) or (episodes is not None and len(lengths) < episodes):
        if loop.reset(seed):
            refused += 1
        begin = loop.log.count
        loop.run(EPISODE, until=lambda: robot.success)
        lengths.append((loop.log.count - begin + loop.skipped) * loop.dt)
        ran += lengths[-1]
        successes += robot.success
        stopped += loop.safety.mode in ("stopped", "estopped")
        seed += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loop.close()
    return loop.report() | {
        "episodes": len(lengths), "successes": successes, "refused": refused, "stopped": stopped, "seconds": ran,
        "episode_s": float(np.mean(lengths)), "wall": wall, "cpu": cpu / wall,
    }  # fmt: skip


def table(name: str, report: dict[str, Any]) -> str:
    """One run, for a terminal."""

    def line(key: str) -> str:
        values = report[key]
        return "  ".join(f"{q} {values[q]:.2f}" for q in ("p50", "p95", "p99", "p99.9", "max"))

    times = ("lateness_ms", "jitter_ms", "work_ms", "age_ms", "inference_ms", "boundary_jump")
    head = f"{name}: {report['ticks']} ticks in {report['seconds']:.0f} s, load before {report['load']}"
    return "\n".join(
        [
            f"{head}, CPU {report['cpu']:.0%} of one core",
            f"  missed {report['missed']:.3%}  skipped {report['skipped']}  starved {report['starved']:.3%}",
            f"  success {report['successes']}/{report['episodes']}  stopped {report['stopped']}  refused {report['refused']}",
            *(f"  {key:13} {line(key)}" for key in times),
            f"  engine {report['engine']}  interventions {report['interventions']}",
            *(f"  note: {note}" for note in dict.fromkeys(report["notes"])),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--task", default="lift")
    parser.add_argument("--seconds", type=float, default=60.0, help="of control, per run")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--simulate", type=int, metavar="EPISODES", help="on a fake clock instead")
    parser.add_argument("--delay", type=float, default=0.01, help="of inference, where the clock is fake [s]")
    parser.add_argument("--rate", type=float, default=250.0, help="of control [Hz]")
    parser.add_argument("--scale", type=float, default=0.5, help="of the arm's velocity, acceleration and jerk")
    parser.add_argument("--planner", default="plain")
    parser.add_argument("--executor", default="latest")
    parser.add_argument("--replan", type=int, help="rows between plans; default: the policy's n_action_steps")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    policy = load_policy(args.checkpoint)
    if args.steps is not None:
        policy = policy.varied(sampler={**policy.config.sampler, "num_steps": args.steps})
    found: dict[str, Any] = {"provenance": provenance(), "args": {k: str(v) for k, v in vars(args).items()}}
    for name in ["simulated"] if args.simulate else args.runs:
        fake = args.simulate is not None
        clock: Clock = FakeClock(100.0) if fake else SystemClock()
        loop = build(policy, clock, args, args.delay if fake else None, 60 if name.startswith("fifo") else None)
        load = [round(value, 2) for value in os.getloadavg()]
        with busy((os.cpu_count() or 1) if name.endswith("load") else 0):
            report = measure(loop, None if fake else args.seconds, args.simulate) | {"load": load}
        found[name] = report
        print(table(name, report), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
