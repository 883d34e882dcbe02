"""Are modes kept? Students of an exact teacher of eight narrow modes on a circle, by every method, with one small network.

The teacher is the formula of the density itself, walked in 20 Euler steps. Printed: share of points that are not within 2.5 std
of a mode, least and greatest share of points at one mode (an eighth would be even), energy distance to the teacher's points.

    python -m benchmarks.ring --steps 3000
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from robopolicy.config import component, parse
from robopolicy.data.normalize import Normalizer
from robopolicy.distill.diagnose import energy_distance, mode_shares
from robopolicy.distill.methods.base import Method, Models, Samples
from robopolicy.distill.methods.registry import METHODS
from robopolicy.distill.teacher import Teacher
from robopolicy.distill.trainer import from_noise
from robopolicy.features import Feature
from robopolicy.generative.path import broadcast_time
from robopolicy.policy import Policy, PolicyConfig
from robopolicy.train.ema import EMAConfig, averaged

STD = 0.12
ANGLES = torch.arange(8) * math.pi / 4
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
OBSERVATIONS, ACTION = {"x": Feature("x", (1,))}, Feature("action", (2,))


class Ring(Policy):
    """The velocity of the noisy ring, exactly."""

    def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
        time = broadcast_time(t / 100, x)
        alpha, variance = 1 - time, ((1 - time) * STD) ** 2 + time**2
        away = x - alpha * CENTRES  # [B, 1, 2] against [8, 2]
        share = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        x0 = (share * (CENTRES + alpha * STD**2 / variance * away)).sum(1, keepdim=True)
        return (x - x0) / time.clamp_min(1e-6)


def policy(cls: type[Policy] = Policy, **changes: object) -> Policy:
    value = {
        "n_obs_steps": 1,
        "horizon": 1,
        "n_action_steps": 1,
        "net": {"type": "mlp", "width": 128, "depth": 3, "expansion": 1, "time_dim": 32},
        "encoder": {"type": "state"},
        "default_normalize": "identity",
        **changes,
    }
    torch.manual_seed(0)
    normalizers = {"x": Normalizer(1, "identity"), "action": Normalizer(2, "identity")}
    return cls(parse(PolicyConfig, value), OBSERVATIONS, ACTION, normalizers)


def learn(rule: Method, teacher: Teacher, noise: Tensor, clean: Tensor, steps: int) -> Policy:
    """A student's averaged weights after ``steps`` of batch 256."""
    student, generator = policy(**rule.policy()), torch.Generator().manual_seed(0)
    average = averaged(student, EMAConfig(max_decay=0.999)).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mean = average.module
    assert isinstance(mean, Policy)
    models = Models(student, mean, teacher)
    for _ in range(steps):
        rows = torch.randint(len(noise), (256,), generator=generator)
        loss = rule.loss(Samples({"x": torch.zeros(256, 1, 1)}, noise[rows], clean[rows], None), models, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(student)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    ring = policy(Ring, sampler={"type": "euler", "num_steps": 20})
    teacher, fresh = Teacher(ring), torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(args.pairs, 1, 2, generator=torch.Generator().manual_seed(0))
    clean, ctx = teacher.sample(torch.zeros(len(noise), 1), noise), torch.zeros(len(fresh), 1)
    reference = teacher.sample(ctx, fresh)[:, 0]
    print(f"{'':16} {'calls':>5} {'off modes':>10} {'least':>7} {'greatest':>9} {'energy':>8} {'CPU s':>6}")

    def row(name: str, calls: int, points: Tensor, seconds: float) -> None:
        shares, off = mode_shares(points, CENTRES, 2.5 * STD)
        energy = float(energy_distance(reference, points))
        least, most = float(shares.min()), float(shares.max())
        print(f"{name:16} {calls:5} {off:10.3f} {least:7.3f} {most:9.3f} {energy:8.4f} {seconds:6.0f}", flush=True)

    for steps in (20, 10, 4, 2, 1):
        points = Teacher(ring, {"type": "euler", "num_steps": steps}).sample(ctx, fresh)[:, 0]
        row("teacher", steps, points, 0)
    for name in args.methods:
        cls, config = component("method", {"type": name}, METHODS)
        started = time.process_time()
        student = learn(cls(config), teacher, noise, clean, args.steps)
        seconds = time.process_time() - started
        with torch.no_grad():
            points = from_noise(student, ctx, fresh, torch.Generator().manual_seed(2))[:, 0]
        row(name, student.sampler.nfe(student.path), points, seconds)


if __name__ == "__main__":
    main()
