"""Control steps per second of every registered task, in one process and in two.

Random actions in chunks of 8; ended environments are reset as they end, and resets count as time. On a busy machine believe the
steps per CPU second of one process, and of two processes only the ratio to the one measured just before. A task whose simulator
is not installed is skipped and named. Prints a table, and writes JSON when asked.

    python benchmarks/sim.py
    python benchmarks/sim.py --tasks pusht lift --seconds 20 --json outputs/sim.json
"""

# ruff: noqa: E402  (the path is mended before the imports)

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# This file is called as the package that it measures: run as a script, its folder would come first on the path and hide it.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np

from robopolicy.errors import TaskError
from robopolicy.provenance import provenance
from robopolicy.task import TaskSpec, task_names
from robopolicy.vector import VectorEnv

CHUNK = 8


def measure(spec: TaskSpec, num_envs: int, num_workers: int, seconds: float) -> dict[str, float]:
    """Step for about ``seconds`` and report start-up time [s] and steps per second, by the clock and by this process's CPU time.

    Raises:
        TaskError: The task cannot be built here.
    """
    rng = np.random.default_rng(0)
    task = spec.make()
    low, high = task.action_space.low, task.action_space.high  # type: ignore[attr-defined]
    task.close()
    begin = time.perf_counter()
    with VectorEnv(spec, num_envs, num_workers) as env:
        env.reset(list(range(num_envs)))
        start = time.perf_counter()
        actions = rng.uniform(low, high, (num_envs, CHUNK, len(low)))
        env.step(actions)  # warms up what compiles itself
        steps, seed = 0, num_envs
        clock, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - clock < seconds:
            done = env.step(rng.uniform(low, high, (num_envs, CHUNK, len(low))))
            steps += int(done.length.sum())
            ended = done.terminated | done.truncated
            if ended.any():
                env.reset([seed + i if ended[i] else None for i in range(num_envs)])
                seed += num_envs
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"start_s": start - begin, "per_second": steps / clock, "per_cpu_second": steps / cpu, "steps": steps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="short names (default: all that are registered)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement (default: 3)")
    parser.add_argument("--envs", type=int, default=8, help="environments, shared among the processes (default: 8)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    cases = [(name, TaskSpec(name)) for name in args.tasks or task_names()]
    if any(name == "pusht" for name, _ in cases):
        cases.append(("pusht, images", TaskSpec("pusht", {"obs": "image"})))
    results: dict[str, Any] = {}
    print(f"{'task':<18}{'steps/cpu-s':>12}{'steps/s, 1':>12}{'steps/s, 2':>12}{'ratio':>7}{'start 2 [s]':>13}{'load':>7}")
    for name, spec in cases:
        try:
            one = measure(spec, args.envs, 0, args.seconds)
            two = measure(spec, args.envs, 2, args.seconds)
        except TaskError as error:
            print(f"{name:<18}skipped: {error}")
            results[name] = {"skipped": str(error)}
            continue
        load = os.getloadavg()[0]
        results[name] = {"one": one, "two": two, "load": load}
        speeds = f"{one['per_cpu_second']:>12.0f}{one['per_second']:>12.0f}{two['per_second']:>12.0f}"
        print(f"{name:<18}{speeds}{two['per_second'] / one['per_second']:>7.2f}{two['start_s']:>13.2f}{load:>7.1f}", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"envs": args.envs, "chunk": CHUNK, "tasks": results, **provenance()}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
