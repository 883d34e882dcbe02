"""``Diagnosis``: reads a run's metrics as an experienced person would, and says once what is going wrong and what mends it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from robopolicy.rl.config import FinetuneConfig

PATIENCE = 5  # iterations in a row, before something is more than chance
CLIPPED = 0.5
RATIO_MAX = 10.0
EARLY_STOP = 0.2  # share of the minibatches
VALUE_PATIENCE = 20  # iterations that a value network may take to become better than a constant
NOISE_GAP = 0.2  # of success, between the bound of the evaluation's interval and the exploring policy
NOISE_EPISODES = 50


class Diagnosis:
    """Fed with the rows of ``metrics.jsonl`` in their order; each finding is reported once in a run.

    Args:
        config: Of the run.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        chunks, ppo = config.env.num_envs * config.env.num_chunks, config.ppo
        self.num_minibatches = ppo.epochs * max(1, round(chunks / min(ppo.minibatch_size, chunks)))
        self._said: set[str] = set()
        self._streak: dict[str, int] = {}
        self._explained: deque[float] = deque(maxlen=PATIENCE)
        self._explored: deque[tuple[float, float]] = deque(maxlen=PATIENCE)  # successes and episodes of the last iterations
        self._evaluated: tuple[int, float, float] | None = None  # iteration, success and its lower bound

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        """Take in one row, with its ``step``; what is newly wrong."""
        found = {**self._updates(row), **self._values(row), **self._noise(row)}
        new = [text for key, text in found.items() if key not in self._said]
        self._said |= set(found)
        return new

    def _updates(self, row: Mapping[str, Any]) -> dict[str, str]:
        if not row.get("train/minibatches"):  # only values learn yet, or this is an evaluation
            return {}
        found = {}
        if self._lasting("unrewarded", row["train/advantage_std"] < 1e-9):
            found["unrewarded"] = (
                f"no action was rewarded otherwise than the rest, for {PATIENCE} iterations, so there is nothing "
                "to learn; start from a base that succeeds now and then, or change env.reward.source"
            )
        clipped, largest = row["ratio/clip_fraction"], row["ratio/max"]
        if self._lasting("clipped", clipped > CLIPPED):
            found["clipped"] = (
                f"{clipped:.0%} of the ratios are clipped, for {PATIENCE} iterations: most of each update is thrown away; "
                "lower ppo.lr or ppo.epochs"
            )
        done, wanted = int(row["train/minibatches"]), self.num_minibatches
        if self._lasting("stopped", done < EARLY_STOP * wanted):
            found["stopped"] = (
                f"ppo.target_kl ends the updates after {done} of {wanted} minibatches, for {PATIENCE} iterations: hardly "
                "anything is learned; lower ppo.lr or the method's clip"
            )
        if largest > RATIO_MAX:
            found["ratio"] = (
                f"a ratio of new to old policy reached {largest:.3g}: the clip does not hold the policy back; lower ppo.lr, "
                "ppo.epochs or the method's clip"
            )
        return found

    def _values(self, row: Mapping[str, Any]) -> dict[str, str]:
        if "value/explained_variance" not in row:
            return {}
        self._explained.append(row["value/explained_variance"])
        mean = sum(self._explained) / len(self._explained)
        if row["step"] <= VALUE_PATIENCE or mean >= 0:
            return {}
        return {
            "values": f"the value network explains returns worse than a constant (explained variance {mean:.2f} after "
            f"{row['step']} iterations), so advantages are noise; raise ppo.value_lr, or env.num_chunks so that more episodes end"
        }

    def _noise(self, row: Mapping[str, Any]) -> dict[str, str]:
        if "eval/success" in row:
            self._evaluated = (row["step"], row["eval/success"], row["eval/success_low"])
        if "train/success" in row:
            self._explored.append((row["train/success"] * row["train/episodes"], row["train/episodes"]))
        episodes = sum(count for _, count in self._explored)
        if self._evaluated is None or episodes < NOISE_EPISODES or row["step"] - self._evaluated[0] > PATIENCE:
            return {}
        _, success, low = self._evaluated
        exploring = sum(successes for successes, _ in self._explored) / episodes
        if exploring >= low - NOISE_GAP:
            return {}
        return {
            "noise": f"the policy succeeds in {success:.0%} of the episodes, and in {exploring:.0%} while it explores: so much "
            "noise hides what it could build on; lower the noise of the method (method.min_std, method.max_std, method.std or "
            "method.perturb_std)"
        }

    def _lasting(self, key: str, now: bool) -> bool:
        self._streak[key] = self._streak.get(key, 0) + 1 if now else 0
        return self._streak[key] >= PATIENCE


def warnings(config: FinetuneConfig, rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """All findings of a run, each with the iteration at which it was made."""
    diagnosis = Diagnosis(config)
    return [(int(row["step"]), text) for row in rows for text in diagnosis(row)]
