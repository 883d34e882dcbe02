"""``robopolicy quickstart``: demonstrations, training, evaluation, films and a report, with one command."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

EPILOG = """\
examples:
  robopolicy quickstart                       # a few minutes on two cores; writes outputs/quickstart/
  robopolicy quickstart --out outputs/try --seed 1 --episodes 200

it demonstrates lifting a cube with a scripted expert, trains the flow-matching policy of configs/lift_flow.yaml on that, and
evaluates the last checkpoint on seeds that neither saw. Each step is a verb of its own; the end says which."""

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "lift_flow.yaml"
NOISE = 0.5  # of the expert: without it the policy never sees how to come back from an error


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="run folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of training (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=100, help="fresh episodes to evaluate on (default: %(default)s)")
    parser.add_argument("--demonstrations", type=int, default=100, help="by the scripted expert (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="simulator processes (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of configs/lift_flow.yaml")


def run(args: argparse.Namespace) -> int:
    from robopolicy.config import apply_overrides, load_yaml, parse
    from robopolicy.data.demos import record
    from robopolicy.errors import ConfigError
    from robopolicy.evaluate.record import write_json
    from robopolicy.evaluate.report import write_report
    from robopolicy.evaluate.run import SEEDS, evaluate
    from robopolicy.policy import load_policy
    from robopolicy.train.bc import Trainer
    from robopolicy.train.experiment import Experiment
    from robopolicy.train.metrics import learning_curve

    if not CONFIG.exists():
        raise ConfigError(
            f"'{CONFIG}' is absent: quickstart runs from a checkout of the repository, not from an installed package"
        )
    started = time.perf_counter()
    out: Path = args.out
    store = out / "demonstrations.zarr"
    value = apply_overrides(load_yaml(CONFIG), [f"data.path={store}", f"seed={args.seed}", "name=quickstart", *args.overrides])
    experiment = parse(Experiment, value, where=str(CONFIG))
    assert experiment.task is not None
    task = experiment.task.spec
    _start_afresh(out)

    _say(f"1/3  {args.demonstrations} demonstrations by the scripted expert -> {store}")
    record(task, store, args.demonstrations, noise=NOISE, seed_start=SEEDS["demonstrations"], workers=args.workers, progress=True)

    _say(f"2/3  training a flow-matching policy -> {out / 'checkpoints'}")
    trainer = Trainer(experiment, out)
    if code := trainer.run():
        return code

    _say(f"3/3  evaluating the last checkpoint on {args.episodes} fresh seeds")
    evaluation = evaluate(
        load_policy(out),
        task,
        range(SEEDS["test"], SEEDS["test"] + args.episodes),
        num_workers=args.workers,
        film=(1, 1),
        name=str(out),
    )
    seconds = time.perf_counter() - started
    write_json(
        out / "result.json",
        {**evaluation.to_json(), "quickstart": {"seconds": round(seconds, 1), "demonstrations": args.demonstrations}},
    )
    write_report(
        out / "report.html",
        title="robopolicy quickstart: lifting a cube",
        evaluation=evaluation,
        learning_curve=learning_curve(out),
        config=experiment.model_dump(mode="json"),
    )
    for line in evaluation.lines():
        print(line)
    print(f"{seconds / 60:.1f} minutes. Look at: {out / 'report.html'}")
    print(NEXT.format(out=out, store=store))
    return 0


NEXT = """
try next:
  robopolicy data info {store}
  robopolicy eval {out} --episodes 500 --workers 2
  robopolicy eval {out} --episodes 100 --steps 1          # one network call per chunk
  robopolicy data demos stack --episodes 200 --out data/stack.zarr
  robopolicy tasks                                         # what else there is to learn
  make setup && robopolicy up virtual                      # this policy on a virtual arm, over ROS 2
  tensorboard --logdir outputs"""


def _start_afresh(out: Path) -> None:
    """Remove an earlier quickstart. Raises ConfigError when the folder is something else."""
    import shutil

    from robopolicy.errors import ConfigError

    if not out.exists():
        return
    demonstrations = "demonstrations.zarr"  # without them it is a run of `robopolicy train`, which may have taken a day
    known = {demonstrations, "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard", "result.json", "report.html", "eval"}
    found = {p.name for p in out.iterdir()}
    if foreign := sorted(found - known if demonstrations in found else found):
        raise ConfigError(
            f"'{out}' holds files that are no quickstart's ({', '.join(foreign[:3])}); choose another folder with --out"
        )
    shutil.rmtree(out)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
