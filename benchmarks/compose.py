"""Composition of two policies that see different halves of the world badly: Push-T, human demonstrations (GPC, arXiv 2510.01068).

Parent A (diffusion) sees the block well and the agent through a poor sensor; parent B (flow matching) the other way round. The
errors are in the demonstrations and in the task alike, new at every step.

  python -m benchmarks.compose data --out data/pusht_noisy        # the human demonstrations with the two sensors' readings
  robopolicy train configs/pusht_noisy_agent_diffusion.yaml
  robopolicy train configs/pusht_noisy_block_flow.yaml
  python -m benchmarks.compose run A B --held data/pusht_noisy/held.zarr --out outputs/compose_pusht

``run`` tests product, AND and OR, calls `robopolicy compose --search` for the convex rule with all its controls, and compares all
on the same test seeds with the best single parent. ``held.zarr`` holds the episodes that no parent was trained on: the weight is
predicted from them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from robopolicy.cli import main as robopolicy
from robopolicy.compose.policy import Composed, compose, plain_sampler
from robopolicy.compose.search import Search
from robopolicy.data.episodes import Episodes, FeatureSource
from robopolicy.evaluate.paired import compare
from robopolicy.evaluate.record import Evaluation, load_evaluation, write_json
from robopolicy.evaluate.run import SEEDS, evaluate
from robopolicy.features import Feature
from robopolicy.policy import load_policy, read_provenance
from robopolicy.task import TaskSpec
from sim.pusht import PushT, noisy_sensors

HUMAN = "../shared/data/pusht_human/pusht_cchi_v7_replay.zarr"


def make_data(args: argparse.Namespace) -> None:
    """Two stores with the readings of poor sensors: each episode ``copies`` times, with new errors."""
    sources = {"state": FeatureSource(), "keypoint": FeatureSource(), "action": FeatureSource()}
    human = Episodes.open(args.human, features=sources)
    task = PushT(noise=args.noise)
    features: dict[str, Feature] = {**task.observation_features, "action": task.action_feature}
    order = np.random.default_rng(0).permutation(len(human))
    parts = {"held": order[: args.held], "train": order[args.held :]}
    for part, ids in parts.items():
        about = {"source": str(args.human), "noise": list(args.noise), "episodes": ids.tolist(), "copies": args.copies}
        with Episodes.create(args.out / f"{part}.zarr", features, attrs=about) as store, tqdm(total=len(ids), desc=part) as bar:
            for episode in ids.tolist():
                start, stop = int(human.ends[episode - 1]) if episode else 0, int(human.ends[episode])
                state = human.read("state", start, stop)
                clean = {
                    "agent_pos": state[:, :2].astype(np.float32),
                    "keypoints": human.read("keypoint", start, stop).reshape(-1, 18).astype(np.float32),
                    "action": human.read("action", start, stop).astype(np.float32),
                }
                for copy in range(args.copies):
                    store.append({**clean, **noisy_sensors(state, args.noise, np.random.default_rng([episode, copy]))})
                bar.update()
        print(f"{args.out / part}.zarr: {len(ids)} episodes, {args.copies} times each")


def run(args: argparse.Namespace) -> None:
    """The convex rule by the verb; product, AND and OR besides; a table of all of them against the best single parent."""
    torch.set_num_threads(1)
    task = read_provenance(args.a)["task"]
    spec = TaskSpec(task["name"], task["args"])
    parents = [load_policy(args.a), load_policy(args.b)]
    both = compose(parents, rule="and", sampler={**compose(parents, rule="and").config.sampler, "num_steps": args.steps})
    sampler = both.config.sampler
    others: dict[str, Composed] = {
        "and": both,
        "or": compose(parents, rule="or", sampler={**sampler, "mode": "or"}),
        "mean, same stochastic sampler": both.varied(rule="convex", weights=[0.5, 0.5], sampler=plain_sampler(both)),
    }
    options = argparse.Namespace(
        points=5, search_episodes=args.search_episodes, on="score", seeds="test", episodes=args.episodes, num_envs=50, workers=0,
        noise_seed=0,
    )  # fmt: skip
    product = Search(compose(parents, rule="product"), parents, [args.a, args.b], spec, options).find()
    found = {str(point.weights): point.evaluation.max_reward.mean for point in product.points}
    others[f"product {product.chosen.weights}"] = product.policy
    done: dict[str, Evaluation] = {}
    for name, policy in others.items():
        file = args.out / "rules" / name.replace(" ", "_") / "eval.json"
        if not file.exists():
            seeds = range(SEEDS["test"], SEEDS["test"] + args.episodes)
            evaluate(policy, spec, seeds, name=name).save(file)
        done[name] = load_evaluation(file)
    convex, episodes = args.out / "convex", str(args.episodes)
    if not (convex / "compose.json").exists():
        search = ["--search", "--on", "score", "--search-episodes", str(args.search_episodes), "--episodes", episodes]
        if robopolicy(["compose", args.a, args.b, *search, "--data", str(args.held), "--out", str(convex)]):
            raise SystemExit("the search failed")
    tests = {path.parent.name: load_evaluation(path) for path in sorted((convex / "eval").glob("*/eval.json"))}
    best = max((name for name in tests if name.startswith("parent")), key=lambda name: tests[name].max_reward.mean)
    tests |= done
    rows = {name: _row(tests[best], evaluation) for name, evaluation in tests.items()}
    write_json(args.out / "rules.json", {"best_parent": best, "product_search": found, "rows": rows})
    print(f"| {args.episodes} test seeds | score | success | score minus {best} | p | success minus it | McNemar p |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(row) + " |")
    print(json.dumps(found))


def _row(best: Evaluation, evaluation: Evaluation) -> list[str]:
    pair = compare([best, evaluation]).pairs[0]
    return [
        str(evaluation.max_reward),
        str(evaluation.success),
        pair.score.signed(),
        f"{pair.score_p:.2g}",
        pair.success.signed(),
        f"{pair.mcnemar.p_value:.2g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = verbs.add_parser("data", help="make the two stores")
    data.add_argument("--human", default=HUMAN)
    data.add_argument("--noise", nargs=3, type=float, default=[60.0, 15.0, 0.15], help="agent [px], block [px], angle [rad]")
    data.add_argument("--copies", type=int, default=6)
    data.add_argument("--held", type=int, default=20, help="episodes to leave out of training")
    data.add_argument("--out", type=Path, required=True)
    data.set_defaults(run=make_data)
    rolls = verbs.add_parser("run", help="search, test, and compare the rules")
    rolls.add_argument("a")
    rolls.add_argument("b")
    rolls.add_argument("--held", type=Path, required=True)
    rolls.add_argument("--search-episodes", type=int, default=100)
    rolls.add_argument("--episodes", type=int, default=400)
    rolls.add_argument("--steps", type=int, default=30, help="of the stochastic samplers")
    rolls.add_argument("--out", type=Path, required=True)
    rolls.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
