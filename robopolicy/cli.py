"""The ``robopolicy`` command: ``robopolicy VERB ...``.

This file only dispatches. Each verb lives in a module with ``configure(parser)`` and ``run(args) -> exit code`` whose top level
imports nothing heavy, so that help appears at once. Exit codes: 0 done, 1 the thing checked was found wanting, 2 an error that
the user can mend, 3 fine-tuning made the policy worse and stopped, 130 interrupted, 143 terminated (all three after saving).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from robopolicy.errors import RobopolicyError, nearest

# verb -> (module, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("robopolicy.quickstart", "demonstrate, train, evaluate and film a policy in minutes"),
    "data": ("robopolicy.data.commands", "make, check, repair, inspect, merge and split demonstrations in zarr"),
    "train": ("robopolicy.train.commands", "train a diffusion or flow policy on demonstrations; resume a run"),
    "finetune": ("robopolicy.rl.commands", "make a checkpoint better by reinforcement in simulation; resume a run"),
    "distill": ("robopolicy.distill.commands", "teach a student to do in one network call what its teacher does in many"),
    "eval": (
        "robopolicy.evaluate.commands",
        "measure a policy in simulation, or on a robot: success and score with intervals, films",
    ),
    "compose": ("robopolicy.compose.commands", "make one policy of several without training; find their weights, test them"),
    "compare": ("robopolicy.evaluate.compare", "compare policies on the same seeds, with tests that may be looked at any time"),
    "export": ("robopolicy.deploy.export", "write a checkpoint as graphs that run without torch: onnx, openvino, torchscript"),
    "bench": ("robopolicy.bench.commands", "measure latency, percentile by percentile, of a checkpoint or an export"),
    "up": ("hardware.ros2.up", "start a policy on an arm over ROS 2, or on the virtual arm, without a ROS installation"),
    "doctor": ("hardware.ros2.doctor", "check this machine and its robot before anything moves; each finding with its mend"),
    "bag": ("hardware.ros2.bag", "record and replay ROS 2 bags, make episodes of them, run a policy on them"),
    "tasks": ("robopolicy.tasks", "list the tasks that can be trained and evaluated on, with what they observe"),
}

EPILOG = """\
a first policy, start to end:
  robopolicy quickstart

your own:
  robopolicy data demos lift --episodes 100 --out data/lift.zarr
  robopolicy data check data/lift.zarr
  robopolicy train configs/lift_flow.yaml data.path=data/lift.zarr
  robopolicy eval outputs/lift_flow --episodes 200
  robopolicy finetune outputs/lift_flow --method reinflow
  robopolicy compare outputs/lift_flow outputs/lift_reinflow --episodes 400

'robopolicy VERB --help' teaches each verb with examples; docs/ has a page for each."""


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser. Only the named verb's module is imported and its arguments added; the others show their help line."""
    parser = argparse.ArgumentParser(
        prog="robopolicy",
        description="From demonstrations to a working arm: train, evaluate and compare diffusion and flow policies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error instead of one line")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, help_line) in VERBS.items():
        sub = verbs.add_parser(name, help=help_line, description=help_line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == verb:
            importlib.import_module(module).configure(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]  # accepted before and after the verb
    verb = next((a for a in argv if not a.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        print(f"robopolicy: unknown verb '{verb}': {nearest(verb, VERBS)}", file=sys.stderr)
        return 2
    sys.path.append(os.getcwd())  # tasks and networks of your own are named by dotted path; last, so that it shadows nothing
    parser = build_parser(verb)
    args, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one run; overrides may also follow an option, as in `train CONFIG --out DIR seed=1`.
    if hasattr(args, "overrides") and all("=" in a and not a.startswith("-") for a in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(importlib.import_module(VERBS[args.verb][0]).run(args))
    except RobopolicyError as error:
        if debug:
            raise
        print(f"robopolicy {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"robopolicy {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, for example `head`, has gone
        sys.stderr.close()
        return 141
    except OSError as error:  # a full or read-only disk, a file where a folder should be: it names the path
        if debug:
            raise
        print(f"robopolicy {args.verb}: {error}; mend the path, its permissions or the disk", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
