"""Policies side by side on the seeds that they share: what ``robopolicy compare`` computes, prints and writes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup, escape

from robopolicy.errors import EvaluationError
from robopolicy.evaluate.charts import intervals, line_chart
from robopolicy.evaluate.record import BOOTSTRAP_SEED, Evaluation, Rollout, write_json
from robopolicy.evaluate.report import Section, write_report
from robopolicy.evaluate.stats import (
    Interval,
    McNemar,
    Sequential,
    any_time_interval,
    compact_letters,
    holm,
    mcnemar,
    mean_interval,
    sequential,
    sign_flip_p,
    success_difference,
)
from robopolicy.provenance import provenance

On = Literal["success", "score"]


@dataclass(frozen=True)
class Pair:
    """Policy ``second`` minus policy ``first``, on shared seeds."""

    first: str
    second: str
    success: Interval
    mcnemar: McNemar
    score: Interval
    score_p: float
    any_time: Sequential
    any_time_difference: Interval


@dataclass(frozen=True)
class Comparison:
    """Every pair of policies; for more than two also p-values adjusted for their number, and letters."""

    labels: list[str]
    evaluations: list[Evaluation]
    pairs: list[Pair]
    alpha: float
    on: On
    stopped_early: bool
    success_letters: list[str]
    score_letters: list[str]

    @property
    def shared(self) -> int:
        return len(self.evaluations[0].episodes)

    def verdict(self, pair: Pair) -> str:
        """What the any-time test says, in words."""
        test = pair.any_time
        if test.decided_at is None:
            return f"undecided after {self.shared} pairs"
        better = pair.second if test.verdict == "B" else pair.first
        return f"{better} is better, decided after {test.decided_at} pairs"

    def lines(self) -> list[str]:
        """The comparison for a terminal."""
        width = max(len(e.policy) for e in self.evaluations)
        seeds = self.evaluations[0].seeds
        lines = [
            f"{label}  {e.policy:<{width}}  success {e.summary.successes}/{self.shared} = {e.success}"
            f"  mean max reward {e.max_reward}"
            for label, e in zip(self.labels, self.evaluations, strict=True)
        ]
        if len({str(e.task.args) for e in self.evaluations}) > 1:
            lines.append("note: the task's arguments differ; the comparison holds if they change only what is observed")
        if len(self.labels) > 2:
            lines += [
                "",
                f"{self.shared} shared seeds ({seeds[0]} to {seeds[-1]}); policies that share a letter are not separated:",
            ]
            lines += [
                f"  {label}  success {e.success.mean:.3f} {by_success:<4} mean max reward {e.max_reward.mean:.3f} {by_score}"
                for label, e, by_success, by_score in zip(
                    self.labels, self.evaluations, self.success_letters, self.score_letters, strict=True
                )
            ]
            return lines
        pair = self.pairs[0]
        test = pair.any_time
        lines += [
            "",
            f"B - A on {self.shared} shared seeds ({seeds[0]} to {seeds[-1]})",
            f"  success          {pair.success.signed()}   only A {pair.mcnemar.only_a}, only B {pair.mcnemar.only_b}, "
            f"McNemar p = {pair.mcnemar.p_value:.3g}",
            f"  mean max reward  {pair.score.signed()}   paired bootstrap; sign-flip p = {pair.score_p:.3g}",
            f"  any time         {self.verdict(pair)} (by {self.on}): e = {math.exp(test.log_e.max(initial=0.0)):.3g}, "
            f"decides at {1 / self.alpha:g}; difference {pair.any_time_difference.signed()}",
        ]
        if self.stopped_early:
            lines.append(
                "  stopped early: trust the any-time line; the other figures are for a number of episodes fixed beforehand"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "task": self.evaluations[0].task.name,
            "alpha": self.alpha,
            "decided_on": self.on,
            "stopped_early": self.stopped_early,
            "seeds": self.evaluations[0].seeds.tolist(),
            "policies": [
                {"label": label, "policy": e.policy, **e.summary.to_json(), "success_letters": s, "score_letters": r}
                for label, e, s, r in zip(self.labels, self.evaluations, self.success_letters, self.score_letters, strict=True)
            ],
            "pairs": [
                {
                    "first": p.first,
                    "second": p.second,
                    "success_difference": p.success._asdict(),
                    "mcnemar": p.mcnemar._asdict(),
                    "score_difference": p.score._asdict(),
                    "score_sign_flip_p": p.score_p,
                    "any_time": {
                        "verdict": {"A": p.first, "B": p.second, None: None}[p.any_time.verdict],
                        "decided_at": p.any_time.decided_at,
                        "p_value": p.any_time.p_value,
                        "difference": p.any_time_difference._asdict(),
                        "log_e": [round(v, 4) for v in p.any_time.log_e.tolist()],
                    },
                }
                for p in self.pairs
            ],
            "provenance": provenance(),
        }


def align(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[Evaluation]:
    """Reduce evaluations to the seeds that all of them have. Raises EvaluationError for different tasks, or no common seed."""
    for evaluation, name in zip(evaluations, names, strict=True):
        if evaluation.task.name != evaluations[0].task.name:
            raise EvaluationError(
                f"'{names[0]}' is of task '{evaluations[0].task.name}' and '{name}' of '{evaluation.task.name}'; use one task"
            )
    common = set.intersection(*(set(e.seeds.tolist()) for e in evaluations))
    if not common:
        raise EvaluationError(
            f"'{names[0]}' and the others share no seeds (they start at {', '.join(str(e.seeds[0]) for e in evaluations)}); "
            "evaluate them with the same --seeds"
        )
    return [e.restricted(common) for e in evaluations]


def outcomes(rollouts: Sequence[Rollout], on: On) -> np.ndarray:
    """Success or score ``[n]`` of finished episodes in the order of their seeds."""
    ordered = sorted(rollouts, key=lambda r: r.episode.seed)
    return np.array([r.episode.success if on == "success" else r.episode.max_reward for r in ordered], dtype=np.float64)


def compare(
    evaluations: Sequence[Evaluation], *, alpha: float = 0.05, on: On = "success", stopped_early: bool = False
) -> Comparison:
    """Compare evaluations that have the same seeds (see :func:`align`); at most 26.

    Raises EvaluationError when ``on="score"`` and scores leave [0, 1]: the any-time test needs bounded differences.
    """
    labels = [chr(ord("A") + index) for index in range(len(evaluations))]
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    pairs = []
    for (label_a, a), (label_b, b) in itertools.combinations(zip(labels, evaluations, strict=True), 2):
        x, y = (a.successes, b.successes) if on == "success" else (a.max_rewards, b.max_rewards)
        if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) > 1:
            raise EvaluationError("--on score needs rewards within [0, 1] and these are not; compare on success")
        difference = b.max_rewards - a.max_rewards
        pairs.append(
            Pair(
                first=label_a,
                second=label_b,
                success=success_difference(a.successes, b.successes),
                mcnemar=mcnemar(a.successes, b.successes),
                score=mean_interval(difference, rng),
                score_p=sign_flip_p(difference, rng),
                any_time=sequential(x, y, alpha=alpha),
                any_time_difference=any_time_interval(y.astype(np.float64) - x, alpha),
            )
        )
    indices = list(itertools.combinations(range(len(evaluations)), 2))

    def letters(means: Sequence[float], p_values: Sequence[float]) -> list[str]:
        return compact_letters(means, {pair for pair, p in zip(indices, holm(p_values), strict=True) if p <= alpha})

    return Comparison(
        labels=labels,
        evaluations=list(evaluations),
        pairs=pairs,
        alpha=alpha,
        on=on,
        stopped_early=stopped_early,
        success_letters=letters([e.success.mean for e in evaluations], [p.mcnemar.p_value for p in pairs]),
        score_letters=letters([e.max_reward.mean for e in evaluations], [p.score_p for p in pairs]),
    )


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write ``comparison.json`` and ``report.html`` into ``folder``; returns the report's path."""
    write_json(folder / "comparison.json", comparison.to_json())
    sections = _two(comparison) if len(comparison.labels) == 2 else _many(comparison)
    title = " against ".join("/".join(Path(e.policy).parts[-2:]) for e in comparison.evaluations)
    if len(comparison.labels) > 2:
        title = f"{len(comparison.labels)} policies on {comparison.evaluations[0].task.name}"
    return write_report(folder / "report.html", title=title, evaluation=comparison.evaluations, extra=sections)


def _two(comparison: Comparison) -> list[Section]:
    pair = comparison.pairs[0]
    test = pair.any_time
    rows = [
        ("verdict", comparison.verdict(pair)),
        ("success, B - A", pair.success.signed()),
        ("only A succeeds / only B", f"{pair.mcnemar.only_a} / {pair.mcnemar.only_b} of {comparison.shared} seeds"),
        ("McNemar exact p", f"{pair.mcnemar.p_value:.3g}"),
        ("mean max reward, B - A", pair.score.signed()),
        ("sign-flip p", f"{pair.score_p:.3g}"),
        (f"difference of {comparison.on}, at any time", pair.any_time_difference.signed()),
        ("any-time p", f"{test.p_value:.3g}"),
    ]
    table = Markup("<table>{}</table>").format(
        Markup("").join(Markup("<tr><th>{}</th><td>{}</td></tr>").format(*row) for row in rows)
    )
    chart = intervals(
        [("success", pair.success), ("max reward", pair.score), ("any time", pair.any_time_difference)],
        x_label="B - A",
        zero=True,
    )
    ceiling = max(float(test.log_e.max(initial=0.0)), -math.log(comparison.alpha))
    floor = min(float(test.log_e.min(initial=0.0)), 0.0)
    process = line_chart(
        {"e-value": [(i + 1, math.exp(v)) for i, v in enumerate(test.log_e.tolist())]},
        x_label="pairs of episodes",
        y_label="e-value",
        log=True,
        references={f"decides at {1 / comparison.alpha:g}": 1 / comparison.alpha, "no evidence": 1.0},
        y_range=(math.exp(floor - 0.3), math.exp(ceiling + 0.3)),
    )
    body = Markup('<div class="grid"><div>{}</div><div>{}</div></div>').format(table, Markup(chart))
    stopped = (
        " The run stopped when the any-time test decided: only the any-time figures are valid then; the others are for a "
        "number of episodes fixed beforehand."
        if comparison.stopped_early
        else ""
    )
    note = "Intervals are 95 %, paired on the same seeds." + stopped
    return [
        Section("Comparison", body, note),
        Section(
            "Evidence over time",
            Markup(process),
            "The e-value is the capital of a gambler who bets against equality, starting from 1. It may be watched all along: "
            f"between equally good policies it reaches {1 / comparison.alpha:g} with probability at most {comparison.alpha:g}.",
        ),
    ]


def _many(comparison: Comparison) -> list[Section]:
    order = sorted(range(len(comparison.labels)), key=lambda i: -comparison.evaluations[i].success.mean)
    rows = "".join(
        f"<tr><td>{comparison.labels[i]}</td><td>{escape(comparison.evaluations[i].policy)}</td>"
        f'<td class="n">{comparison.evaluations[i].success}</td><td><b>{comparison.success_letters[i]}</b></td>'
        f'<td class="n">{comparison.evaluations[i].max_reward}</td><td><b>{comparison.score_letters[i]}</b></td></tr>'
        for i in order
    )
    head = '<tr><th></th><th>policy</th><th class="n">success</th><th></th><th class="n">mean max reward</th><th></th></tr>'
    return [
        Section(
            "Which are separated",
            Markup(f'<div class="wide"><table>{head}{rows}</table></div>'),
            f"Policies that share a letter are not separated on these {comparison.shared} seeds: pairwise exact McNemar tests of "
            f"success and sign-flip tests of the score, Holm-adjusted, family-wise risk {comparison.alpha:g}.",
        )
    ]
