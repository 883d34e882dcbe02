"""`robopolicy bag ...`: record topics, look at bags, replay them, make episodes of them, run a policy on them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from robopolicy.errors import ConfigError
from robopolicy.evaluate.commands import positive

_EXAMPLES = """\
examples:
  robopolicy bag record data/monday --profile ur5e
  robopolicy bag info data/monday
  robopolicy bag import data/monday data/tuesday --profile ur5e --out data/ur5e.zarr
  robopolicy bag shadow data/monday outputs/my_policy --profile ur5e --plot shadow.png
  robopolicy bag replay data/monday --profile ur5e

Bags are those of `ros2 bag`, mcap or sqlite3, in both directions. docs/bag.md goes through it."""

_PROFILE = "the robot: the name of a profile, or a YAML file (default virtual)"
_NAMESPACE = "of the robot's topics (default: none)"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help_line: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help_line, description=help_line)
        sub.set_defaults(run_action=run)
        return sub

    record = add("record", _record, "write what comes on a robot's topics into a bag, until Ctrl-C")
    record.add_argument("out", type=Path, help="folder to make")
    record.add_argument("--profile", default="virtual", help=_PROFILE)
    record.add_argument("--topic", action="append", default=[], help="a topic instead of the profile's; repeatable")
    record.add_argument("--namespace", default="", help=_NAMESPACE)
    record.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="of the file (default mcap)")
    record.add_argument("--seconds", type=positive, help="end so long after the first message")
    record.add_argument("--reserve", type=float, default=500.0, metavar="MB", help="end at so little free space (default 500)")

    info = add("info", _info, "topics, counts, rates, gaps, and how old messages were when they came")
    info.add_argument("bag", type=Path)

    replay = add("replay", _replay, "publish what a robot measured; its commands only when told to")
    replay.add_argument("bag", type=Path)
    replay.add_argument("--profile", default="virtual", help=_PROFILE + "; what it reads is replayed")
    replay.add_argument("--namespace", default="", help=_NAMESPACE)
    replay.add_argument("--topic", action="append", default=[], help="of the profile's inputs only this one; repeatable")
    replay.add_argument(
        "--commands", action="store_true", help="--topic may name any other, too, commands: an arm that listens MOVES"
    )
    replay.add_argument("--rate", type=positive, default=1.0, help="times as fast (default 1)")
    replay.add_argument("--keep-stamps", action="store_true", help="do not move header stamps to now; nodes will find them old")

    import_ = add("import", _import, "make episodes of bags, one each, in a store that `robopolicy train` reads")
    import_.add_argument("bags", type=Path, nargs="+", metavar="BAG")
    import_.add_argument("--out", type=Path, required=True, help="store to make, or to add to")
    import_.add_argument("--profile", default="virtual", help=_PROFILE)
    import_.add_argument("--namespace", default="", help=_NAMESPACE)
    import_.add_argument(
        "--action",
        choices=("executed", "measured"),
        default="executed",
        help="learn what the arm was told, or, of an arm led by hand, where it was led (default executed)",
    )

    shadow = add("shadow", _shadow, "run a policy on a bag: what it would have commanded, beside what was")
    shadow.add_argument("bag", type=Path)
    shadow.add_argument("checkpoint", metavar="CKPT", help="a run, a checkpoint or an export")
    shadow.add_argument("--profile", default="virtual", help=_PROFILE)
    shadow.add_argument("--namespace", default="", help=_NAMESPACE)
    shadow.add_argument("--replan", type=int, default=0, help="rows of a chunk before the next (default: the policy's)")
    shadow.add_argument("--steps", type=int, default=0, help="of the sampler (default: the checkpoint's)")
    shadow.add_argument("--latency", type=float, default=0.05, help="of inference [s] (default 0.05)")
    shadow.add_argument("--plot", type=Path, help="picture to make, .png or .pdf")
    shadow.add_argument("--json", type=Path, help="file to make, with the figures")

    repair = add("repair", _repair, "make a whole bag of one whose recorder was killed")
    repair.add_argument("bag", type=Path)
    repair.add_argument("--out", type=Path, required=True, help="folder to make")


def run(args: argparse.Namespace) -> int:
    return int(args.run_action(args))


def _record(args: argparse.Namespace) -> int:
    from hardware.ros2.bagging import profile_topics, record
    from hardware.ros2.profile import load_profile
    from hardware.ros2.runtime import Ros

    topics = args.topic or list(profile_topics(load_profile(args.profile)))
    with Ros() as ros:
        counts = record(
            ros,
            args.out,
            topics,
            namespace=args.namespace,
            storage=args.storage,
            reserve=args.reserve,
            seconds=args.seconds,
            told=lambda text: print(text, flush=True),
        )
    print(f"{args.out}: {sum(counts.values())} messages of {len(counts)} topics")
    return 0 if counts else 1


def _info(args: argparse.Namespace) -> int:
    from hardware.ros2.bagfile import describe, open_bag, size_of

    with open_bag(args.bag) as bag:
        rows = describe(bag)
        count = sum(bag.counts.values())
        print(f"{args.bag}: {bag.seconds:.1f} s, {count} messages, {size_of(args.bag) / 1e6:.1f} MB")
        wide = max([len("topic"), *(len(name) for name in rows)])
        print(f"{'topic':{wide}}  messages    Hz  longest gap  age at arrival  type")
        for name, row in sorted(rows.items()):
            age = "-" if row.age is None else f"{1e3 * row.age:.1f} ms"
            print(f"{name:{wide}}  {row.messages:8d}  {row.rate:4.0f}  {row.gap:9.3f} s  {age:>14}  {bag.types[name]}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from hardware.ros2.bagging import replay
    from hardware.ros2.profile import load_profile
    from hardware.ros2.runtime import Ros

    if args.commands and not args.topic:
        raise ConfigError("--commands lets --topic name commands, too: say which, --topic NAME; `robopolicy bag info` lists them")
    profile = load_profile(args.profile)
    with Ros() as ros:
        replay(
            ros,
            args.bag,
            profile,
            args.topic,
            namespace=args.namespace,
            commands=args.commands,
            rate=args.rate,
            keep_stamps=args.keep_stamps,
        )
    return 0


def _import(args: argparse.Namespace) -> int:
    from hardware.ros2.imported import import_bags
    from hardware.ros2.recording import RecordingConfig

    done = import_bags(
        args.bags,
        args.out,
        args.profile,
        config=RecordingConfig(action=args.action),
        namespace=args.namespace,
        told=lambda path, ended: print(f"{path}: {ended}", flush=True),
    )
    print(f"{args.out}: {sum(ended.episode is not None for ended in done.values())} episodes added")
    return 0 if all(ended.episode is not None for ended in done.values()) else 1


def _shadow(args: argparse.Namespace) -> int:
    from hardware.ros2.deployment import DeployConfig
    from hardware.ros2.shadow import shadow

    config = DeployConfig(checkpoint=args.checkpoint, profile=args.profile, replan=args.replan, steps=args.steps)
    found = shadow(args.bag, config, namespace=args.namespace, latency=args.latency)
    print("\n".join(found.lines()))
    if args.json is not None:
        args.json.write_text(json.dumps(found.to_json(), indent=2) + "\n")
    if args.plot is not None:
        found.plot().savefig(args.plot, dpi=100)
        print(args.plot)
    return 0


def _repair(args: argparse.Namespace) -> int:
    from hardware.ros2.bagfile import repair

    counts = repair(args.bag, args.out)
    print(f"{args.out}: {sum(counts.values())} messages of {len(counts)} topics kept")
    return 0 if counts else 1
