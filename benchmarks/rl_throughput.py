"""Where the time of on-policy fine-tuning goes: the bare environment, collecting with a policy, and whole iterations.

The same number of chunks is stepped in three ways that take turns: with actions made beforehand (the floor: what the simulator
costs, resets included), by :func:`robopolicy.rl.rollout.collect` (adds inference, values and book-keeping), and collected and
learned from (adds the updates). Rates are control steps per second of wall time, so run it on a quiet machine; ratios are of
neighbouring blocks. The policy is untrained: its cost does not depend on its weights.

    python -m benchmarks.rl_throughput
    python -m benchmarks.rl_throughput --tasks sparse_reach lift --workers 0 --json outputs/rl_throughput.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import conditions, finish
from robopolicy.config import component, parse
from robopolicy.errors import TaskError
from robopolicy.nets.values import ValueNet
from robopolicy.policy import PolicyConfig
from robopolicy.rl.base import untrained
from robopolicy.rl.envs import ChunkEnv, RewardConfig
from robopolicy.rl.gae import RewardScale
from robopolicy.rl.heads.registry import HEADS
from robopolicy.rl.ppo import PPO, PPOConfig
from robopolicy.rl.rollout import collect
from robopolicy.task import TaskSpec

# Task -> environments and chunks per block: a few seconds each on one core.
SIZES = {"sparse_reach": (32, 36), "lift": (32, 24), "robosuite_lift": (8, 16)}
POLICY = {
    "n_obs_steps": 1,
    "horizon": 4,
    "n_action_steps": 4,
    "net": {"type": "mlp", "width": 128, "depth": 3, "expansion": 1, "time_dim": 32},
    "encoder": {"type": "state"},
    "default_normalize": "meanstd",
}


class Setup:
    """A task with everything that an iteration needs."""

    def __init__(self, task: str, method: str, num_workers: int) -> None:
        spec = TaskSpec(task)
        policy = untrained(parse(PolicyConfig, POLICY), spec, seed=0)
        cls, config = component("method", method, HEADS)
        self.head = cls(config, policy)
        self.value = ValueNet(ValueNet.Config(), policy.encoder.ctx_dim)
        self.ppo = PPO(parse(PPOConfig, {"value_only_iterations": 0}), self.head, self.value)
        num_envs, self.num_chunks = SIZES.get(task, (16, 16))
        self.env = ChunkEnv(
            spec, policy, num_envs=num_envs, num_workers=num_workers, seed=0, reward=parse(RewardConfig, {"source": "success"})
        )
        self.scale = RewardScale(num_envs)
        self.obs = self.env.reset()
        self.generator = torch.Generator().manual_seed(0)
        # What the policy would do: random actions may end episodes sooner, or bring the arm where physics is slower.
        self.actions: list[np.ndarray] = []

    def bare(self) -> int:
        return sum(int(self.env.step(action).executed.sum()) for action in self.actions)

    def collecting(self) -> int:
        return self._collect()[1]

    def iteration(self) -> int:
        batch, steps = self._collect()
        self.ppo.update(batch, 0, self.generator)
        return steps

    def _collect(self) -> tuple[Any, int]:
        done = collect(
            self.env,
            self.obs,
            self.head,
            self.value,
            num_chunks=self.num_chunks,
            gae_lambda=0.95,
            scale=self.scale,
            base=None,
            generator=self.generator,
        )
        assert done is not None
        collected, self.obs = done
        return collected.batch, collected.env_steps

    def record_actions(self) -> None:
        policy = self.head.policy
        with torch.no_grad():
            for _ in range(self.num_chunks):
                observed = policy.observe(self.obs)
                action = policy.decode(self.head.act(policy.encode(observed), self.generator).chunk, observed)
                self.actions.append(action)
                self.obs = self.env.step(action).obs


def run(task: str, method: str, num_workers: int, rounds: int) -> dict[str, Any]:
    """Steps per second of each way, and their ratios, as medians over ``rounds`` with least and greatest."""
    setup = Setup(task, method, num_workers)
    rates: dict[str, list[float]] = {"bare": [], "collecting": [], "iteration": []}
    with setup.env:
        setup.record_actions()
        for turn in range(rounds + 1):
            for name in rates:
                started = time.perf_counter()
                steps = getattr(setup, name)()
                if turn:  # the first round warms up
                    rates[name].append(steps / (time.perf_counter() - started))
    row: dict[str, Any] = {"task": task, "method": method, "workers": num_workers}
    row |= {f"{name}_steps_per_s": statistics.median(values) for name, values in rates.items()}
    for name in ("collecting", "iteration"):
        ratios = [a / b for a, b in zip(rates[name], rates["bare"], strict=True)]
        row[f"{name}_share"] = [statistics.median(ratios), min(ratios), max(ratios)]
    seconds = {name: 1 / row[f"{name}_steps_per_s"] for name in rates}
    row["time"] = {
        "environment": seconds["bare"] / seconds["iteration"],
        "inference": (seconds["collecting"] - seconds["bare"]) / seconds["iteration"],
        "update": (seconds["iteration"] - seconds["collecting"]) / seconds["iteration"],
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(SIZES))
    parser.add_argument("--method", default="dppo")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {"started": conditions(), "rows": rows}
    print(
        f"{'task':16} {'workers':>7} {'bare/s':>8} {'collecting/s':>13} {'of bare':>18} {'iteration/s':>12}   env, infer, update"
    )
    for task in args.tasks:
        for workers in args.workers:
            try:
                row = run(task, args.method, workers, args.rounds)
            except TaskError as error:
                print(f"{task}: skipped, {error}")
                break
            rows.append(row)
            share, low, high = row["collecting_share"]
            split = ", ".join(f"{100 * value:.0f} %" for value in row["time"].values())
            print(
                f"{task:16} {workers:7} {row['bare_steps_per_s']:8.0f} {row['collecting_steps_per_s']:13.0f} "
                f"{share:6.2f} [{low:.2f}, {high:.2f}] {row['iteration_steps_per_s']:12.0f}   {split}"
            )
    finish(document, args.json)


if __name__ == "__main__":
    main()
