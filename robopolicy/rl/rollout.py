"""Collecting: the exploring policy acts in all environments at once, and what came of it becomes a batch to learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robopolicy.nets.values import ValueNet
from robopolicy.policy import Policy
from robopolicy.rl.envs import ChunkEnv, Ended
from robopolicy.rl.gae import RewardScale, gae
from robopolicy.rl.heads.base import Head, Record
from robopolicy.rl.ppo import Batch


class Collected(NamedTuple):
    batch: Batch
    ended: list[Ended]  # the episodes that ended meanwhile
    env_steps: int  # control steps that were executed


@torch.no_grad()
def collect(
    env: ChunkEnv,
    obs: dict[str, np.ndarray],
    head: Head,
    value: ValueNet,
    *,
    num_chunks: int,
    gae_lambda: float,
    scale: RewardScale | None,
    base: Policy | None,
    generator: torch.Generator,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Collected, dict[str, np.ndarray]] | None:
    """Act for ``num_chunks`` chunks in each of N environments.

    Args:
        env: The environments. obs: Their present windows ``name -> [N, n_obs_steps, *shape]``.
        head: Acts. value: Judges. num_chunks: S, chunks per environment.
        gae_lambda: Of the advantages.
        scale: Scales rewards; None leaves them.
        base: When given, what it would do in the same places is recorded as ``bc_chunk``.
        generator: Source of all noise.
        stop: Asked between chunks; the roll-out is given up when it says True.

    Returns:
        The roll-out and the next windows; None when it was given up.
    """
    policy = head.policy
    contexts: list[Tensor] = []
    records: list[Record] = []
    rows: list[tuple[np.ndarray, ...]] = []
    ended: list[Ended] = []
    steps = 0
    observed = policy.observe(obs)
    ctx = policy.encode(observed)
    worth = value(ctx)
    for _ in range(num_chunks):
        if stop():
            return None
        acted = head.act(ctx, generator)
        record = acted.record
        if base is not None:
            record = {**record, "bc_chunk": base.sample(ctx, generator)}
        transition = env.step(policy.decode(acted.chunk, observed))
        observed = policy.observe(transition.obs)
        next_ctx = policy.encode(observed)
        next_worth = value(next_ctx)
        cut = transition.terminated | transition.truncated
        led_to = next_worth.cpu().numpy()
        over = transition.terminated if env.config.bootstrap else cut
        if (transition.truncated & ~over).any():
            led_to = np.where(cut, value(policy.encode(policy.observe(transition.final_obs))).cpu().numpy(), led_to)
        reward = transition.reward
        if scale is not None:
            reward = scale(reward, transition.discount, cut)
        contexts.append(ctx)
        records.append(record)
        rows.append((reward, worth.cpu().numpy(), led_to, transition.discount, over, transition.truncated))
        ended += transition.ended
        steps += int(transition.executed.sum())
        ctx, worth = next_ctx, next_worth
    rewards, values, next_values, discounts, terminated, truncated = (np.stack(column) for column in zip(*rows, strict=True))
    advantage = gae(
        rewards, values.astype(np.float64), next_values.astype(np.float64), discounts, terminated, truncated, gae_lambda
    )
    flat_ctx = torch.cat(contexts)
    merged = {name: torch.cat([record[name] for record in records]) for name in records[0]}
    flat_advantage = torch.from_numpy(advantage.reshape(-1)).float().to(flat_ctx.device)
    batch = Batch(
        flat_ctx,
        prepared(head, flat_ctx, merged, generator),
        flat_advantage,
        flat_advantage + torch.from_numpy(values.reshape(-1)).to(flat_ctx.device),
    )
    return Collected(batch, ended, steps), transition.obs


@torch.no_grad()
def prepared(head: Head, ctx: Tensor, record: Record, generator: torch.Generator, slice_size: int = 2048) -> Record:
    """The record with what the old policy says of it, computed in slices."""
    parts = [
        head.prepare(ctx[i : i + slice_size], {name: values[i : i + slice_size] for name, values in record.items()}, generator)
        for i in range(0, len(ctx), slice_size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
