"""``robopolicy compose``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.evaluate.commands import add_run_arguments, count, load, override_noise, override_steps

if TYPE_CHECKING:
    from robopolicy.compose.policy import Composed
    from robopolicy.compose.predict import Prediction
    from robopolicy.policy import Policy
    from robopolicy.task import TaskSpec

EPILOG = """\
examples:
  robopolicy compose outputs/a outputs/b --weights 0.6 0.4 --out outputs/ab     # no roll-outs: just the policy
  robopolicy compose outputs/a outputs/b --search                               # find the weights, then test them
  robopolicy compose outputs/a outputs/b --search --data data/held.zarr         # and predict them from new demonstrations
  robopolicy compose outputs/a outputs/b --rule and --search                    # no weights to find: test it, with controls
  robopolicy compose outputs/a outputs/b outputs/c --search path.type=flow sampler.type=euler

rules: convex is the weighted mean of what the parents see at each step (a compromise: where they want different things it goes
between); product multiplies them (sharper: what both hold likely); guidance follows the first away from the second, which hears
less (classifier-free) or is weaker: weights are scale and 1 - scale; and, or are superpositions, sampled stochastically. Parents
may differ in observations, path (diffusion, flow), prediction, network and horizon; they must command the same action, in the
same representation, with the same normaliser. Path and sampler are the first parent's; key=value changes them (path.*,
sampler.*, n_action_steps, prior_std, renormalize=true).

--search chooses weights on seeds from 300000 and tests them on others, from 200000, against: every parent alone by the same
sampler; every parent as it came; the best parent with as many network calls as the composition makes; equal weights; and, for
and/or, the plain mean by the same stochastic sampler. OUT becomes a policy that every other verb takes, of the first
parent's task; --task and --task-arg name another, also without --search: `eval` of OUT then runs that one."""


SEARCHING: dict[str, Any] = {  # the arguments that only --search uses, and their defaults
    "points": None,
    "search_episodes": 100,
    "on": "success",
    "episodes": 200,
    "seeds": "test",
    "num_envs": 50,
    "workers": 0,
    "noise_seed": 0,
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("parents", nargs="+", metavar="CKPT", help="two or more run or checkpoint folders; then key=value")
    parser.set_defaults(overrides=[])
    parser.add_argument(
        "--rule",
        choices=("convex", "product", "guidance", "and", "or"),
        default="convex",
        help="how to mix (default convex)",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each parent (default: equal; guidance: 1.5 -0.5)"
    )
    parser.add_argument("--search", action="store_true", help="find weights by roll-outs and test them on other seeds")
    parser.add_argument(
        "--points",
        type=count,
        metavar="N",
        help="weights from 0 to 1 to try (default 11; 5 for more parents); product: from 0 to the number of parents; "
        "guidance: scales from 1 to 3 (default 9)",
    )
    parser.add_argument("--search-episodes", type=count, metavar="N", help="episodes for each of them (default 100)")
    parser.add_argument("--on", choices=("success", "score"), help="what decides: success (default), or max reward")
    parser.add_argument("--data", type=Path, metavar="ZARR", help="demonstrations new to the parents, to predict weights from")
    add_run_arguments(parser)
    parser.set_defaults(**dict.fromkeys(SEARCHING))  # so that one that was given is known from one that was not


def run(args: argparse.Namespace) -> int:
    parents = [text for text in args.parents if "=" not in text]
    overrides = [*(text for text in args.parents if "=" in text), *args.overrides]
    _check(args, parents)
    for name, value in SEARCHING.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))

    import torch

    from robopolicy.data.rollouts import origin_of
    from robopolicy.distill.times import check_walk
    from robopolicy.provenance import provenance

    torch.set_num_threads(args.threads)
    loaded = [_load(path, args) for path in parents]
    spec = loaded[0][1]
    policy = build(args, [policy for policy, _ in loaded], overrides)
    for path in parents:
        check_walk(policy, path)
    folder = args.out or _default_folder(args, parents)
    prediction = _predict(args, policy, parents)
    if prediction is not None:
        print(f"predicted weights of a mean  {said(prediction.weights)}   least error on {prediction.windows} held-out chunks")
    search = None
    if args.search:
        from robopolicy.compose.search import Search

        if spec is None:
            raise EvaluationError(f"checkpoint '{parents[0]}' does not say which task it is for; name one with --task")
        search = Search(policy, [policy for policy, _ in loaded], parents, spec, args)
        found = search.find()
        policy = found.policy
    about = {
        **provenance(),
        "task": {"name": spec.name, "args": dict(spec.kwargs)} if spec else None,
        "experiment": folder.name,
        "method": {"type": "compose", "rule": args.rule, "weights": list(policy.config.weights)},
        "parents": [origin_of(path) for path in parents],
    }
    policy.save(folder, about)  # before the test, which takes longer than the search
    if search is not None:
        outcome = search.test(found, prediction)
        print("\n".join(outcome.lines()))
        print(f"report  {outcome.write(folder)}")
    weights = "" if superposes(args) else f", weights {said(policy.config.weights)}"
    print(f"policy  {folder}   {args.rule}{weights}")
    return 0


def build(args: argparse.Namespace, parents: list[Policy], overrides: list[str]) -> Composed:
    """The composition that the arguments describe. Raises ConfigError."""
    from robopolicy.compose.policy import compose
    from robopolicy.config import apply_overrides

    base: dict[str, Any] = {"path": dict(parents[0].config.path), "sampler": {}}
    settings = apply_overrides(base, overrides)
    for key in ("path", "sampler"):
        value, given = settings[key], any(text.startswith((f"{key}.", f"{key}=")) for text in overrides)
        if not given:
            del settings[key]
        elif key == "path" and value.get("type") != base["path"]["type"]:
            settings[key] = {k: v for k, v in value.items() if k == "type" or k not in base["path"]}
        elif key == "sampler" and "type" not in value:
            own = compose(parents, rule=args.rule, weights=args.weights).config.sampler
            settings[key] = {**own, **value}
    policy = compose(parents, rule=args.rule, weights=args.weights, **settings)
    if args.steps is not None:
        override_steps(policy, args.steps)
    if args.noise is not None:
        override_noise(policy, args.noise, next(text for text in args.parents if "=" not in text))
    return policy


def _default_folder(args: argparse.Namespace, parents: list[str]) -> Path:
    return Path("outputs") / f"{args.rule}_of_{'_'.join(Path(parent).name for parent in parents)}"


def superposes(args: argparse.Namespace) -> bool:
    return args.rule in ("and", "or")


def said(weights: Any) -> str:
    return " ".join(f"{weight:.2f}" for weight in weights)


def _check(args: argparse.Namespace, parents: list[str]) -> None:
    """What can be said before anything is loaded. Raises ConfigError or EvaluationError."""
    if len(parents) < 2:
        raise ConfigError(f"{len(parents)} policy to compose; name two checkpoints or more: robopolicy compose A B")
    if args.weights is not None and len(args.weights) != len(parents):
        raise ConfigError(f"--weights gives {len(args.weights)} for {len(parents)} parents; give one each")
    if args.weights is not None and superposes(args):
        raise ConfigError(f"rule '{args.rule}' finds its own weights at every step; drop --weights")
    if args.rule == "guidance" and args.data is not None:
        raise ConfigError("--data predicts the weights of a mean; a scale of rule 'guidance' is found by --search alone")
    if superposes(args) and args.data is not None:
        raise ConfigError(f"--data predicts the weights of a mean, and rule '{args.rule}' has none; drop it")
    if superposes(args) and args.points is not None:
        raise ConfigError(f"rule '{args.rule}' has no weights to try; drop --points")
    if not args.search and (idle := [name for name in SEARCHING if getattr(args, name) is not None]):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(f"without --search nothing is run and weights are not chosen; add --search, or drop {named}")
    if args.search and args.weights is not None:
        raise ConfigError("--search finds the weights; drop --weights, or drop --search to save these")
    if args.search and args.seeds == "search":
        raise EvaluationError("--seeds search: weights are chosen on those; test them on others, for example --seeds test")
    folder = args.out or _default_folder(args, parents)
    if any((folder / name).exists() for name in ("policy.json", "checkpoints")):  # every verb would take one for the other
        raise ConfigError(f"'{folder}' already holds a policy or a run; choose another --out")
    if any((folder / name).exists() for name in ("compose.json", "report.html")):  # it would be read as of the new policy
        raise ConfigError(f"'{folder}' holds the report of another composition; choose another --out, or remove it")
    if args.points is not None and args.points < 2:
        raise ConfigError(f"--points {args.points}: 0 and 1 are two; give at least 2")


def _load(path: str, args: argparse.Namespace) -> tuple[Policy, TaskSpec | None]:
    from robopolicy.policy import Policy, load_policy, read_provenance

    if args.task is None and not isinstance((read_provenance(path).get("task") or {}).get("name"), str):
        return load_policy(path, args.device), None  # enough to compose
    policy, spec = load(path, argparse.Namespace(**{**vars(args), "steps": None, "noise": None}))
    if not isinstance(policy, Policy):
        raise ConfigError(f"'{path}' is an export: it cannot be asked step by step; compose the checkpoint that it was made from")
    return policy, spec


def _predict(args: argparse.Namespace, policy: Composed, parents: list[str]) -> Prediction | None:
    """Weights from held-out demonstrations: of --data, else of what the first parent's run kept back, if all parents did."""
    import torch

    from robopolicy.compose.held import held_out
    from robopolicy.compose.predict import predict_weights

    if not (args.search or args.data) or superposes(args):  # it has no weights
        return None
    if args.rule == "guidance":  # the least error is not beyond both parents
        return None
    windows = held_out(policy, parents, args.data)
    if isinstance(windows, str):
        print(f"note: no weights are predicted: {windows}; give new demonstrations with --data", file=sys.stderr)
        return None
    return predict_weights(policy, windows, torch.Generator().manual_seed(0))
