"""``robopolicy finetune``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.errors import ConfigError, nearest
from robopolicy.rl.heads.registry import HEADS

if TYPE_CHECKING:
    from robopolicy.rl.config import FinetuneConfig

DEFAULT_METHOD, DEFAULT_PRESET = "dppo", "cpu"

EPILOG = """\
examples:
  robopolicy finetune outputs/lift_diffusion --method dppo
  robopolicy finetune outputs/lift_flow --method reinflow --out outputs/lift_rl_seed1 seed=1 iterations=300
  robopolicy finetune outputs/lift_flow --method fpo --task lift --task-arg horizon=100 env.reward.source=success
  robopolicy finetune outputs/can_diffusion --preset paper_can       # as published; hours
  robopolicy finetune --resume outputs/lift_dppo                     # continues to the bit where it stopped
  robopolicy finetune scratch.yaml --task sparse_reach               # a file with a policy section: from scratch
  robopolicy finetune outputs/lift_flow --method fpo --print-config
  robopolicy finetune --list-presets

any key can be overridden as key.subkey=value; the preset comes below that, the defaults below the preset. The run folder gets
config.yaml, checkpoints/ (every other verb takes them), metrics.jsonl, TensorBoard events and report.html: success against
environment steps, films before and after, and a paired test of base and result. Ctrl-C saves and stops with exit code 130; the
run can be resumed. Exit code 3: the policy collapsed, the run stopped, and its last checkpoint is the best it had."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CKPT", help="run or checkpoint folder to improve; or a YAML file with a policy section"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config, for example ppo.lr=1e-4")
    parser.add_argument(
        "--method", metavar="METHOD", help=f"{', '.join(HEADS)}, or package.module:Class (default {DEFAULT_METHOD})"
    )
    parser.add_argument(
        "--preset", metavar="PRESET", help=f"settings to start from (default {DEFAULT_PRESET}); see --list-presets"
    )
    parser.add_argument("--task", help="task to practise (default: the one the policy was trained for)")
    parser.add_argument("--task-arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the task; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: outputs/NAME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder, with the config it recorded")
    parser.add_argument("--print-config", action="store_true", help="print the full config with all defaults and stop")
    parser.add_argument("--list-presets", action="store_true", help="print every method's presets and where they come from")


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.list_presets:
        _list_presets([args.method] if args.method else list(HEADS))
        return 0

    import yaml

    from robopolicy.config import load_yaml, parse
    from robopolicy.rl.config import FinetuneConfig

    if args.resume is not None:
        source = args.resume / "config.yaml"
        document = load_yaml(source)
        if "data" in document:
            verb = "distill" if "teacher" in document else "train"
            raise ConfigError(
                f"'{args.resume}' is a run of {verb}: go on with robopolicy {verb} --resume, or finetune it without"
            )
        config, out = parse(FinetuneConfig, document, where=str(source)), args.resume
    else:
        config = _config(args)
        out = args.out or Path("outputs") / config.name
    if args.print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return 0

    from robopolicy.rl.finetune import COLLAPSED, Finetuner
    from robopolicy.rl.report import final_test, write_run_report
    from robopolicy.task import find_task

    find_task(config.task.name)  # before the checkpoint is loaded
    finetuner = Finetuner(config, out, resume=args.resume is not None)
    results = (out / "test" / "comparison.json", out / "report.html")
    if finetuner.iteration >= config.iterations and all(path.exists() for path in results):
        print(f"all {config.iterations} iterations are done and tested; raise iterations in {out / 'config.yaml'} to go on")
        return 0
    if finetuner.base.provenance.get("source") == "from scratch":
        print(f"from scratch: {config.base} describes a policy; to improve a trained one, name its run folder", file=sys.stderr)
    code = finetuner.run()
    saved = finetuner.checkpoints.steps()
    if not saved:
        print("stopped before the first iteration was done; nothing was saved")
        return code
    report = write_run_report(finetuner, code)  # at once: the test takes minutes, and may be interrupted
    print(f"iteration {finetuner.iteration}, {finetuner.env_steps} environment steps: {finetuner.checkpoints.path(saved[-1])}")
    if code not in (0, COLLAPSED):
        print(f"report  {report}\nstopped; continue with: robopolicy finetune --resume {out}")
        return code
    if (test := final_test(finetuner)) is not None:
        write_run_report(finetuner, code, test)
        if config.eval.test_episodes:
            print("\n".join(test.lines()))
    print(f"report  {report}")
    print(_next(config, out))
    return code


def _check(args: argparse.Namespace) -> None:
    """What can be said without importing torch, which takes seconds. Raises ConfigError."""
    if args.list_presets:
        return
    if args.method is not None and args.method not in HEADS and ":" not in args.method:
        raise ConfigError(
            f"unknown method '{args.method}': {nearest(args.method, HEADS)} Or give a dotted path, package.module:Class"
        )
    if args.resume is not None:
        given = [args.checkpoint, args.method, args.preset, args.task, args.out, *args.task_arg, *args.overrides]
        if any(value is not None for value in given):
            raise ConfigError("a resumed run keeps its config and folder, so --resume goes alone; start a new run to change them")
        return
    if args.checkpoint is None:
        raise ConfigError(
            "give either a checkpoint (robopolicy finetune outputs/lift_flow) or a run to continue (--resume outputs/lift_dppo)"
        )
    if "=" in args.checkpoint:
        raise ConfigError(f"'{args.checkpoint}' is an override; name the checkpoint first: robopolicy finetune CKPT key=value")
    if not Path(args.checkpoint).exists():
        raise ConfigError(
            f"'{args.checkpoint}' does not exist; name a run folder of `robopolicy train`, or a YAML file with a policy"
        )


def _config(args: argparse.Namespace) -> FinetuneConfig:
    """Defaults, below the preset, below the command line."""
    from robopolicy.config import apply_overrides, parse
    from robopolicy.rl.config import FinetuneConfig, merge, preset, presets

    method = args.method or DEFAULT_METHOD
    settings: dict[str, Any] = {}
    if args.preset is not None or presets(method):  # a method of one's own need not have any
        settings = preset(method, args.preset or DEFAULT_PRESET)
    task = _task(args)
    short = (text.rpartition(":")[2] for text in (task["name"], method))
    value = merge(settings, {"name": "_".join(short), "base": args.checkpoint, "task": task, "method": {"type": method}})
    return parse(FinetuneConfig, apply_overrides(value, args.overrides), where="finetune")


def _task(args: argparse.Namespace) -> dict[str, Any]:
    """The task by name and arguments: as asked for, else the one that the checkpoint was trained for."""
    from robopolicy.config import apply_overrides, load_yaml
    from robopolicy.policy import read_provenance

    scratch = args.checkpoint.endswith((".yaml", ".yml"))
    own = (load_yaml(args.checkpoint) if scratch else read_provenance(args.checkpoint)).get("task") or {}
    name = args.task or own.get("name")
    if not isinstance(name, str):
        raise ConfigError(
            f"'{args.checkpoint}' does not say which task it is for; name one with --task (`robopolicy tasks` lists them)"
        )
    arguments = dict(own.get("args") or {}) if name == own.get("name") else {}
    return {"name": name, "args": apply_overrides(arguments, args.task_arg)}


def _list_presets(methods: list[str]) -> None:
    import textwrap

    from robopolicy.rl.config import presets

    for method in methods:
        known = presets(method)
        if not known:
            print(f"{method} has no presets")
        for name, entry in known.items():
            source = " ".join(str(entry.get("source", "")).split())
            alias = f"as {entry['like']}. " if "like" in entry else ""
            print(f"{method} {name}")
            print(textwrap.fill(alias + source, width=110, initial_indent="    ", subsequent_indent="    "))


def _next(config: FinetuneConfig, out: Path) -> str:
    lines = ["next:", f"  robopolicy eval {out} --episodes 200 --film"]
    if not config.base.endswith((".yaml", ".yml")):
        task = " ".join([f" --task {config.task.name}", *(f"--task-arg {k}={v}" for k, v in config.task.args.items())])
        lines.append(f"  robopolicy compare {config.base} {out}{task} --episodes 400")
    return "\n".join(lines)
