"""``robopolicy distill``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.distill.methods.registry import METHODS
from robopolicy.errors import ConfigError, nearest
from robopolicy.evaluate.commands import count, override_noise, scale

if TYPE_CHECKING:
    from robopolicy.distill.config import DistillConfig

DEFAULT_METHOD = "same_noise"

# Below the method's own defaults. Steps are cheap: one small network, and the teacher has been asked before.
DEFAULTS: dict[str, Any] = {
    "train": {
        "steps": 10_000,
        "batch_size": 256,
        "lr": 5e-4,
        "betas": [0.9, 0.99],
        "weight_decay": 0.0,
        "warmup_steps": 100,
        "ema": {"max_decay": 0.999},
        "checkpoint_every": 1_000,
        "keep_best": 0,
    },
    "eval": {"episodes": 0},
}

EPILOG = """\
examples:
  robopolicy distill outputs/lift_flow                                    # one call instead of ten: same_noise
  robopolicy distill outputs/pusht_flow --method ctm --steps 20000 --eval 400
  robopolicy distill outputs/lift_dppo --data data/lift_dppo.zarr         # at what the tuned policy itself meets
  robopolicy distill outputs/pusht_diffusion --teacher-sampler '{type: ddim, num_steps: 20}' policy.net.width=128
  robopolicy distill outputs/pusht_flow --teacher-noise .5                # the teacher's more typical chunks, and only those
  robopolicy distill outputs/pusht_flow --method regression               # the baseline with the same network
  robopolicy distill --resume outputs/lift_flow_same_noise                     # continues to the bit where it stopped
  robopolicy distill outputs/lift_flow --method meanflow --print-config

any key of the config can be overridden as key.subkey=value; `policy` is the student. The teacher is asked at the observations of
the demonstrations that it was trained on, or of --data. The run folder gets config.yaml, pairs (what the teacher made of which
noise), checkpoints/ (every other verb takes them), metrics.jsonl, TensorBoard events and distill.json. Ctrl-C saves and stops
with exit code 130; the run can be resumed."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("teacher", nargs="?", metavar="TEACHER", help="run or checkpoint folder: trained, fine-tuned or composed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config, for example train.lr=1e-4")
    parser.add_argument(
        "--method", metavar="METHOD", help=f"{', '.join(METHODS)}, or package.module:Class (default {DEFAULT_METHOD})"
    )
    parser.add_argument("--steps", type=count, metavar="N", help="training steps (default 10000)")
    parser.add_argument("--data", metavar="STORE", help="where observations come from (default: the teacher's demonstrations)")
    parser.add_argument("--teacher-sampler", metavar="YAML", help="how the teacher is sampled (default: as it says itself)")
    parser.add_argument(
        "--teacher-noise",
        type=scale,
        metavar="SCALE",
        help="scale of the teacher's initial noise instead of its own, and the student's; below 1: fewer, more typical chunks",
    )
    parser.add_argument("--eval", type=count, metavar="N", help="at the end, teacher and student on the same N test seeds")
    parser.add_argument("--task", help="task of --eval (default: the one the teacher was trained for)")
    parser.add_argument("--task-arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the task; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: outputs/TEACHER_METHOD)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder, with the config it recorded")
    parser.add_argument("--print-config", action="store_true", help="print the full config with all defaults and stop")


def run(args: argparse.Namespace) -> int:
    _check(args)

    import yaml

    from robopolicy.config import load_yaml, parse
    from robopolicy.distill.config import DistillConfig
    from robopolicy.train.experiment import default_output

    if args.resume is not None:
        source = args.resume / "config.yaml"
        document = load_yaml(source)
        if "teacher" not in document:
            verb = "finetune" if "base" in document else "train"
            raise ConfigError(f"'{args.resume}' is a run of {verb}: go on with robopolicy {verb} --resume, or distil it without")
        config, out = parse(DistillConfig, document, where=str(source)), args.resume
    else:
        config = _config(args)
        out = args.out or default_output(config)
    if args.print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    if args.eval is not None and config.task is None:
        raise ConfigError(f"'{config.teacher}' does not say which task it is for; name one with --task, or leave --eval out")

    from robopolicy.distill.report import final_test, measure_spread, write_result
    from robopolicy.distill.trainer import Distiller

    distiller = Distiller(config, out, resume=args.resume is not None)
    code = distiller.run()
    print(f"step {distiller.step}: {distiller.checkpoints.folder / 'last'}")
    if code:
        print(f"stopped; continue with: robopolicy distill --resume {out}")
        return code
    test = None if args.eval is None else final_test(distiller, args.eval)
    print("\n".join(write_result(distiller, measure_spread(distiller), test)))
    if test is None and config.task is not None:
        as_copied = config.teacher_sampler is None and config.teacher_noise is None
        fair = f"compare {config.teacher} {out} --episodes 400" if as_copied else f"distill --resume {out} --eval 400"
        print(f"next: robopolicy {fair}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be said without importing torch, which takes seconds. Raises ConfigError."""
    if args.method is not None and args.method not in METHODS and ":" not in args.method:
        raise ConfigError(
            f"unknown method '{args.method}': {nearest(args.method, METHODS)} Or give a dotted path, package.module:Class"
        )
    if args.resume is not None:
        given = [args.teacher, args.method, args.steps, args.data, args.teacher_sampler, args.teacher_noise, args.task, args.out]
        if any(value is not None for value in [*given, *args.task_arg, *args.overrides]):
            raise ConfigError("a resumed run keeps its config and folder, so --resume goes alone (or with --eval)")
        return
    if args.teacher is None:
        raise ConfigError(
            "give either a teacher (robopolicy distill outputs/lift_flow) or a run to continue "
            "(--resume outputs/lift_flow_same_noise)"
        )
    if "=" in args.teacher:
        raise ConfigError(f"'{args.teacher}' is an override; name the teacher first: robopolicy distill TEACHER key=value")
    if not Path(args.teacher).exists():
        raise ConfigError(f"'{args.teacher}' does not exist; name a run folder of `robopolicy train`, `finetune` or `compose`")


def _config(args: argparse.Namespace) -> DistillConfig:
    """Defaults, below the method's, below what follows from the teacher, below the command line."""
    from robopolicy.config import apply_overrides, component, parse
    from robopolicy.distill.config import DistillConfig
    from robopolicy.distill.methods.base import Method
    from robopolicy.distill.observations import data_section
    from robopolicy.distill.student import settings
    from robopolicy.policy import load_policy
    from robopolicy.rl.config import merge

    overrides = [*args.overrides]
    if args.steps is not None:
        overrides.append(f"train.steps={args.steps}")
    if args.teacher_sampler is not None:
        overrides.append(f"teacher_sampler={args.teacher_sampler}")
    if args.teacher_noise is not None:
        overrides.append(f"teacher_noise={args.teacher_noise}")
    given = apply_overrides({"method": {"type": args.method or DEFAULT_METHOD}}, overrides)
    asked, noise = given["method"], given.get("teacher_noise")
    cls, config = component("method", asked, METHODS)
    method: Method = cls(config)
    teacher = load_policy(args.teacher)
    if isinstance(noise, int | float) and noise > 0:  # anything else is said below, with the rest of the config
        override_noise(teacher, float(noise), args.teacher)
    task, name = _task(args), asked["type"].rpartition(":")[2]
    value = {
        "name": f"{Path(args.teacher).resolve().name}_{name}",
        "task": task,
        "data": data_section(teacher, args.teacher, args.data),
        "policy": settings(teacher, method.policy_for(teacher)),
        "teacher": args.teacher,
        "method": asked,
    }
    return parse(DistillConfig, apply_overrides(merge(merge(DEFAULTS, method.DEFAULTS), value), overrides), where="distill")


def _task(args: argparse.Namespace) -> dict[str, Any] | None:
    """The task by name and arguments: as asked for, else the one that the teacher was trained for, if it says so."""
    from robopolicy.config import apply_overrides
    from robopolicy.policy import read_provenance

    own = read_provenance(args.teacher).get("task") or {}
    name = args.task or own.get("name")
    if not isinstance(name, str):
        return None
    arguments = dict(own.get("args") or {}) if name == own.get("name") else {}
    return {"name": name, "args": apply_overrides(arguments, args.task_arg)}
