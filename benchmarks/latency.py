"""Latency from observation to action at batch 1: runtimes, sampler steps, threads; against lerobot's DiffusionPolicy.

The same U-Net on both sides (1.2 M parameters, Mish, 16 actions of 2, context 40), and our MLP. Ours is timed from arrays in
their units to arrays in theirs, normalisers and noise included; lerobot's between normalised tensors, without its queues.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.timing import Block, Peer, Side, Times, conditions, finish, take_turns
from robopolicy.bench.latency import measure, observations, stages
from robopolicy.bench.machine import machine
from robopolicy.bench.samples import summarize
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.export import export
from robopolicy.deploy.exported import ExportedPolicy
from robopolicy.deploy.manifest import Backend
from robopolicy.errors import RobopolicyError
from robopolicy.evaluate.commands import override_steps
from robopolicy.features import Feature
from robopolicy.policy import Policy, PolicyConfig, load_policy

FEATURES = {"agent_pos": Feature("agent_pos", (2,)), "keypoints": Feature("keypoints", (18,))}
UNET = {"type": "unet1d", "preset": "small", "activation": "mish"}
LEROBOT = {"verb": "act", "state": 2, "environment": 18, "action": 2, "down_dims": [32, 64, 128], "time_dim": 64}
NETS: dict[str, dict[str, Any]] = {"MLP": {"type": "mlp", "preset": "small"}, "U-Net": UNET}
EPS = {"path": {"type": "vp_cosine"}, "prediction": "eps"}  # what lerobot's policy is


def build(net: dict[str, Any], sampler: dict[str, Any], **changes: Any) -> Policy:
    """An untrained policy of Push-T's shape: two observations of 20, 16 actions of 2."""
    value = {"horizon": 16, "n_action_steps": 8, "net": net, "encoder": {"type": "state"}, "sampler": sampler, **changes}
    rng = np.random.default_rng(0)
    normalizers = {name: Normalizer.fit(rng.uniform(0, 512, (100, f.size))) for name, f in FEATURES.items()}
    normalizers["action"] = Normalizer.fit(rng.uniform(0, 512, (100, 2)))
    return Policy(parse(PolicyConfig, value), FEATURES, Feature("action", (2,), rate=10.0), normalizers).eval()


def block(policy: Policy | ExportedPolicy, calls: int) -> Block:
    """Times of so many calls, after a few to warm the caches that the others have emptied."""
    way, obs = stages(policy), observations(policy.observation_features, policy.n_obs_steps, 1)

    def run() -> Times:
        found = measure({"": (way, obs)}, calls, warmups=3)[""]
        return Times(found["whole"].tolist(), found["cpu"].tolist())

    return run


def exported(policy: Policy, backend: Backend, threads: int, scratch: Path) -> ExportedPolicy:
    folder = scratch / f"{len(list(scratch.iterdir()))}"
    return ExportedPolicy(export(policy, folder, backend).folder, threads)


def against_lerobot(peer: Peer | None, rounds: int, calls: int, trained: str | None, scratch: Path) -> dict[str, Any]:
    """One step of ours, in each runtime, and the same U-Net walked in 10 and 100 steps by both; one thread."""
    torch.set_num_threads(1)
    contestants: dict[str, Block] = {}
    if peer is not None:
        for name, request, count in (
            ("lerobot U-Net, DDPM 100", {**LEROBOT, "scheduler": "DDPM", "steps": 100}, 2),
            ("lerobot U-Net, DDIM 10", {**LEROBOT, "scheduler": "DDIM", "steps": 10}, 6),
        ):
            contestants[name] = lambda request=request, count=count: peer.times(**request, calls=count)  # type: ignore[misc]
    walked = build(UNET, {"type": "ddim", "num_steps": 10}, **EPS)
    contestants["U-Net, 10 steps, torch"] = block(walked, 10)
    contestants["U-Net, 10 steps, onnx"] = block(exported(walked, "onnx", 1, scratch), 20)
    parameters = {"U-Net": _count(walked)}
    one = {"U-Net": build(UNET, {"type": "euler", "num_steps": 1}), "MLP": build(NETS["MLP"], {"type": "euler", "num_steps": 1})}
    if trained is not None:
        one["MLP"] = load_policy(trained)
        override_steps(one["MLP"], 1)
    for name, policy in one.items():
        parameters[name] = _count(policy)
        contestants[f"{name}, 1 step, torch"] = block(policy, calls)
        for backend in get_args(Backend):
            contestants[f"{name}, 1 step, {backend}"] = block(exported(policy, backend, 1, scratch), calls)
    if peer is not None:
        parameters["lerobot"] = peer.ask(**LEROBOT, scheduler="DDIM", steps=10, calls=0)["parameters"]
    return {"parameters": parameters, "rows": table(take_turns(contestants, rounds), list(contestants)[:2] if peer else [])}


def grid(threads: int, rounds: int, calls: int, scratch: Path) -> dict[str, Any]:
    """Runtime by steps, for both networks."""
    torch.set_num_threads(threads)
    contestants: dict[str, Block] = {}
    for name, net in NETS.items():
        for steps in (1, 2, 4, 10):
            policy = build(net, {"type": "euler", "num_steps": steps})
            count = max(10, calls // steps)
            contestants[f"{name}, {steps} step(s), torch"] = block(policy, count)
            for backend in get_args(Backend):
                contestants[f"{name}, {steps} step(s), {backend}"] = block(exported(policy, backend, threads, scratch), count)
    return {"threads": threads, "rows": table(take_turns(contestants, rounds), [])}


def table(sides: dict[str, Side], references: list[str]) -> list[dict[str, Any]]:
    """A row per side: percentiles over all calls, and how many times faster than each reference, by round."""
    rows = []
    for side in sides.values():
        row: dict[str, Any] = {"name": side.name}
        for clock in ("wall", "cpu"):
            values = np.array([t for times in side.blocks for t in getattr(times, clock)])
            row[clock] = {k: v if k == "n" else 1e3 * v for k, v in summarize(values).to_json().items()}
        for reference in references:
            row[f"times {reference}"] = {clock: side.speedup(sides[reference], clock) for clock in ("wall", "cpu")}
        rows.append(row)
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n  {'ms':<36}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}{'CPU p50':>9}      n")
    for row in rows:
        wall = row["wall"]
        line = f"  {row['name']:<36}" + "".join(f"{wall[key]:9.3f}" for key in ("p50", "p95", "p99", "max"))
        line += f"{row['cpu']['p50']:9.3f} {wall['n']:6d}"
        for key, ratios in row.items():
            if key.startswith("times ") and not row["name"].startswith("lerobot"):
                median, low, high = ratios["cpu"]
                line += f"   {key.removeprefix('times ')} x{median:.1f} [{low:.1f}, {high:.1f}]"
        print(line, flush=True)


def _count(policy: Policy) -> int:
    return sum(p.numel() for p in policy.net.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that has lerobot 0.4.4 (see benchmarks/README.md)")
    parser.add_argument("--mlp", metavar="CKPT", help="a trained policy to take for the MLP, instead of one of the same shape")
    parser.add_argument("--rounds", type=int, default=8, help="blocks of each side, after one that warms up")
    parser.add_argument("--calls", type=int, default=150, help="calls of a one-step policy per block")
    parser.add_argument(
        "--grid", type=int, nargs="*", default=[], metavar="THREADS", help="also runtime by steps, on so many threads"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"started": conditions() | machine()}
    try:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            peer = stack.enter_context(Peer(arguments.peer_python)) if arguments.peer_python else None
            document["peer"] = peer.versions if peer else None
            result = against_lerobot(peer, arguments.rounds, arguments.calls, arguments.mlp, scratch)
            document["against_lerobot"] = result
            print("parameters", result["parameters"])
            show("one thread, batch 1; times lerobot in CPU time, median [min, max] over rounds", result["rows"])
            document["grid"] = []
            for threads in arguments.grid:
                document["grid"].append(grid(threads, max(2, arguments.rounds // 2), arguments.calls, scratch))
                show(f"{threads} thread(s), batch 1", document["grid"][-1]["rows"])
    except RobopolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish(document, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
