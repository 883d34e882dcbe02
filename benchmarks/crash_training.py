"""Kill -9 a training run again and again; every resume must be bit-exact.

    python benchmarks/crash_training.py --kills 20

A reference run trains straight through and notes a digest of every tensor (weights, average, optimiser) at each checkpoint step.
The same experiment then runs in a process that is killed at random moments and resumed. After each kill the newest checkpoint
must load, lie at most ``checkpoint_every`` steps behind what the process had logged, and have the reference's digest.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from robopolicy.config import parse
from robopolicy.data.episodes import Episodes
from robopolicy.features import Feature
from robopolicy.train.bc import Trainer
from robopolicy.train.checkpoint import read_tensors
from robopolicy.train.experiment import Experiment
from robopolicy.train.metrics import read_metrics

# The campaign must use one version of the code throughout: do not edit the package while it runs.
EVERY = 10
LOG_EVERY = 2


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(np.ascontiguousarray(tensors[name].numpy()).tobytes())
    return total.hexdigest()


def make_experiment(folder: Path, steps: int) -> Experiment:
    rng = np.random.default_rng(0)
    features = {name: Feature(name, (2,), unit="m", rate=10.0) for name in ("position", "action")}
    with Episodes.create(folder / "toy.zarr", features) as episodes:
        for _ in range(20):
            position = np.cumsum(rng.normal(size=(60, 2)), axis=0).astype(np.float32)
            episodes.append({"position": position, "action": position + 1})
    config = {
        "name": "crash",
        "data": {"path": str(folder / "toy.zarr"), "observations": ["position"]},
        "policy": {"net": {"type": "mlp", "width": 128, "depth": 3, "dropout": 0.1}, "obs_noise": 0.01},
        "train": {"steps": steps, "batch_size": 64, "checkpoint_every": EVERY, "log_every": LOG_EVERY, "device": "cpu"},
    }
    (folder / "crash.yaml").write_text(yaml.safe_dump(config))
    return parse(Experiment, config)


def reference_digests(experiment: Experiment, folder: Path) -> dict[int, str]:
    trainer = Trainer(experiment, folder / "reference")
    digests = {}
    while trainer.step < experiment.train.steps:
        trainer.train_step()
        if trainer.step % EVERY == 0:
            digests[trainer.step] = digest(trainer.training_tensors())
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6000, help="long enough that the run does not end before the last kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        experiment = make_experiment(folder, args.steps)
        digests = reference_digests(experiment, folder)
        out = folder / "run"
        command = [sys.executable, "-m", "robopolicy.cli", "train"]
        counts = {"kills": 0, "while_writing": 0, "damaged": 0, "not_bit_exact": 0, "lost_too_much": 0}
        step = 0
        while counts["kills"] < args.kills and step < args.steps:
            start = [str(folder / "crash.yaml"), "--out", str(out)] if step == 0 else ["--resume", str(out)]
            process = subprocess.Popen([*command, *start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            first = out / "checkpoints"
            while newest(first) <= step and process.poll() is None:  # it has begun to save
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 1.0))
            process.kill()
            process.wait()
            counts["kills"] += 1
            counts["while_writing"] += any(first.glob(".partial_*"))
            step = newest(first)
            logged = max((row["step"] for row in read_metrics(out / "metrics.jsonl")), default=0)
            counts["lost_too_much"] += logged - step > EVERY
            try:
                tensors, state = read_tensors(first / f"step_{step:08d}" / "train")
                counts["not_bit_exact"] += state["step"] != step or digest(tensors) != digests[step]
            except Exception as error:
                counts["damaged"] += 1
                print(error, file=sys.stderr)
        subprocess.run([*command, "--resume", str(out)], check=True, capture_output=True)
        final = digest(read_tensors(out / "checkpoints" / "last" / "train")[0]) == digests[args.steps]
    load = os.getloadavg()[0]
    print(
        json.dumps(
            {**counts, "final_equal": final, "steps": args.steps, "seconds": round(time.perf_counter() - started), "load": load}
        )
    )
    sys.exit(0 if final and not (counts["damaged"] or counts["not_bit_exact"] or counts["lost_too_much"]) else 1)


def newest(folder: Path) -> int:
    return max((int(p.name.removeprefix("step_")) for p in folder.glob("step_*")), default=0)


if __name__ == "__main__":
    main()
