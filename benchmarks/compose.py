"""Composition of two policies that see different halves of the world badly: Push-T, human demonstrations (GPC, arXiv 2510.01068).

Parent A (diffusion) sees the block well and the agent through a poor sensor; parent B (flow matching) the other way round. The
errors are in the demonstrations and in the task alike, new at every step.

  python -m benchmarks.compose data --out data/pusht_noisy        # the human demonstrations with the two sensors' readings
  robopolicy train configs/pusht_noisy_agent_diffusion.yaml
  robopolicy train configs/pusht_noisy_block_flow.yaml
  python -m benchmarks.compose run A B --held data/pusht_noisy/held.zarr --out outputs/compose_pusht

``held.zarr`` holds the episodes that no parent was trained on: the weight is predicted from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from robopolicy.data.episodes import Episodes, FeatureSource
from robopolicy.features import Feature
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
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
