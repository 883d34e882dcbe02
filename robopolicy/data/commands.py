"""`robopolicy data ...`: record, roll out, inspect, check, repair, merge, split, pack and unpack demonstrations."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from robopolicy.evaluate.commands import add_sampling_arguments, count

_EXAMPLES = """\
examples:
  robopolicy data demos lift --episodes 100 --out data/lift.zarr
  robopolicy data rollout outputs/lift_dppo --success-only --episodes 500 --out data/lift_dppo.zarr
  robopolicy data info data/lift.zarr
  robopolicy data check data/lift.zarr
  robopolicy data repair data/old.zarr --out data/mended.zarr
  robopolicy data merge data/monday.zarr data/tuesday.zarr --out data/week.zarr
  robopolicy data split data/week.zarr --fractions .9,.1 --out-dir data

'robopolicy data ACTION --help' shows each one's options; docs/data.md explains the layout and its guarantees."""


_ROLLOUT_EXAMPLES = """\
  robopolicy data rollout outputs/lift_dppo --success-only --episodes 500 --out data/lift_dppo.zarr --workers 2
  robopolicy train configs/lift_flow.yaml name=student data.path=data/lift_dppo.zarr

  # the teacher sees the state, its student shall see images: let the task observe both, and both are stored
  robopolicy data rollout outputs/lift_dppo --task-arg image_size=96 --success-only --episodes 200 --out data/lift_image.zarr

The store is one that `robopolicy data demos` could have made: all that the task observes, before each action, and the action as
it was executed. Its attributes say which checkpoint made it, on which seeds, and which of them failed. Seeds 400000..499999 are
kept for this, so that no student is taught the episodes that it will be validated or tested on."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help_line: str, examples: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(
            name,
            help=help_line,
            description=help_line,
            epilog=f"example:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run_action=run)
        return sub

    demos = add(
        "demos",
        _demos,
        "record demonstrations by a task's scripted expert",
        "  robopolicy data demos lift --episodes 100 --out data/lift.zarr",
    )
    demos.add_argument("task", help="name of the task (`robopolicy tasks` lists them) or package.module:Class")
    demos.add_argument("--episodes", type=int, required=True, help="successful episodes to store")
    demos.add_argument("--out", type=Path, required=True, help="directory to make, for example data/lift.zarr")
    demos.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="task_args",
        help="an argument of the task; may be repeated",
    )
    demos.add_argument("--noise", type=float, default=0.0, help="scale of the expert's exploration noise (default 0)")
    demos.add_argument("--seed-start", type=int, default=0, help="seed of the first episode (default 0; below 100000)")
    demos.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: one per CPU); the result does not depend on it",
    )
    demos.add_argument("--keep-failures", action="store_true", help="store failed episodes too")

    rollout = add("rollout", _rollout, "record demonstrations by a policy in its task", _ROLLOUT_EXAMPLES)
    rollout.add_argument("checkpoint", metavar="CKPT", help="a run or checkpoint folder")
    rollout.add_argument("--episodes", type=count, required=True, help="episodes to store")
    rollout.add_argument("--out", type=Path, required=True, help="directory to make, for example data/lift_dppo.zarr")
    rollout.add_argument(
        "--success-only", action="store_true", help="leave failed episodes out; seeds run on until there are enough"
    )
    rollout.add_argument("--task", help="task to run (default: the one the policy was trained for)")
    rollout.add_argument("--task-arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the task; repeatable")
    rollout.add_argument(
        "--seed-start", type=int, default=400_000, help="seed of the first episode (400000..499999; default 400000)"
    )
    rollout.add_argument("--noise-seed", type=int, default=0, help="seed of the policy's noise (default 0)")
    add_sampling_arguments(rollout)
    rollout.add_argument(
        "--num-envs",
        type=count,
        default=50,
        help="episodes that advance together (default 50); fewer need less memory for images",
    )
    rollout.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that step them (default 0: none besides this one); the result does not depend on it",
    )
    rollout.add_argument("--device", default="cpu", help="where the network runs (default cpu)")
    rollout.add_argument("--threads", type=count, default=1, help="threads of the network (default 1: best for small ones)")

    info = add(
        "info", _info, "what is in a store; for a foreign one, a draft of data.features", "  robopolicy data info data/lift.zarr"
    )
    info.add_argument("path", type=Path)

    check = add(
        "check",
        _check,
        "find and explain damage and inconsistency; exit 0: sound, perhaps with warnings, 1: errors, 2: cannot be read",
        "  robopolicy data check data/lift.zarr",
    )
    check.add_argument("path", type=Path)

    repair = add(
        "repair",
        _repair,
        "copy what is sound into a new store and say what was dropped",
        "  robopolicy data repair data/old.zarr --out data/mended.zarr",
    )
    repair.add_argument("path", type=Path)
    target = repair.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="store to make")
    target.add_argument(
        "--in-place", action="store_true", help="swap the mended store in atomically; the damaged one is kept as PATH.damaged"
    )

    merge = add(
        "merge",
        _merge,
        "put stores with the same features into one",
        "  robopolicy data merge data/a.zarr data/b.zarr --out data/ab.zarr",
    )
    merge.add_argument("paths", type=Path, nargs="+")
    merge.add_argument("--out", type=Path, required=True)

    split = add(
        "split",
        _split,
        "deal the episodes at random into several stores",
        "  robopolicy data split data/ab.zarr --fractions .9,.1 --out-dir data",
    )
    split.add_argument("path", type=Path)
    split.add_argument(
        "--fractions", type=_fractions, required=True, help="comma-separated, sum at most 1: .9,.1 makes PATH_train and PATH_val"
    )
    split.add_argument("--out-dir", type=Path, required=True)
    split.add_argument("--seed", type=int, default=0, help="seed of the deal (default 0)")

    pack = add(
        "pack",
        _pack,
        "a store directory into one zip file, which trains as it is",
        "  robopolicy data pack data/lift.zarr --out data/lift.zarr.zip",
    )
    pack.add_argument("path", type=Path)
    pack.add_argument("--out", type=Path, required=True)

    unpack = add(
        "unpack",
        _unpack,
        "a zip into a directory, which can be appended to",
        "  robopolicy data unpack data/lift.zarr.zip --out data/lift.zarr",
    )
    unpack.add_argument("path", type=Path)
    unpack.add_argument("--out", type=Path, required=True)


def run(args: argparse.Namespace) -> int:
    return int(args.run_action(args))


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a comma-separated list of numbers such as .9,.1") from None


def _demos(args: argparse.Namespace) -> int:
    from robopolicy.config import apply_overrides
    from robopolicy.data.demos import record
    from robopolicy.task import TaskSpec

    spec = TaskSpec(args.task, apply_overrides({}, args.task_args))
    result = record(
        spec,
        args.out,
        args.episodes,
        noise=args.noise,
        seed_start=args.seed_start,
        workers=args.workers,
        keep_failures=args.keep_failures,
        progress=True,
    )
    print(f"{args.out}: {result.episodes} episodes, {result.steps} steps; the expert failed on {len(result.failed)} seeds")
    return 0


def _rollout(args: argparse.Namespace) -> int:
    import torch

    from robopolicy.data.rollouts import origin_of, record_rollouts
    from robopolicy.evaluate.commands import load

    torch.set_num_threads(args.threads)
    policy, spec = load(args.checkpoint, args)
    result = record_rollouts(
        policy,
        spec,
        args.out,
        args.episodes,
        origin=origin_of(args.checkpoint),
        success_only=args.success_only,
        seed_start=args.seed_start,
        noise_seed=args.noise_seed,
        num_envs=args.num_envs,
        num_workers=args.workers,
        progress=True,
        name=args.checkpoint,
    )
    succeeded = result.tried - len(result.failed)
    rate = f"the policy succeeded on {succeeded} of {result.tried} seeds ({succeeded / result.tried:.1%})"
    print(f"{args.out}: {result.episodes} episodes, {result.steps} steps; {rate}")
    return 0


def _info(args: argparse.Namespace) -> int:
    import numpy as np

    from robopolicy.data.episodes import Episodes
    from robopolicy.data.sources import features_yaml
    from robopolicy.data.store import open_files

    episodes = Episodes.open(args.path)
    size = sum(size for _, size, _ in open_files(args.path).walk(""))
    counts = f"{len(episodes)} episodes, {episodes.num_steps} steps, {size / 1e6:.1f} MB"
    print(f"{args.path}: zarr format {episodes.zarr_format}, {counts}")
    if len(episodes):
        lengths = np.diff(episodes.ends, prepend=0)
        rates = {f.rate for f in episodes.features.values() if f.rate}
        duration = f", {episodes.num_steps / next(iter(rates)):.0f} s at {next(iter(rates)):g} Hz" if len(rates) == 1 else ""
        print(f"episode length: shortest {lengths.min()}, median {np.median(lengths):g}, longest {lengths.max()} steps{duration}")
    print("features:" if episodes.declared else "features (inferred; the store declares none):")
    width = max(map(len, episodes.features))
    for name, f in episodes.features.items():
        extras = [f"unit {f.unit}" if f.unit else "unit unknown", f"{f.rate:g} Hz" if f.rate else "", ", ".join(f.names)]
        print(f"  {name:{width}}  {f.dtype:8} {f.shape!s:16} {'  '.join(e for e in extras if e)}")
    for key, value in episodes.attrs.items():
        print(f"{key}: {value}")
    if not episodes.declared:
        print("\n# Describe it in your config: complete units, names and rate, take columns apart, drop what you do not need.")
        print(features_yaml(episodes.mapped), end="")
    return 0


def _check(args: argparse.Namespace) -> int:
    from robopolicy.data.check import check

    problems = check(args.path, progress=sys.stderr.isatty())
    for problem in sorted(problems, key=lambda p: p.severity):
        print(f"{problem.severity}: {problem}")
    errors = sum(p.severity == "error" for p in problems)
    print(f"{args.path}: {errors} errors, {len(problems) - errors} warnings" if problems else f"{args.path}: clean")
    return 1 if errors else 0


def _repair(args: argparse.Namespace) -> int:
    from robopolicy.data.repair import repair

    result = repair(args.path, None if args.in_place else args.out, progress=sys.stderr.isatty())
    for line in result.dropped:
        print(f"dropped {line}")
    print(f"{args.out or args.path}: {result.episodes} episodes, {result.steps} steps kept; {len(result.dropped)} things dropped")
    if result.backup is not None:
        print(f"the damaged store is '{result.backup}'; delete it when you are satisfied")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from robopolicy.data.combine import merge

    print(f"{args.out}: {merge(args.paths, args.out, progress=sys.stderr.isatty())} episodes")
    return 0


def _split(args: argparse.Namespace) -> int:
    from robopolicy.data.combine import split

    for path in split(args.path, args.fractions, args.out_dir, args.seed, progress=sys.stderr.isatty()):
        print(path)
    return 0


def _pack(args: argparse.Namespace) -> int:
    from robopolicy.data.combine import pack

    pack(args.path, args.out)
    print(args.out)
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from robopolicy.data.combine import unpack

    unpack(args.path, args.out)
    print(args.out)
    return 0
