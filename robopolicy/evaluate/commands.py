"""``robopolicy eval``: how good is a policy? And what ``compare`` shares with it: which policy, which task, which seeds."""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.errors import ConfigError, EvaluationError, nearest

if TYPE_CHECKING:
    from robopolicy.evaluate.record import Evaluation
    from robopolicy.evaluate.run import Actor
    from robopolicy.policy import Policy
    from robopolicy.task import TaskSpec

EPILOG = """\
examples:
  robopolicy eval outputs/pusht_flow --episodes 500 --film
  robopolicy eval outputs/pusht_flow --steps 4                  # fewer sampler steps, to see what they cost
  robopolicy eval outputs/pusht_flow --noise .5                 # fewer, more typical chunks
  robopolicy eval outputs/lift_flow --task lift --seeds 250000 --episodes 100 --workers 2
  robopolicy eval runs/seed0 runs/seed1 runs/seed2 --episodes 200   # training seeds, pooled
  robopolicy eval outputs/pusht_flow --delay 4 --executor rtc       # as if inference took 4 control steps (docs/realtime.md)
  robopolicy eval outputs/lift_flow --delay 4 --executor '{type: rti, columns: [6]}' --replan 6
  robopolicy eval outputs/lift_flow --robot arm --episodes 50       # the arm's control path and safety filter, on a fake clock
  robopolicy eval outputs/lift_flow --robot ros2 --robot-arg profile=virtual --episodes 50   # over ROS 2, in real time

Seeds of demonstrations start at 0, of validation during training at 100000, of tests at 200000, of searches at 300000: a
policy never meets its test episodes before the test. The noise of the policy is seeded too: the same command gives the same
figures."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="a run or checkpoint folder; several are pooled as training seeds"
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--film", nargs="?", type=count, const=1, default=0, metavar="N", help="film N successes and N failures (default 1)"
    )
    parser.add_argument("--delay", type=int, metavar="TICKS", help="control steps from an observation to the chunk it leads to")
    parser.add_argument(
        "--executor",
        metavar="NAME|YAML",
        help="with --delay: pause, latest, ensemble, rtc, rtc_identity, rtc_trained, rti, streaming or bid, or one with "
        "settings, '{type: rti, columns: [6]}' (default latest)",
    )
    parser.add_argument(
        "--replan",
        type=count,
        metavar="TICKS",
        help="with --delay or --robot: control steps between inferences (default: as fits)",
    )
    parser.add_argument(
        "--robot", metavar="NAME", help="run on a robot, one episode at a time: arm, ros2, or package.module:make"
    )
    parser.add_argument("--robot-arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the robot; repeatable")
    parser.add_argument("--limits", metavar="NAME|FILE", help="with --robot: safety limits (default: the robot's own)")
    parser.add_argument("--seconds", type=positive, metavar="S", help="with --robot: of an episode (default: the task's)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of everything that runs episodes."""
    parser.add_argument("--task", help="task to run (default: the one the policy was trained for)")
    parser.add_argument("--task-arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the task; repeatable")
    parser.add_argument("--episodes", type=count, default=200, help="one per seed (default 200)")
    parser.add_argument(
        "--seeds", default="test", metavar="test|validation|search|START", help="where seeds start (default test)"
    )
    add_sampling_arguments(parser)
    parser.add_argument("--num-envs", type=count, default=50, help="episodes that advance together (default 50)")
    parser.add_argument("--workers", type=natural, default=0, help="processes that step them (default 0: none besides this one)")
    parser.add_argument("--noise-seed", type=int, default=0, help="seed of the policy's noise (default 0)")
    parser.add_argument("--device", default="cpu", help="where the network runs (default cpu)")
    parser.add_argument("--threads", type=count, default=1, help="threads of the network (default 1: best for small ones)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is sampled, where it shall be otherwise than it says itself; :func:`override_sampling` does it."""
    parser.add_argument("--steps", type=count, metavar="N", help="sampler steps instead of those of the checkpoint")
    parser.add_argument(
        "--noise",
        type=scale,
        metavar="SCALE",
        help="scale of the initial noise instead of the checkpoint's; below 1: fewer, more typical chunks",
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from robopolicy.evaluate.report import write_report
    from robopolicy.evaluate.run import evaluate

    torch.set_num_threads(args.threads)
    seeds = seeds_of(args)
    if args.robot is not None:
        return _on_robot(args, seeds)
    if args.robot_arg or args.limits is not None or args.seconds is not None:
        raise EvaluationError("--robot-arg, --limits and --seconds are of a robot; name one with --robot")
    if args.delay is not None:
        return _delayed(args, seeds)
    if args.executor is not None or args.replan is not None:
        raise EvaluationError("--executor and --replan say what happens during a delay; give --delay TICKS (0: none)")
    evaluations: list[Evaluation] = []
    for path in args.checkpoints:
        policy, spec = load(path, args)
        evaluation = evaluate(
            policy,
            spec,
            seeds,
            num_envs=args.num_envs,
            num_workers=args.workers,
            noise_seed=args.noise_seed,
            film=(args.film, args.film) if len(evaluations) == 0 else (0, 0),
            name=str(path),
        )
        evaluations.append(evaluation)
    first = evaluations[0]
    folder = args.out or _default_folder(args, first)
    if len(evaluations) == 1:
        first.save(folder / "eval.json")
        report = write_report(folder / "report.html", title=f"{_short(first.policy)} on {first.task.name}", evaluation=first)
        print("\n".join(first.lines()))
    else:
        report = _pooled(evaluations, args.checkpoints, folder)
    for film in first.films:
        (folder / f"{'success' if film.episode.success else 'failure'}_{film.episode.seed}.mp4").write_bytes(film.mp4)
    print(f"report           {report}")
    return 0


def _delayed(args: argparse.Namespace, seeds: Sequence[int]) -> int:
    """Run one policy as if inference took ``args.delay`` control steps."""
    from robopolicy.deploy.delayed import EACH_TICK, evaluate_delayed, mode
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.evaluate.record import write_json
    from robopolicy.policy import Policy

    asked = args.executor or "latest"
    name, planner, executor = mode(setting("executor", asked))
    replan = max(args.delay, 1) if args.replan is None and name in EACH_TICK else args.replan
    if len(args.checkpoints) > 1 or args.film:
        raise EvaluationError("--delay takes one checkpoint, and no --film; leave these out")
    policy, spec = load(args.checkpoints[0], args)
    assert isinstance(policy, Policy | ExportedPolicy)
    warn_of_untrained_times(args.checkpoints[0], planner)
    done = evaluate_delayed(
        policy,
        spec,
        seeds,
        delay=args.delay,
        planner=planner,
        executor=executor,
        replan=replan,
        num_envs=args.num_envs,
        num_workers=args.workers,
        noise_seed=args.noise_seed,
        name=args.checkpoints[0],
    )
    how = re.sub(r"\W+", "_", asked).strip("_") + (f"_replan{args.replan}" if args.replan else "")
    folder = args.out or _default_folder(args, done.evaluation, f".{how}_{args.delay}")
    done.evaluation.save(folder / "eval.json")
    write_json(folder / "realtime.json", done.realtime.model_dump(mode="json"))
    print("\n".join([*done.lines(), f"figures          {folder}"]))
    return 0


def _on_robot(args: argparse.Namespace, seeds: Sequence[int]) -> int:
    """Run one policy on a robot, through the control loop."""
    from robopolicy.deploy.delayed import mode
    from robopolicy.evaluate.robot import UnfinishedError, evaluate_on_robot
    from robopolicy.task import find_task

    if len(args.checkpoints) > 1 or args.film:
        raise EvaluationError("--robot takes one checkpoint, and no --film; leave these out")
    _check_robot_arguments(args.robot, _task_arguments(args.robot_arg))
    policy, spec = load(args.checkpoints[0], args)
    _, planner, executor = mode(setting("executor", args.executor or "latest"))
    warn_of_untrained_times(args.checkpoints[0], planner)
    ended: UnfinishedError | None = None
    try:
        done = evaluate_on_robot(
            policy,
            spec,
            seeds,
            robot=args.robot,
            robot_args=_task_arguments(args.robot_arg),
            limits=args.limits,
            planner=planner,
            executor=executor,
            replan=args.replan,
            delay=None if args.delay is None else args.delay / find_task(spec.name).rate,
            seconds=args.seconds,
            noise_seed=args.noise_seed,
            name=args.checkpoints[0],
        )
    except UnfinishedError as error:
        done, ended = error.done, error
    robot = re.sub(r"\W+", "_", args.robot).strip("_")
    folder = args.out or _default_folder(args, done.evaluation, f".{robot}")
    done.evaluation.save(folder / "eval.json")
    print("\n".join([*done.lines(), f"figures          {folder}"]))
    if ended is not None:
        raise ended
    return 0


def _check_robot_arguments(robot: str, given: Iterable[str]) -> None:
    """Refuse what the robot does not name, where it names any: else it would be taken for an argument of the task."""
    from robopolicy.evaluate.robot import find_robot

    parameters = [*inspect.signature(find_robot(robot)).parameters.values()][2:]  # after task and clock
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for name in given:
        if names and name not in names:
            valid = ", ".join(names)
            raise ConfigError(f"robot '{robot}' takes no argument '{name}'; valid: {valid}; the task's go with --task-arg")


def _pooled(evaluations: Sequence[Evaluation], checkpoints: Sequence[str], folder: Path) -> Path:
    """Print and write several training seeds and what they say together; returns the report's path."""
    import numpy as np
    from markupsafe import Markup

    from robopolicy.evaluate.record import BOOTSTRAP_SEED, write_json
    from robopolicy.evaluate.report import Section, write_report
    from robopolicy.evaluate.stats import pooled_interval

    origins = [(p.get("experiment"), p.get("seed")) for p in map(_origin, checkpoints)]
    if len(set(origins)) < len(origins) and origins[0][1] is not None:
        print("note: two of these are the same experiment with the same training seed; they are not independent", file=sys.stderr)
    if len({e.task.name for e in evaluations}) > 1:
        raise EvaluationError("these policies were trained for different tasks; name one with --task, or evaluate each by itself")
    figures = {
        "success": pooled_interval([e.successes for e in evaluations], np.random.default_rng(BOOTSTRAP_SEED), same_seeds=True),
        "mean max reward": pooled_interval(
            [e.max_rewards for e in evaluations], np.random.default_rng(BOOTSTRAP_SEED), same_seeds=True
        ),
    }
    for index, evaluation in enumerate(evaluations):
        evaluation.save(folder / f"{index}" / "eval.json")
        print(f"{evaluation.policy}: success {evaluation.success}, mean max reward {evaluation.max_reward}")
    count = len(evaluations)
    for name, interval in figures.items():
        print(f"{name:<16} {interval}   pooled over {count} training seeds x {len(evaluations[0].episodes)} episodes")
    note = "Resampled over training seeds, then over environment seeds, which all policies share."
    if count < 5:
        note += f" With {count} training seeds the interval is too narrow where training seeds differ much (docs/eval.md)."
        print(
            f"note: {count} training seeds are few; the interval is too narrow when they differ much (docs/eval.md)",
            file=sys.stderr,
        )
    write_json(
        folder / "pooled.json",
        {
            "schema_version": 1,
            "checkpoints": list(checkpoints),
            "evaluations": [f"{i}/eval.json" for i in range(count)],
            **{name.replace(" ", "_"): interval._asdict() for name, interval in figures.items()},
        },
    )
    rows = "".join(f"<tr><th>{name}</th><td>{interval}</td></tr>" for name, interval in figures.items())
    section = Section(f"Pooled over {count} training seeds", Markup(f"<table>{rows}</table>"), note)
    task = evaluations[0].task.name
    return write_report(
        folder / "report.html", title=f"{count} training seeds on {task}", evaluation=evaluations, extra=[section]
    )


def load(path: str, args: argparse.Namespace) -> tuple[Actor, TaskSpec]:
    """The policy at ``path``, a checkpoint or an export, sampled as the arguments say, and the task it shall run in."""
    from robopolicy.deploy.manifest import is_export
    from robopolicy.task import TaskSpec

    policy: Actor = _load_export(path, args) if is_export(path) else _load_checkpoint(path, args)
    own = _origin(path).get("task") or {}
    name = args.task or own.get("name")
    if not isinstance(name, str):
        raise EvaluationError(
            f"checkpoint '{path}' does not say which task it is for; name one with --task (`robopolicy tasks` lists them)"
        )
    arguments: dict[str, Any] = dict(own.get("args", {})) if name == own.get("name") else {}
    arguments.update(_task_arguments(args.task_arg))
    return policy, TaskSpec(name, arguments)


def _load_checkpoint(path: str, args: argparse.Namespace) -> Policy:
    from robopolicy.policy import load_policy

    policy = load_policy(path, args.device)
    override_sampling(policy, path, args)
    return policy


def _load_export(path: str, args: argparse.Namespace) -> Actor:
    from robopolicy.deploy.exported import ExportedPolicy

    if args.steps is not None:
        raise EvaluationError(
            f"'{path}' is an export, its steps are fixed; export the checkpoint again with --steps {args.steps}"
        )
    if args.noise is not None:
        raise EvaluationError(
            f"'{path}' is an export, its noise is fixed; export the checkpoint again with --noise {args.noise:g}"
        )
    return ExportedPolicy(path, args.threads)


def _origin(path: str) -> dict[str, Any]:
    """The provenance of a checkpoint, or of the one that an export was made from."""
    from robopolicy.deploy.manifest import is_export, load_manifest
    from robopolicy.policy import read_provenance

    if not is_export(path):
        return read_provenance(path)
    provenance = load_manifest(path).checkpoint.get("provenance", {})
    return provenance if isinstance(provenance, dict) else {}


def override_sampling(policy: Policy, checkpoint: str, args: argparse.Namespace) -> None:
    """Sample the policy that was loaded from ``checkpoint`` as ``--steps`` and ``--noise`` say. Raises ConfigError."""
    from robopolicy.distill.times import check_walk

    if args.steps is not None:
        override_steps(policy, args.steps)
    if args.noise is not None:
        override_noise(policy, args.noise, checkpoint)
    if args.steps is not None or args.noise is not None:
        check_walk(policy, checkpoint)


def warn_of_untrained_times(path: str, planner: Mapping[str, Any] | str) -> None:
    """Say so when the planner asks a distilled network at times at which it was never trained: no step is refused, as that may
    go well."""
    from robopolicy.config import component
    from robopolicy.deploy.manifest import is_export
    from robopolicy.deploy.planner import PLANNERS, RTI
    from robopolicy.distill.times import lineage, trained_times
    from robopolicy.train.checkpoint import find_policy, read_document

    cls, config = component("planner", planner, PLANNERS)
    if not (isinstance(cls, type) and issubclass(cls, RTI) and isinstance(config, RTI.Config)) or is_export(path):
        return
    if config.t_start == 1:  # nothing is left of the guess: the policy is sampled by its own steps
        return
    asked = [config.t_start * (1 - step / config.steps) for step in range(config.steps)]
    document = read_document(find_policy(path) / "policy")
    for name, _, origin in lineage(f"'{path}'", document, document.get("provenance", {})):
        trained = trained_times(origin)
        strange = [] if trained is None else [t for t in asked if all(abs(t - own) > 1e-6 for own in trained)]
        if trained is not None and strange:
            print(
                f"note: planner rti asks {name} at t = {', '.join(f'{t:.3g}' for t in strange)}, and its network was distilled "
                f"for t = {', '.join(f'{t:g}' for t in trained)} only; compare with executor latest before you use it",
                file=sys.stderr,
            )
            return


def override_steps(policy: Policy, steps: int) -> None:
    """Make the policy's sampler take ``steps`` steps. Raises ConfigError when it cannot."""
    from robopolicy.config import component
    from robopolicy.generative.sampler import SAMPLERS

    setting = {**policy.config.sampler, "num_steps": steps}
    cls, config = component("sampler", setting, SAMPLERS)
    policy.sampler = cls(config)
    policy.config = policy.config.model_copy(update={"sampler": setting})


def override_noise(policy: Policy, noise: float, name: str) -> None:
    """Make the policy start from noise of scale ``noise``. Raises ConfigError for one that knows no start but 0."""
    if policy.config.initial_noise == 0 and noise > 0:
        raise ConfigError(
            f"'{name}' starts from no noise (policy.initial_noise 0): its network knows no other start, so a scale of "
            f"{noise:g} cannot be; leave it out"
        )
    policy.config = policy.config.model_copy(update={"initial_noise": noise})


def seeds_of(args: argparse.Namespace) -> list[int]:
    """The environment seeds that the arguments ask for, ascending."""
    from robopolicy.evaluate.run import SEEDS

    if args.seeds not in SEEDS and not args.seeds.isdigit():
        raise EvaluationError(f"--seeds {args.seeds}: {nearest(args.seeds, SEEDS)} Or give the first seed, a number")
    start = SEEDS[args.seeds] if args.seeds in SEEDS else int(args.seeds)
    return list(range(start, start + args.episodes))


def setting(name: str, text: str) -> Any:
    """What an argument says that takes a name, or YAML: ``rti`` or ``{type: rti, steps: 1}``. Raises ConfigError."""
    from robopolicy.config import apply_overrides

    return apply_overrides({}, [f"{name}={text}"])[name]


def _task_arguments(texts: Sequence[str]) -> dict[str, Any]:
    from robopolicy.config import apply_overrides

    return apply_overrides({}, texts)


def _default_folder(args: argparse.Namespace, first: Evaluation, suffix: str = "") -> Path:
    """Beside the (first) policy, named after what changes the figures."""
    task = first.task.name.rpartition(":")[2]
    pooled = "_pooled" if len(args.checkpoints) > 1 else ""
    name = f"{task}_{first.seeds[0]}_{len(first.episodes)}{sampled(args)}{pooled}{suffix}"
    return Path(args.checkpoints[0]) / "eval" / name


def sampled(args: argparse.Namespace) -> str:
    """``--steps`` and ``--noise`` as a part of a name; empty without them."""
    steps = f"_steps{args.steps}" if args.steps is not None else ""
    return steps + (f"_noise{args.noise:g}" if args.noise is not None else "")


def _short(policy: str) -> str:
    return "/".join(Path(policy).parts[-2:])


def count(text: str) -> int:
    """Of an argument: an integer of at least 1."""
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _integer(text: str) -> int:
    """As :class:`int`; of what is none argparse would say that it is an invalid value of the function that asked."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from error


def natural(text: str) -> int:
    """Of an argument: an integer of at least 0."""
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def positive(text: str) -> float:
    """Of an argument: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def scale(text: str) -> float:
    """Of an argument: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is no scale; give 0 or more")
    return value
