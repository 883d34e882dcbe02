"""Diagnoses: each finding comes once, when it lasts, and not before."""

from __future__ import annotations

from typing import Any

import pytest

from robopolicy.config import parse
from robopolicy.rl.config import FinetuneConfig
from robopolicy.rl.diagnose import PATIENCE, VALUE_PATIENCE, Diagnosis, warnings

CONFIG = parse(
    FinetuneConfig,
    {
        "name": "x",
        "base": "b",
        "task": {"name": "t"},
        "env": {"num_envs": 4, "num_chunks": 10},
        "ppo": {"epochs": 5, "minibatch_size": 10},  # 20 minibatches
    },
)
HEALTHY = {
    "train/minibatches": 20.0,
    "ratio/clip_fraction": 0.2,
    "ratio/max": 1.5,
    "value/explained_variance": 0.4,
    "train/advantage_std": 1.0,
    "train/success": 0.5,
    "train/episodes": 20.0,
}


def rows(num: int, **changes: float) -> list[dict[str, Any]]:
    sick = {key.replace("__", "/"): value for key, value in changes.items()}
    return [{"step": step, **HEALTHY, **sick} for step in range(1, num + 1)]


def test_a_healthy_run_has_no_findings() -> None:
    evaluation = {"step": 0, "eval/success": 0.6, "eval/success_low": 0.5, "eval/success_high": 0.7}
    only_values = {"step": 1, "value/explained_variance": -3.0, "train/minibatches": 0.0, "loss/value": 1.0}
    assert warnings(CONFIG, [evaluation, only_values, *rows(100)]) == []


@pytest.mark.parametrize(
    ("changes", "iteration", "text"),
    [
        ({"ratio__clip_fraction": 0.6}, PATIENCE, "60% of the ratios are clipped"),
        ({"train__minibatches": 3.0}, PATIENCE, "after 3 of 20 minibatches"),
        ({"ratio__max": 11.0}, 1, "reached 11"),
        ({"train__advantage_std": 0.0}, PATIENCE, "nothing to learn"),
        ({"value__explained_variance": -0.1}, VALUE_PATIENCE + 1, "worse than a constant"),
    ],
)
def test_a_finding_is_told_once_and_names_what_to_change(changes: dict[str, float], iteration: int, text: str) -> None:
    found = warnings(CONFIG, rows(60, **changes))
    assert [step for step, _ in found] == [iteration]
    assert text in found[0][1]
    assert "ppo." in found[0][1] or "env.reward.source" in found[0][1]


def test_a_bad_iteration_now_and_then_is_no_finding() -> None:
    sick = {"ratio/clip_fraction": 0.9, "train/minibatches": 1.0}
    assert warnings(CONFIG, [{**row, **(sick if row["step"] % PATIENCE else {})} for row in rows(60)]) == []


def test_noise_that_hides_what_the_policy_can_do() -> None:
    """Trap: the success of exploring episodes is not that of the policy."""
    evaluation = {"step": 0, "eval/success": 0.7, "eval/success_low": 0.6}
    found = warnings(CONFIG, [evaluation, *rows(10, train__success=0.25)])
    assert len(found) == 1
    assert found[0][0] == 3  # 60 episodes
    assert "70%" in found[0][1]
    assert "25%" in found[0][1]
    assert warnings(CONFIG, [evaluation, *rows(10, train__success=0.45)]) == []
    stale = [row for row in rows(40, train__success=0.25) if row["step"] > PATIENCE]  # it may have been lost since
    assert warnings(CONFIG, [evaluation, *stale]) == []


def test_what_was_said_before_a_stop_is_not_said_again() -> None:
    diagnosis = Diagnosis(CONFIG)
    first, *later = rows(4, ratio__max=20.0)
    assert len(diagnosis(first)) == 1
    assert [text for row in later for text in diagnosis(row)] == []
