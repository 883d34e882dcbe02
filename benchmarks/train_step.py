"""Seconds per training step of the 65.8 M U-Net against lerobot's DiffusionPolicy of the same size, what each measure gives, and
where the floor is.

Random data shaped like Push-T on keypoints: 2 observations of 20 numbers, 16 actions of 2. A step is noise, forward, backward,
gradient clipping and optimiser, and, on our side unless a row says otherwise, the average of the weights; lerobot keeps none.
Sides take turns within one run. The clock of the speedups is CPU time on one thread (it repeats on a busy machine) and wall time
on more.

    python -m benchmarks.train_step --peer-python ~/lerobot/bin/python
    python -m benchmarks.train_step --threads 1 2 --rounds 5 --json outputs/train_step.json
    python -m benchmarks.train_step --precision-rule     # bf16 against fp32 for every size of network
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Block, Peer, Times, conditions, finish, measure, print_rows, rows, take_turns
from robopolicy.errors import RobopolicyError
from robopolicy.generative.losses import LossConfig, denoising_loss
from robopolicy.generative.path import VPCosine
from robopolicy.nets.dit import DiT
from robopolicy.nets.mlp import MLP
from robopolicy.nets.unet1d import UNet1d
from robopolicy.train.bc import clip_gradients
from robopolicy.train.ema import EMAConfig, averaged

CONTEXT, ACTION, HORIZON = 40, 2, 16


class Batch(NamedTuple):
    """Actions ``[B, H, A]``, context ``[B, C]`` and the mask of padded rows ``[B, H]``."""

    action: Tensor
    ctx: Tensor
    is_pad: Tensor


class Variant(NamedTuple):
    """A step with some of the measures."""

    name: str
    bf16: bool = False
    activation: Literal["mish", "silu"] = "mish"
    fused: bool = True
    ema: bool = True
    compiled: bool = False


# The first is lerobot's step on our network: what remains is memory layout and matrix products instead of convolutions.
ABLATION = (
    Variant("fp32, peer's optimiser, no EMA (layout alone)", fused=False, ema=False),
    Variant("fp32, fused AdamW, no EMA", ema=False),
    Variant("fp32, fused AdamW, EMA: `precision: fp32`"),
    Variant("fp32, SiLU for Mish", activation="silu"),
    Variant("bf16, no EMA", bf16=True, ema=False),
    Variant("bf16, EMA: the default with AMX", bf16=True),
    Variant("bf16, SiLU for Mish", bf16=True, activation="silu"),
)


class Ours:
    """Our network with everything that the variants need; the weights are shared, so that all fit into memory."""

    def __init__(self, batch: Batch) -> None:
        net = UNet1d(UNet1d.Config.model_validate({"preset": "published"}), action_dim=ACTION, horizon=HORIZON, ctx_dim=CONTEXT)
        config = UNet1d.Config.model_validate({"preset": "published", "activation": "silu"})
        with torch.device("meta"):
            silu = UNet1d(config, action_dim=ACTION, horizon=HORIZON, ctx_dim=CONTEXT)
        silu.load_state_dict(net.state_dict(keep_vars=True), assign=True)
        self.nets: dict[str, nn.Module] = {"mish": net, "silu": silu}
        self.parameters = list(net.parameters())
        betas, decay = (0.95, 0.999), 1e-6
        self.fused = torch.optim.AdamW(self.parameters, lr=1e-4, betas=betas, weight_decay=decay, fused=True)
        self.peers = torch.optim.Adam(self.parameters, lr=1e-4, betas=betas, weight_decay=decay)
        self.ema = averaged(net, EMAConfig())
        self.path, self.loss, self.batch = VPCosine(), LossConfig(), batch
        self.generator = torch.Generator().manual_seed(0)
        self.phases: dict[str, list[list[float]]] = {}

    def step(self, variant: Variant) -> None:
        """One step; keeps the CPU seconds of its phases."""
        marks = [time.process_time()]
        optimizer = self.fused if variant.fused else self.peers
        loss_function: Callable[..., Tensor] = torch.compile(denoising_loss) if variant.compiled else denoising_loss
        net = self.nets[variant.activation]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=variant.bf16):
            b = self.batch
            loss = loss_function(net, self.path, "eps", b.action, b.ctx, b.is_pad, self.generator, self.loss)
        marks.append(time.process_time())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        marks.append(time.process_time())
        clip_gradients(self.parameters, 1.0)
        marks.append(time.process_time())
        optimizer.step()
        marks.append(time.process_time())
        if variant.ema:
            self.ema.update_parameters(self.nets["mish"])
        marks.append(time.process_time())
        self.phases.setdefault(variant.name, []).append([b - a for a, b in itertools.pairwise(marks)])

    def flops(self) -> float:
        """Of the matrix products and convolutions of one forward and backward pass, multiplications by padding included."""
        with FlopCounterMode(display=False) as counter:
            self.step(Variant("count"))
        return float(counter.get_total_flops())


def floor(flops: float, parameters: int, clock: str, repeats: int = 7) -> dict[str, Any]:
    """Least seconds of a step: its products at the rate of the largest layer's, its passes over the weights at that of a lerp.

    Bytes per weight: AdamW reads weight, gradient and two moments and writes three of them (28), the average 12, the norm of the
    gradient 4; bf16 copies of the weights and back from bf16 gradients, 6 each.
    """
    result: dict[str, Any] = {"gflop": flops / 1e9}
    large = torch.zeros(2**26)  # larger than the caches of one core; 256 MiB as the weights
    other = torch.ones(2**26)
    seconds = statistics.median(getattr(measure(lambda: large.lerp_(other, 0.1), repeats), clock))
    bandwidth = 3 * large.nbytes / seconds  # two reads to a write, about as the optimiser
    result["memory_gb_per_s"] = bandwidth / 1e9
    for name, dtype, per_weight in (("fp32", torch.float32, 44), ("bf16", torch.bfloat16, 56)):
        x, w, g = (torch.randn(shape, dtype=torch.float32).to(dtype) for shape in ((256, 5120), (1024, 5120), (256, 1024)))
        times = measure(lambda x=x, w=w, g=g: (x @ w.t(), g @ w, g.t() @ x), repeats)  # type: ignore[misc]
        rate = 3 * 2 * 256 * 5120 * 1024 / min(getattr(times, clock))
        result[name] = {
            "gemm_gflop_per_s": rate / 1e9,
            "products_s": flops / rate,
            "memory_s": per_weight * parameters / bandwidth,
            "total_s": flops / rate + per_weight * parameters / bandwidth,
        }
    return result


def compare(threads: int, rounds: int, steps: int, batch_size: int, peer: Peer | None, compiled: bool) -> dict[str, Any]:
    """All variants and the peer, taking turns."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    data = {
        "observation.state": rng.normal(size=(batch_size, 2, 2)).astype(np.float32),
        "observation.environment_state": rng.normal(size=(batch_size, 2, 18)).astype(np.float32),
        "action": rng.uniform(-1, 1, size=(batch_size, HORIZON, ACTION)).astype(np.float32),
        "action_is_pad": np.zeros((batch_size, HORIZON), bool),
    }
    observations = [data["observation.state"], data["observation.environment_state"]]
    ctx = torch.from_numpy(np.concatenate([o.reshape(batch_size, -1) for o in observations], axis=1))
    ours = Ours(Batch(torch.from_numpy(data["action"]), ctx, torch.from_numpy(data["action_is_pad"])))
    contestants: dict[str, Block] = {}
    with tempfile.TemporaryDirectory() as folder:
        if peer is not None:
            np.savez(Path(folder) / "batch.npz", allow_pickle=False, **data)
            request = {"verb": "train", "batch": f"{folder}/batch.npz", "threads": threads, "steps": steps}
            contestants["lerobot, fp32"] = lambda: peer.times(**request, bf16=False)
            contestants["lerobot, bf16 autocast"] = lambda: peer.times(**request, bf16=True)
        variants = [*ABLATION, Variant("bf16, EMA, torch.compile", bf16=True, compiled=True)] if compiled else ABLATION
        for variant in variants:
            contestants[variant.name] = _block(ours, variant, steps)
        sides = take_turns(contestants, rounds)
        theirs = None if peer is None else peer.ask(**{**request, "steps": 0}, bf16=False)["parameters"]
    clock = "cpu" if threads == 1 else "wall"
    table = rows(sides, None if peer is None else "lerobot, fp32", clock)
    names = ("forward", "backward", "clip", "optimiser", "ema")
    for row in table:
        if row["name"] in ours.phases:
            phases = np.median(np.array(ours.phases[row["name"]][steps:]), axis=0)
            row["cpu_s_of_phases"] = dict(zip(names, np.round(phases, 4).tolist(), strict=True))
    count = sum(p.numel() for p in ours.parameters)
    result = {"threads": threads, "batch": batch_size, "parameters": {"ours": count, "lerobot": theirs}, "clock": clock}
    return {**result, "rows": table, "floor": floor(ours.flops(), count, clock)}


def _block(ours: Ours, variant: Variant, steps: int) -> Block:
    def block() -> Times:
        return measure(lambda: ours.step(variant), steps)

    return block


def precision_rule(rounds: int) -> list[dict[str, Any]]:
    """bf16 autocast against fp32 on one thread, forward, backward and AdamW, for networks and batches of all sizes."""
    torch.set_num_threads(1)
    table = []
    cases: tuple[tuple[Any, str, int], ...] = (
        (MLP, "tiny", 256),
        (MLP, "base", 256),
        (MLP, "base", 512),
        (MLP, "large", 256),
        (DiT, "tiny", 256),
        (DiT, "base", 128),
        (UNet1d, "tiny", 256),
        (UNet1d, "base", 128),
    )
    for net_class, preset, size in cases:
        config = net_class.Config.model_validate({"preset": preset})
        net: nn.Module = net_class(config, action_dim=ACTION, horizon=HORIZON, ctx_dim=CONTEXT)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        inputs = torch.randn(size, HORIZON, ACTION), torch.rand(size), torch.randn(size, CONTEXT)

        def block(bf16: bool, net: nn.Module = net, optimizer: Any = optimizer, inputs: Any = inputs) -> Times:
            def step() -> None:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    loss = net(*inputs).float().square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

            return measure(step, 3)

        sides = take_turns({"fp32": lambda b=block: b(False), "bf16": lambda b=block: b(True)}, rounds)  # type: ignore[misc]
        compared = rows(sides, "fp32", "cpu")
        count = sum(p.numel() for p in net.parameters())
        print_rows(f"{net_class.__name__} {preset}, {count / 1e6:.2f} M, batch {size}", compared, "steps")
        table.append({"net": net_class.__name__, "preset": preset, "parameters": count, "batch": size, "rows": compared})
    return table


def report(result: dict[str, Any]) -> None:
    title = f"{result['threads']} thread(s), batch {result['batch']}; speedups in {result['clock']} time [min, max over rounds]"
    print_rows(title, result["rows"], "steps")
    for row in result["rows"]:
        if "cpu_s_of_phases" in row:
            print(f"    {row['name']:<46}", " ".join(f"{k} {v:.3f}" for k, v in row["cpu_s_of_phases"].items()))
    limit = result["floor"]
    print(f"  floor: {limit['gflop']:.0f} GFLOP, memory {limit['memory_gb_per_s']:.1f} GB/s")
    for name in ("fp32", "bf16"):
        part = limit[name]
        print(
            f"    {name}: {part['gemm_gflop_per_s']:.0f} GFLOP/s -> products {part['products_s']:.3f} s + memory "
            f"{part['memory_s']:.3f} s = {part['total_s']:.3f} s"
        )


def main() -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that has lerobot 0.4.4 (see benchmarks/README.md)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each side, after one that warms up")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes; needs a C++ compiler)")
    parser.add_argument("--precision-rule", action="store_true", help="bf16 against fp32 over sizes of networks instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"started": conditions()}
    try:
        with contextlib.ExitStack() as stack:
            if arguments.precision_rule:
                document["precision"] = precision_rule(arguments.rounds)
            else:
                path = arguments.peer_python
                peer = stack.enter_context(Peer(path)) if path else None
                document["peer"] = peer.versions if peer else None
                document["results"] = []
                for threads in arguments.threads:
                    result = compare(threads, arguments.rounds, arguments.steps, arguments.batch, peer, arguments.compile)
                    report(result)
                    document["results"].append(result)
    except RobopolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish(document, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
