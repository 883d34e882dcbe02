"""``robopolicy train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robopolicy.train.experiment import Experiment

EPILOG = """\
examples:
  robopolicy train configs/pusht_state_flow.yaml
  robopolicy train configs/lift_flow.yaml data.path=data/lift.zarr train.steps=20000 train.lr=3e-4
  robopolicy train configs/lift_flow.yaml --out outputs/lift_seed1 seed=1
  robopolicy train --resume outputs/lift_seed1          # continues to the bit where it stopped
  robopolicy train configs/lift_flow.yaml --print-config

any key of the config can be overridden as key.subkey=value. The run folder gets config.yaml (everything that was used),
checkpoints/, metrics.jsonl and TensorBoard events (tensorboard --logdir outputs). Ctrl-C saves a checkpoint and stops with exit
code 130; the run can be resumed."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("config", nargs="?", type=Path, help="experiment in YAML, for example configs/lift_flow.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config, for example train.lr=3e-4")
    parser.add_argument("--out", type=Path, help="run folder (default: outputs/NAME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder, with the config it recorded")
    parser.add_argument("--print-config", action="store_true", help="print the full config with all defaults and stop")


def run(args: argparse.Namespace) -> int:
    import yaml

    from robopolicy.config import apply_overrides, load_yaml, parse
    from robopolicy.errors import ConfigError
    from robopolicy.train.bc import Trainer
    from robopolicy.train.experiment import Experiment, default_output

    if args.config is None and args.resume is None:
        raise ConfigError(
            "give either a config (robopolicy train configs/lift_flow.yaml) or a run to continue (--resume outputs/lift_flow)"
        )
    if args.resume is not None:
        if args.config or args.overrides or args.out:
            raise ConfigError("a resumed run keeps its config and folder, so --resume goes alone; start a new run to change them")
        source = args.resume / "config.yaml"
        document = load_yaml(source)
        if "method" in document:
            verb = "distill" if "teacher" in document else "finetune"
            raise ConfigError(f"'{args.resume}' is a run of {verb}: go on with robopolicy {verb} --resume")
        experiment = parse(Experiment, document, where=str(source))
        out = args.resume
    else:
        experiment = parse(Experiment, apply_overrides(load_yaml(args.config), args.overrides), where=str(args.config))
        out = args.out or default_output(experiment)
    if args.print_config:
        print(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    if experiment.task is not None:
        _check_task(experiment)
    trainer = Trainer(experiment, out, resume=args.resume is not None)
    code = trainer.run()
    print(f"step {trainer.step}: {trainer.checkpoints.folder / 'last'}")
    if code == 0 and experiment.task is not None:
        print(f"next: robopolicy eval {out} --episodes 200")
    elif code:
        print(f"stopped; continue with: robopolicy train --resume {out}")
    return code


def _check_task(experiment: Experiment) -> None:
    """A task that does not exist is noticed before training, not after. One whose simulator is absent here may be elsewhere."""
    import sys

    from robopolicy.errors import TaskError
    from robopolicy.task import find_task

    assert experiment.task is not None
    try:
        find_task(experiment.task.name)
    except TaskError as error:
        if ":" in experiment.task.name or experiment.eval.episodes or not isinstance(error.__cause__, ImportError):
            raise
        print(f"warning: {error}; training needs it not", file=sys.stderr)
