"""``robopolicy compare``: is one policy better than another? On the same seeds, with a test that may be looked at any time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from robopolicy.errors import EvaluationError
from robopolicy.evaluate.commands import add_run_arguments, load, seeds_of

if TYPE_CHECKING:
    from robopolicy.evaluate.record import Evaluation

EPILOG = """\
examples:
  robopolicy compare outputs/pusht_flow outputs/pusht_diffusion --episodes 500
  robopolicy compare outputs/a outputs/b --episodes 2000 --stop-when-decided     # as many as it takes, at most 2000
  robopolicy compare a/eval.json b/eval.json                                     # no new episodes: the seeds they share
  robopolicy compare runs/mlp runs/unet runs/dit runs/small                      # a table with letters"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "inputs", nargs="+", metavar="POLICY", help="checkpoints, or eval.json files that `robopolicy eval` wrote"
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--on", choices=("success", "score"), default="success", help="what decides: success, or max reward within [0, 1]"
    )
    parser.add_argument("--alpha", type=float, default=0.05, help="risk of naming a difference that is none (default 0.05)")
    parser.add_argument(
        "--stop-when-decided", action="store_true", help="end as soon as the any-time test decides; two checkpoints"
    )


def run(args: argparse.Namespace) -> int:
    from robopolicy.evaluate.paired import align, compare, write_comparison

    files = [path for path in args.inputs if path.endswith(".json")]
    if len(args.inputs) < 2:
        raise EvaluationError("compare needs at least two policies: checkpoints, or eval.json files")
    if files and len(files) < len(args.inputs):
        raise EvaluationError(
            f"'{files[0]}' is an evaluation and others are checkpoints; evaluate those first with `robopolicy eval`"
        )
    if not 0 < args.alpha < 1:
        raise EvaluationError(f"--alpha {args.alpha} is no probability between 0 and 1")
    if args.stop_when_decided and (files or len(args.inputs) != 2):
        raise EvaluationError("--stop-when-decided runs two checkpoints; drop it to compare files, or more than two")
    if files:
        from robopolicy.evaluate.record import load_evaluation

        evaluations = align([load_evaluation(path) for path in args.inputs], args.inputs)
    else:
        evaluations = _evaluate(args)
    comparison = compare(evaluations, alpha=args.alpha, on=args.on, stopped_early=_stopped(args, evaluations))
    for line in comparison.lines():
        print(line)
    folder = args.out or Path("outputs/compare")
    if not files:
        for label, evaluation in zip(comparison.labels, evaluations, strict=True):
            evaluation.save(folder / label / "eval.json")
    print(f"report  {write_comparison(comparison, folder)}")
    return 0


def _stopped(args: argparse.Namespace, evaluations: Sequence[Evaluation]) -> bool:
    return bool(args.stop_when_decided) and len(evaluations[0].episodes) < args.episodes


def _evaluate(args: argparse.Namespace) -> list[Evaluation]:
    """Run all policies on the same seeds, a block of seeds at a time, so that a decision can end the run early."""
    import time

    import torch
    from tqdm import tqdm

    from robopolicy.evaluate.paired import outcomes
    from robopolicy.evaluate.record import Rollout
    from robopolicy.evaluate.run import check_fit, record, rollout
    from robopolicy.evaluate.stats import sequential
    from robopolicy.vector import VectorEnv

    torch.set_num_threads(args.threads)
    seeds = seeds_of(args)
    num_envs = min(args.num_envs, len(seeds))
    entries = [load(path, args) for path in args.inputs]
    if len({spec.name for _, spec in entries}) > 1:
        raise EvaluationError(
            f"these policies are for different tasks ({', '.join(s.name for _, s in entries)}); name one with --task"
        )
    done: list[list[Rollout]] = [[] for _ in entries]
    seconds = [0.0] * len(entries)
    with ExitStack() as stack:
        envs = [stack.enter_context(VectorEnv(spec, num_envs, args.workers)) for _, spec in entries]
        for (policy, _), env in zip(entries, envs, strict=True):
            check_fit(policy, env)
        bar = stack.enter_context(tqdm(total=len(seeds) * len(entries), desc="compare", unit="episode"))
        for start in range(0, len(seeds), 2 * num_envs):
            block = seeds[start : start + 2 * num_envs]
            for index, ((policy, _), env) in enumerate(zip(entries, envs, strict=True)):
                started = time.perf_counter()
                for one in rollout(policy, env, block, noise_seed=args.noise_seed, name=args.inputs[index]):
                    done[index].append(one)
                    bar.update()
                seconds[index] += time.perf_counter() - started
            if len(entries) == 2:
                test = sequential(*(outcomes(rollouts, args.on) for rollouts in done), alpha=args.alpha)
                bar.set_postfix_str(f"any-time p {test.p_value:.2g}")
                if args.stop_when_decided and test.verdict is not None:
                    break
    return [
        record(
            policy,
            spec,
            rollouts,
            name=path,
            noise_seed=args.noise_seed,
            num_envs=num_envs,
            num_workers=args.workers,
            seconds=spent,
        )
        for (policy, spec), rollouts, path, spent in zip(entries, done, args.inputs, seconds, strict=True)
    ]
