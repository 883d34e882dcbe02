"""What does one call cost in success? A teacher in ever fewer steps, and students of it by every method.

Teacher and students are tested on the same episodes; the difference to the teacher in its own number of steps is paired, and a
student counts as not worse when the paired score test rejects that it is worse by 2 points, one-sided at 2.5 %. Latency is of
torch, from observations to actions, batch 1, one thread, over calls that take turns: in processor time, which other work on
the machine changes little (`robopolicy bench latency` measures by the clock). Runs that are there already are not made again.

    python -m benchmarks.distill outputs/pusht_state_flow --out outputs/distill_pusht --set same_noise:train.steps=8000
    python -m benchmarks.distill outputs/lift_dppo --data data/lift_dppo.zarr --methods same_noise --out outputs/distill_lift
    python -m benchmarks.distill outputs/pusht_state_flow --students outputs/mine --methods --out outputs/distill_mine
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from robopolicy.distill.methods.registry import METHODS
from robopolicy.distill.report import MARGIN, non_inferiority
from robopolicy.evaluate.commands import override_steps, scale
from robopolicy.evaluate.paired import compare
from robopolicy.evaluate.record import Evaluation, load_evaluation, write_json
from robopolicy.policy import Policy, load_policy


def robopolicy(*arguments: str | Path) -> None:
    """Run one command; its output goes to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-m", "robopolicy.cli", *map(str, arguments)], check=True, stdout=sys.stderr, env=environment)


def tested(policy: Path, out: Path, args: argparse.Namespace, steps: int | None, noise: float | None) -> Evaluation:
    if not (out / "eval.json").exists():
        extra = [] if steps is None else ["--steps", str(steps)]
        extra += [] if noise is None else ["--noise", str(noise)]
        robopolicy("eval", policy, "--episodes", str(args.episodes), "--seeds", args.seeds, *extra, "--out", out)
    return load_evaluation(out / "eval.json")


def distilled(method: str, args: argparse.Namespace) -> Path:
    run = args.out / method
    if not (run / "checkpoints" / "last").exists():
        data = [] if args.data is None else ["--data", args.data]
        noise = [] if args.teacher_noise is None else ["--teacher-noise", str(args.teacher_noise)]
        chosen = [text.partition(":")[2] for text in args.set if text.partition(":")[0] in (method, "all")]
        robopolicy("distill", args.teacher, "--method", method, *data, *noise, "--out", run, *chosen)
    return run


def latencies(policies: dict[str, Policy], calls: int = 200) -> dict[str, tuple[float, float]]:
    """Median and 95th percentile [ms of processor time] of a chunk, batch 1, one thread; policies take turns."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in policies}
    generator = torch.Generator().manual_seed(0)
    for number in range(calls + 20):
        for name, policy in policies.items():
            obs = {
                n: rng.integers(0, 255, (1, policy.n_obs_steps, *f.shape), np.uint8)
                if f.is_image
                else rng.normal(size=(1, policy.n_obs_steps, *f.shape)).astype(np.float32)
                for n, f in policy.observation_features.items()
            }
            started = time.thread_time()
            policy.act(obs, generator)
            if number >= 20:  # the first ones warm up
                taken[name].append(time.thread_time() - started)
    return {name: (1e3 * float(np.median(v)), 1e3 * float(np.quantile(v, 0.95))) for name, v in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="run folder: trained, fine-tuned or composed")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--students", nargs="*", type=Path, default=[], help="run folders of students that are there already")
    parser.add_argument("--data", help="store with the observations (default: the teacher's demonstrations)")
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD:key=value", help="settings of a method's run, or of all:")
    parser.add_argument(
        "--teacher-steps", nargs="*", type=int, default=[1, 2, 4], help="fewer steps of the teacher, beside its own"
    )
    parser.add_argument("--teacher-noise", type=scale, metavar="SCALE", help="of the teacher's initial noise (default: its own)")
    parser.add_argument("--two-calls", action="store_true", help="ask students that can in two calls, too")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--seeds", default="test", help="test (default), validation, or a number: see `robopolicy eval`")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    rows: list[tuple[str, Path, int | None]] = [("teacher", args.teacher, None)]
    rows += [(f"teacher, {steps} steps", args.teacher, steps) for steps in args.teacher_steps]
    for run in itertools.chain((distilled(method, args) for method in args.methods), args.students):
        rows.append((run.name, run, None))
        config = load_policy(run).config
        if args.two_calls and config.sampler["num_steps"] == 1 and (config.target_time or config.sampler.get("noise", 0) > 0):
            rows.append((f"{run.name}, 2 calls", run, 2))
    policies, evaluations = {}, {}
    for name, run, steps in rows:
        policies[name] = load_policy(run)
        if steps is not None:
            override_steps(policies[name], steps)
        noise = args.teacher_noise if run == args.teacher else None  # a student has its own
        folder = name.replace(", ", "_").replace(" ", "_") + ("" if noise is None else f"_noise{noise:g}")
        evaluations[name] = tested(run, args.out / f"{args.seeds}_{args.episodes}" / folder, args, steps, noise)
    times = latencies(policies)
    title = f"{'policy':24} {'calls':>5} {'success':24} {'mean max reward':24} {'success - teacher':26} {'CPU ms':>7} {'p95':>7}"
    print(f"{args.episodes} paired seeds from {args.seeds}; margin {MARGIN:.0%}\n{title}")
    table = []
    for name, done in evaluations.items():
        against = compare([evaluations["teacher"], done])
        verdict = "" if name == "teacher" else non_inferiority(against).partition(":")[0]
        difference = "" if name == "teacher" else against.pairs[0].success.signed()
        calls = policies[name].nfe
        print(
            f"{name:24} {calls:5} {done.success!s:24} {done.max_reward!s:24} {difference:26} "
            f"{times[name][0]:7.2f} {times[name][1]:7.2f}  {verdict}"
        )
        table.append(
            {
                "policy": name,
                "calls": calls,
                "success": done.success._asdict(),
                "max_reward": done.max_reward._asdict(),
                "success_difference": against.pairs[0].success._asdict(),
                "score_difference": against.pairs[0].score._asdict(),
                "verdict": verdict,
                "cpu_ms_p50": times[name][0],
                "cpu_ms_p95": times[name][1],
            }
        )
    write_json(args.out / f"table_{args.seeds}_{args.episodes}.json", {"schema_version": 1, "rows": table})


if __name__ == "__main__":
    main()
