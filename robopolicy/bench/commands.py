"""``robopolicy bench``: how long a policy takes from observation to action, and how a control loop keeps its time around it."""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.errors import EvaluationError
from robopolicy.evaluate.commands import count, natural, positive

if TYPE_CHECKING:
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.policy import Policy

BACKENDS = ("torch", "onnx", "openvino", "torchscript")

EPILOG = """\
examples:
  robopolicy bench latency outputs/pusht_flow --backend torch onnx openvino
  robopolicy bench latency outputs/pusht_flow --backend onnx --steps 1 2 4 10 --calls 5000
  robopolicy bench latency outputs/pusht_flow/export/onnx --load 2      # beside two processes that compute
  robopolicy bench latency outputs/pusht_flow --backend onnx --rate 10  # a call every 100 ms, as a robot makes them
  robopolicy bench loop outputs/lift_flow --rate 250 --seconds 20       # the control loop of our arm around the policy"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    latency = kinds.add_parser(
        "latency",
        help="from observation to action",
        description="From observation to action, all in: checks, normalisers, noise, every step of the sampler.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    latency.add_argument("policy", metavar="CKPT|EXPORT", help="a run or checkpoint folder, or a folder of `robopolicy export`")
    latency.add_argument(
        "--backend", nargs="+", choices=BACKENDS, help="runtimes, taking turns (default: torch; an export has its own)"
    )
    latency.add_argument(
        "--steps", nargs="+", type=count, metavar="N", help="sampler steps, taking turns (default: the checkpoint's)"
    )
    latency.add_argument("--threads", type=count, default=1, help="of the network (default 1)")
    latency.add_argument("--batch", type=count, default=1, help="observations at once (default 1)")
    latency.add_argument("--calls", type=count, default=2000, help="of each contestant, after 50 warm-ups (default 2000)")
    latency.add_argument("--seconds", type=positive, help="stop after so long, with however many calls there are then")
    latency.add_argument("--rate", type=positive, metavar="HZ", help="start calls at this rate (default: one after the other)")
    latency.add_argument("--load", type=natural, default=0, metavar="N", help="busy processes beside it (default 0)")
    latency.add_argument("--out", type=Path, metavar="DIR", help="where to write (default CKPT/bench/latency)")
    loop = kinds.add_parser(
        "loop",
        help="the control loop in real time",
        description="Observe, infer, execute and filter on the machine's clock: deadlines missed, lateness, age of information.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    loop.add_argument("policy", metavar="CKPT|EXPORT", help="as above, for a task with a robot")
    loop.add_argument("--task", help="task the robot is set in (default: the one the policy was trained for)")
    loop.add_argument("--task-arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the task; repeatable")
    loop.add_argument("--robot", default="sim.arm.robot:SimArm", metavar="CLASS", help="(default sim.arm.robot:SimArm)")
    loop.add_argument("--limits", default="arm", metavar="NAME|FILE", help="of the safety filter (default arm)")
    loop.add_argument(
        "--planner",
        default="plain",
        metavar="NAME|YAML",
        help="plain, rtc, rti, ..., or one with settings, '{type: rti, t_start: 0.8}' (default plain)",
    )
    loop.add_argument("--process", action="store_true", help="infer in a process of its own instead of a thread")
    loop.add_argument(
        "--executor",
        default="latest",
        metavar="NAME|YAML",
        help="latest, ensemble or receding, or one with settings (default latest)",
    )
    loop.add_argument("--rate", type=positive, default=250.0, metavar="HZ", help="of the loop (default 250)")
    loop.add_argument("--seconds", type=positive, default=20.0, help="how long (default 20)")
    loop.add_argument("--seed", type=int, default=100_000, help="of the episode and of the noise (default 100000)")
    loop.add_argument("--load", type=natural, default=0, metavar="N", help="busy processes beside it (default 0)")
    loop.add_argument("--out", type=Path, metavar="DIR", help="where to write (default CKPT/bench/loop)")
    loop.set_defaults(steps=None, noise=None, device="cpu", threads=1)


def run(args: argparse.Namespace) -> int:
    return _latency(args) if args.kind == "latency" else _loop(args)


def _loop(args: argparse.Namespace) -> int:
    import torch

    from robopolicy.bench.loop import rows_of, run_loop
    from robopolicy.bench.machine import busy, machine, runtime_versions
    from robopolicy.bench.report import COLUMNS, write_loop
    from robopolicy.config import component
    from robopolicy.deploy.executor import make_executor
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.deploy.limits import load_limits
    from robopolicy.deploy.planner import PLANNERS
    from robopolicy.evaluate.commands import load, setting, warn_of_untrained_times
    from robopolicy.policy import Policy

    args.planner, args.executor = setting("planner", args.planner), setting("executor", args.executor)
    component("planner", args.planner, PLANNERS)  # errors in these are told before anything is loaded
    make_executor(args.executor)
    load_limits(args.limits, rate=args.rate)
    torch.set_num_threads(1)
    policy, task = load(args.policy, args)
    warn_of_untrained_times(args.policy, args.planner)
    assert isinstance(policy, Policy | ExportedPolicy)
    started = machine()
    with busy(args.load):
        names = ("robot", "limits", "planner", "executor", "rate", "seconds", "seed")
        process = args.policy if args.process else None
        report, lateness = run_loop(policy, task, process=process, **{name: getattr(args, name) for name in names})
    ended = machine()
    print(f"{'ms':<10}" + "".join(f"{column:>10}" for column in COLUMNS))
    for name, figures in rows_of(report):
        print(f"{name:<10}" + "".join(f"{figures[column]:>10.3f}" for column in COLUMNS))
    engine = ", ".join(f"{value} {name}" for name, value in report["engine"].items())
    print(f"missed       {report['missed']:.2%} of {report['ticks']} periods; {report['skipped']} skipped; engine: {engine}")
    print(f"starved      {report['starved']:.2%} of periods")
    jump = report["boundary_jump"].get("p95", math.nan)
    print(f"jump         {f'p95 {jump:.3g}' if math.isfinite(jump) else 'none'} between plans, in the action's units")
    jerk = ", ".join(f"{name} {value:.3g}" for name, value in report["jerk_rms"].items())
    print(f"jerk         RMS of the commands [units/s^3]: {jerk or 'not known'}")
    interventions = ", ".join(f"{value} {name}" for name, value in sorted(report["interventions"].items()))
    print(f"safety       {interventions or 'no interventions'}; running {report['modes'].get('running', 0.0):.1%} of periods")
    print(f"load         {started['load'][0]} at start, {ended['load'][0]} at end")
    settings = {"policy": args.policy, "task": task.name, **{name: getattr(args, name) for name in names}}
    settings |= {"busy processes": args.load, "inference": "process" if args.process else "thread"}
    document = {"settings": settings, "started": started, "ended": ended, "runtimes": runtime_versions()}
    folder = args.out or Path(args.policy) / "bench" / "loop"
    print(f"report       {write_loop(folder, f'Control loop of {args.policy}', report, lateness, document)}")
    return 0


def _latency(args: argparse.Namespace) -> int:
    import tempfile
    import time

    import torch

    from robopolicy.bench.latency import measure, observations, stages
    from robopolicy.bench.machine import busy, machine, runtime_versions
    from robopolicy.bench.report import print_table, write

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        policies = _contestants(args, Path(scratch))
        first = next(iter(policies.values()))
        obs = observations(first.observation_features, first.n_obs_steps, args.batch)
        for policy in policies.values():
            policy.act(obs, torch.Generator().manual_seed(0))  # one that answers NaN is none to measure, and raises
        started = machine()
        stack.enter_context(busy(args.load))
        begun = time.perf_counter()
        results = measure(
            {name: (stages(policy), obs) for name, policy in policies.items()},
            args.calls,
            period=1 / args.rate if args.rate else None,
            stop=lambda: args.seconds is not None and time.perf_counter() - begun > args.seconds,
        )
    rate = first.action_feature.rate
    deadline = first.n_action_steps / rate if rate else None
    settings = {
        "policy": str(args.policy),
        "parameters": _parameters(policies),
        "threads": args.threads,
        "batch": args.batch,
        "busy processes": args.load,
        "calls": "one after the other" if args.rate is None else f"at {args.rate:g} Hz",
        "deadline": None if deadline is None else f"{1e3 * deadline:g} ms: {first.n_action_steps} actions at {rate:g} Hz",
    }
    misses = {name: int((s["whole"] > deadline).sum()) for name, s in results.items()} if deadline else {}
    ended = machine()
    document = {
        "schema_version": 1,
        "settings": settings,
        "started": started,
        "ended": ended,
        "runtimes": runtime_versions(),
        "deadline_misses": misses,
    }
    folder = args.out or Path(args.policy) / "bench" / "latency"
    print_table(results)
    if misses:
        late = ", ".join(f"{name}: {missed} of {len(results[name]['whole'])}" for name, missed in misses.items() if missed)
        print(f"deadline     {settings['deadline']}; missed by {late or 'none'}")
    print(f"load         {started['load'][0]} at start, {ended['load'][0]} at end")
    print(f"motion       age, jumps and jerk: robopolicy bench loop (tasks of the arm), or eval --delay TICKS, of {args.policy}")
    print(f"report       {write(folder, f'Latency of {args.policy}', results, document, deadline)}")
    return 0


def _contestants(args: argparse.Namespace, scratch: Path) -> dict[str, Policy | ExportedPolicy]:
    """``name -> policy`` for every backend and number of steps that was asked for."""
    from robopolicy.deploy.export import export
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.deploy.manifest import is_export
    from robopolicy.distill.times import check_walk
    from robopolicy.evaluate.commands import override_steps
    from robopolicy.policy import load_policy

    if is_export(args.policy):
        exported = ExportedPolicy(args.policy, args.threads)
        if args.steps or (args.backend and args.backend != [exported.manifest.backend]):
            raise EvaluationError(
                f"'{args.policy}' is an export to {exported.manifest.backend} with fixed steps; "
                "name the checkpoint to choose --backend or --steps"
            )
        return {f"{exported.manifest.backend}, {_steps(exported.manifest.nfe)}": exported}
    found: dict[str, Policy | ExportedPolicy] = {}
    for steps in args.steps or [None]:
        policy = load_policy(args.policy)
        if steps is not None:
            override_steps(policy, steps)
            check_walk(policy, args.policy)
        for backend in args.backend or ["torch"]:
            name = f"{backend}, {_steps(policy.nfe)}"
            if backend == "torch":
                found[name] = policy
            else:
                made = export(policy, scratch / f"{backend}_{policy.nfe}", backend, batch=args.batch)
                found[name] = ExportedPolicy(made.folder, args.threads)
    return found


def _steps(calls: int) -> str:
    return f"{calls} network call{'s' if calls > 1 else ''}"


def _parameters(policies: dict[str, Any]) -> int | None:
    """Of the network, where a checkpoint is among the contestants."""
    from robopolicy.policy import Policy

    for policy in policies.values():
        if isinstance(policy, Policy):
            return sum(p.numel() for p in policy.parameters())
    return None
