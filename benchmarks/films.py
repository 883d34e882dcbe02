"""Make the film of the README: successful episodes of several policies, side by side.

python -m benchmarks.films docs/films.webp outputs/pusht_state_flow outputs/quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from robopolicy.errors import RobopolicyError
from robopolicy.evaluate.film import replay, write_animation
from robopolicy.evaluate.run import SEEDS, rollout
from robopolicy.policy import load_policy, read_provenance
from robopolicy.task import TaskSpec
from robopolicy.vector import VectorEnv

FRAMES_PER_SECOND = 10.0
SIZE = 256


def film(checkpoint: Path, attempts: int) -> list[np.ndarray]:
    """Frames ``uint8 [SIZE, SIZE, 3]`` at FRAMES_PER_SECOND of the first successful test episode, in the order of seeds."""
    task = read_provenance(checkpoint)["task"]
    spec = TaskSpec(task["name"], task["args"])
    seeds = range(SEEDS["test"], SEEDS["test"] + attempts)
    with VectorEnv(spec, attempts) as env:
        rollouts = sorted(rollout(load_policy(checkpoint), env, seeds, noise_seed=0), key=lambda r: r.episode.seed)
    chosen = next((r for r in rollouts if r.episode.success), None)
    if chosen is None:
        raise RobopolicyError(f"'{checkpoint}' succeeds in none of {attempts} episodes; give a better policy or more --attempts")
    environment = spec.make()
    frames = replay(environment, chosen)
    skip = max(1, round(environment.rate / FRAMES_PER_SECOND))
    environment.close()
    return [cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for frame in [*frames[::skip], frames[-1]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .webp or .gif")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--attempts", type=int, default=12, help="episodes to choose the first success from")
    args = parser.parse_args()
    films = [film(checkpoint, args.attempts) for checkpoint in args.checkpoints]
    length = max(map(len, films)) + round(FRAMES_PER_SECOND)  # hold the end for a second
    rows = [[frames[min(i, len(frames) - 1)] for frames in films] for i in range(length)]
    pictures = [np.concatenate(row, axis=1) for row in rows]
    write_animation(
        args.out, pictures, FRAMES_PER_SECOND, "gif" if args.out.suffix == ".gif" else "webp", width=SIZE * len(films)
    )


if __name__ == "__main__":
    main()
