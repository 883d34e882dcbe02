"""The on-policy core: a clipped surrogate over minibatches of chunks, for any :class:`robopolicy.rl.heads.base.Head`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from robopolicy.config import Config
from robopolicy.errors import RobopolicyError
from robopolicy.nets.values import ValueNet
from robopolicy.rl.heads.base import Head, Record

# Float32 log-probabilities of equal weights differ between batches of different sizes: summed over many entries by 1e-4 and more.
# What is a small part of the clip range cannot matter.
RATIO_TOLERANCE = 0.05  # of the clip range

Surrogate = Literal["ppo", "aspo"]


class BCConfig(Config):
    """Imitation beside reinforcement.

    Attributes:
        weight: Of the loss; 0: none.
        source: ``base``: chunks that the base itself takes where the policy goes, sampled while acting. ``demonstrations``: those
            that the checkpoint was trained on, which must be where its run's ``config.yaml`` says.
    """

    weight: float = pydantic.Field(default=0.0, ge=0)
    source: Literal["base", "demonstrations"] = "base"


class PPOConfig(Config):
    """Attributes:
    epochs: Passes over a roll-out. minibatch_size: Chunks per update; all R terms of a chunk stay together.
    lr, weight_decay, max_grad_norm: Of the policy. value_lr, value_weight_decay: Of the value network.
    warmup_iterations: Over which both learning rates rise linearly. value_only_iterations: At the start, only values learn.
    gae_lambda: Of the advantages. normalize_advantages: To zero mean and unit std in each minibatch.
    surrogate: ``ppo``; ``aspo`` replaces the clip of negative advantages by a quadratic pull (FPO++, arXiv 2602.02481).
    target_kl: An iteration's updates stop beyond this mean of ``(ratio - 1) - log ratio``; null: never.
    desired_kl: Adapts the learning rate to reach it, by 1.5 up or down after each minibatch; null: fixed.
    entropy_weight: Bonus for methods that learn how much to explore. kl_weight: Of the divergence from the base.
    bc: Imitation beside it.
    """

    epochs: int = pydantic.Field(default=5, ge=1)
    minibatch_size: int = pydantic.Field(default=512, ge=1)
    lr: float = pydantic.Field(default=3e-4, gt=0)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    value_lr: float = pydantic.Field(default=1e-3, gt=0)
    value_weight_decay: float = pydantic.Field(default=0.0, ge=0)
    warmup_iterations: int = pydantic.Field(default=0, ge=0)
    value_only_iterations: int = pydantic.Field(default=2, ge=0)
    gae_lambda: float = pydantic.Field(default=0.95, ge=0, le=1)
    normalize_advantages: bool = True
    surrogate: Surrogate = "ppo"
    target_kl: float | None = pydantic.Field(default=1.0, gt=0)
    desired_kl: float | None = pydantic.Field(default=None, gt=0)
    entropy_weight: float = pydantic.Field(default=0.0, ge=0)
    kl_weight: float = pydantic.Field(default=0.0, ge=0)
    bc: BCConfig = BCConfig()


class Batch(NamedTuple):
    """A roll-out of N chunks, flattened over time and environments."""

    ctx: Tensor  # [N, C]
    record: Record  # name -> [N, ...]: the head's; `bc_chunk [N, H, A]` is what the base would do, when imitation wants it
    advantage: Tensor  # [N]
    returns: Tensor  # [N]: what values should be


class Demonstrated(NamedTuple):
    """Windows of demonstrations, to imitate."""

    ctx: Tensor  # [N, C]
    chunk: Tensor  # [N, H, A] normalised
    is_pad: Tensor  # [N, H] beyond the end of the episode


def surrogate(ratio: Tensor, advantage: Tensor, clips: Tensor, kind: Surrogate) -> Tensor:
    """The objective ``[M, R]``, to be maximised, of ratios ``[M, R]`` under advantages that broadcast to them.

    ``ppo``: ``min(r A, clip(r, 1 - e, 1 + e) A)``. ``aspo``: the same for ``A >= 0``, and ``r A - |A| / (2 e) (r - 1)^2`` for
    ``A < 0``, which at ``r = 1 - e`` is flat and beyond it pulls back.
    """
    clipped = torch.minimum(ratio * advantage, ratio.clamp(1 - clips, 1 + clips) * advantage)
    if kind == "ppo":
        return clipped
    return torch.where(advantage < 0, ratio * advantage - advantage.abs() / (2 * clips) * (ratio - 1) ** 2, clipped)


class PPO:
    """Head, value network and their optimisers.

    Args:
        config: Of the core.
        head: The method; its parameters that require gradients are learned.
        value: The value network, on the same contexts.
        demonstrations: Draws as many demonstrated windows as asked for; needed when imitation is of those.
    """

    def __init__(
        self,
        config: PPOConfig,
        head: Head,
        value: ValueNet,
        demonstrations: Callable[[int, torch.Generator], Demonstrated] | None = None,
    ) -> None:
        self.config, self.head, self.value, self.demonstrations = config, head, value, demonstrations
        self.parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.value_optimizer = torch.optim.AdamW(
            value.parameters(), lr=config.value_lr, weight_decay=config.value_weight_decay, fused=True
        )
        self.lr = config.lr  # adapted when there is a desired KL

    def update(self, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, float]:
        """Learn from one roll-out. Returns diagnostics.

        Raises:
            RobopolicyError: The ratio is not 1 before the first update (then the policy that is scored is not the one that
                acted), or a loss is not finite.
        """
        config, seen = self.config, _Means()
        warm = min(1.0, (iteration + 1) / (config.warmup_iterations + 1))
        _set_lr(self.value_optimizer, config.value_lr * warm)
        with torch.no_grad():
            before = self.value(batch.ctx)
        policy_learns = iteration >= config.value_only_iterations
        minibatches = 0
        for drawn in self._minibatches(len(batch.ctx), generator):
            indices = drawn.to(batch.ctx.device)
            ctx, returns = batch.ctx[indices], batch.returns[indices]
            seen.add("loss/value", self._step_value(ctx, returns))
            if not policy_learns:
                continue
            record = {name: values[indices] for name, values in batch.record.items()}
            _set_lr(self.optimizer, self.lr * warm)
            kl = self._step_policy(ctx, record, batch.advantage[indices], generator, seen, first=minibatches == 0)
            minibatches += 1
            if config.desired_kl is not None and minibatches > 1:  # before the first update the KL is rounding
                self.lr = min(1e-2, self.lr * 1.5) if 0 < kl < config.desired_kl / 2 else self.lr
                self.lr = max(1e-6, self.lr / 1.5) if kl > 2 * config.desired_kl else self.lr
            if config.target_kl is not None and kl > config.target_kl:
                break
        residual = (batch.returns - before).var() / batch.returns.var().clamp_min(1e-12)
        return {
            **seen.means(),
            "value/explained_variance": 1 - float(residual),
            "train/minibatches": float(minibatches),
            "train/lr": self.lr * warm if policy_learns else 0.0,
            "train/advantage_std": float(batch.advantage.std()),
        }

    def _minibatches(self, num: int, generator: torch.Generator) -> Iterator[Tensor]:
        size = min(self.config.minibatch_size, num)
        for _ in range(self.config.epochs):
            order = torch.randperm(num, generator=generator)
            # Equal parts: a last short minibatch would count for more than its share.
            yield from torch.tensor_split(order, max(1, round(num / size)))

    def _step_value(self, ctx: Tensor, returns: Tensor) -> float:
        loss = 0.5 * (self.value(ctx) - returns).square().mean()
        self.value_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.value.parameters(), 10.0)
        self.value_optimizer.step()
        return float(loss.detach())

    def _step_policy(
        self, ctx: Tensor, record: Record, advantage: Tensor, generator: torch.Generator, seen: _Means, first: bool
    ) -> float:
        config, head = self.config, self.head
        if config.normalize_advantages and len(advantage) > 1:  # one alone has no std
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        log_ratio = head.log_ratio(ctx, record)
        clips, weights = head.clips.to(ctx.device), head.weights.to(ctx.device)
        off = float((log_ratio.detach().abs() / clips).max())
        if first and off > RATIO_TOLERANCE:
            raise RobopolicyError(
                f"before an iteration's first update the log-ratio of new to old policy is {off:.2g} clip ranges, not 0: the "
                f"policy that is scored is not the one that acted, a defect of method {type(head).__name__} or of its network"
            )
        ratio = log_ratio.exp()
        weighted = surrogate(ratio, advantage[:, None], clips, config.surrogate) * weights
        loss = -weighted.sum(1).mean()
        seen.add("loss/policy", float(loss.detach()))
        if config.entropy_weight and (entropy := head.entropy(ctx, record)) is not None:
            loss = loss - config.entropy_weight * entropy
        if (penalty := head.penalty(ctx, record)) is not None:
            loss = loss + penalty
        if config.kl_weight:
            loss = loss + config.kl_weight * head.divergence(ctx, record)
        if config.bc.weight:
            bc = self._imitate(ctx, record, generator)
            seen.add("loss/bc", float(bc.detach()))
            loss = loss + config.bc.weight * bc
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise RobopolicyError(
                f"fine-tuning diverged: loss {float(loss.detach())}, gradient norm {float(norm)}; lower ppo.lr or the clip. "
                "Checkpoints are intact"
            )
        self.optimizer.step()
        with torch.no_grad():
            kl = float(((ratio - 1) - log_ratio).mean())
            seen.add("ratio/mean", float(ratio.mean()))
            seen.largest("ratio/max", float(ratio.max()))
            seen.add("ratio/kl", kl)
            seen.add("ratio/clip_fraction", float(((ratio - 1).abs() > clips).float().mean()))
            seen.add("train/grad_norm", float(norm))
        return kl

    def _imitate(self, ctx: Tensor, record: Record, generator: torch.Generator) -> Tensor:
        if self.config.bc.source == "base":
            return self.head.bc_loss(ctx, record["bc_chunk"], None, generator)
        assert self.demonstrations is not None
        return self.head.bc_loss(*self.demonstrations(len(ctx), generator), generator)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class _Means:
    """Running means (and maxima) of diagnostics by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def largest(self, name: str, value: float) -> None:
        self._sums[name] = max(self._sums.get(name, value), value)
        self._counts[name] = 1

    def means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}
