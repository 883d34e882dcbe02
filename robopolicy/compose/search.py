"""Weights found by roll-outs on search seeds, and tested on other seeds against what they must beat."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from robopolicy.compose.policy import Composed, Rule, plain_sampler
from robopolicy.compose.predict import Prediction
from robopolicy.config import component
from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.evaluate.charts import intervals, line_chart
from robopolicy.evaluate.commands import seeds_of
from robopolicy.evaluate.paired import On, Pair, compare
from robopolicy.evaluate.record import Evaluation, write_json
from robopolicy.evaluate.report import Section, write_report
from robopolicy.evaluate.run import SEEDS, evaluate
from robopolicy.evaluate.stats import Interval
from robopolicy.generative.sampler import SAMPLERS
from robopolicy.policy import Policy
from robopolicy.provenance import provenance
from robopolicy.task import TaskSpec


@dataclass(frozen=True)
class Point:
    """One choice of weights on the search seeds."""

    weights: tuple[float, ...]
    evaluation: Evaluation

    def interval(self, on: On) -> Interval:
        return self.evaluation.success if on == "success" else self.evaluation.max_reward


@dataclass(frozen=True)
class Control:
    """Something that the composition must beat, on the test seeds; ``pair`` is composition minus control."""

    name: str
    evaluation: Evaluation
    pair: Pair


@dataclass(frozen=True)
class Outcome:
    policy: Composed
    chosen: Point
    points: list[Point]
    test: Evaluation
    controls: list[Control]
    better: str
    prediction: Prediction | None
    on: On
    parents: list[str]

    def lines(self) -> list[str]:
        """The outcome for a terminal."""
        seeds, width = self.test.seeds, max(len(control.name) for control in self.controls)
        lines = []
        if len(self.points) > 1:
            searched = self.points[0].evaluation.seeds
            lines.append(f"\nsearch seeds {searched[0]} to {searched[-1]}, by {self.on}:")
            lines += [
                f"  {_said(point.weights)}  success {point.evaluation.success}  mean max reward {point.evaluation.max_reward}"
                + ("   <- chosen" if point is self.chosen else "")
                for point in self.points
            ]
        if self.policy.config.rule != "product" and (1.0 in self.chosen.weights):
            only = _label(self.chosen.weights.index(1.0))
            lines.append(f"the best is parent {only} alone: this composition is that policy; keep the parent")
        if self.prediction is not None:
            lines.append(f"weights {self._found_and_predicted(self.prediction)}")
        lines += [
            f"\ntest seeds {seeds[0]} to {seeds[-1]}, not used before; difference: composition minus the other, paired",
            f"  {'composition':<{width}}  success {self.test.success}  mean max reward {self.test.max_reward}",
        ]
        for control in self.controls:
            e, pair = control.evaluation, control.pair
            lines.append(
                f"  {control.name:<{width}}  success {e.success}  mean max reward {e.max_reward}\n"
                f"  {'':<{width}}    success {pair.success.signed()}, McNemar p {pair.mcnemar.p_value:.3g}; "
                f"reward {pair.score.signed()}, sign-flip p {pair.score_p:.3g}"
            )
        return [*lines, self.verdict()]

    def verdict(self) -> str:
        """Against the strongest control, whichever that turned out to be: the choice is to the composition's disadvantage."""
        measure = (lambda e: e.success.mean) if self.on == "success" else (lambda e: e.max_reward.mean)
        best = max((c for c in self.controls if c.name.startswith("parent")), key=lambda c: measure(c.evaluation))
        difference = best.pair.success if self.on == "success" else best.pair.score
        p = best.pair.mcnemar.p_value if self.on == "success" else best.pair.score_p
        word = "not separated from" if p > 0.05 else "better than" if difference.mean > 0 else "WORSE than"
        return f"verdict: the composition is {word} the best single parent ({best.name}): {difference.signed()}, p = {p:.3g}"

    def _found_and_predicted(self, prediction: Prediction) -> str:
        """Side by side with sum 1, as a mean's weights are: a product's exponents have another."""
        total = sum(self.chosen.weights)
        shares = f" (shares {_said([w / total for w in self.chosen.weights])})" if abs(total - 1) > 1e-6 else ""
        return f"found {_said(self.chosen.weights)}{shares}, predicted for a mean {_said(prediction.weights)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "parents": self.parents,
            "rule": self.policy.config.rule,
            "weights": list(self.chosen.weights),
            "path": self.policy.config.path,
            "sampler": self.policy.config.sampler,
            "chosen_on": self.on,
            "search": {
                "seeds": self.points[0].evaluation.seeds.tolist(),
                "points": [{"weights": p.weights, **p.evaluation.summary.to_json()} for p in self.points],
            }
            if len(self.points) > 1
            else None,
            "predicted": self.prediction.to_json() if self.prediction is not None else None,
            "test": {
                "seeds": self.test.seeds.tolist(),
                "composition": self.test.summary.to_json(),
                "better_parent_on_search_seeds": self.better,
                "controls": [
                    {
                        "name": c.name,
                        **c.evaluation.summary.to_json(),
                        "success_difference": c.pair.success._asdict(),
                        "mcnemar": c.pair.mcnemar._asdict(),
                        "score_difference": c.pair.score._asdict(),
                        "score_sign_flip_p": c.pair.score_p,
                    }
                    for c in self.controls
                ],
            },
            "verdict": self.verdict(),
            "provenance": provenance(),
        }

    def write(self, folder: Path) -> Path:
        """Write ``compose.json``, every test's ``eval.json`` and ``report.html``; returns the report's path."""
        write_json(folder / "compose.json", self.to_json())
        for name, evaluation in [("composition", self.test), *((c.name, c.evaluation) for c in self.controls)]:
            evaluation.save(folder / "eval" / name.replace(" ", "_") / "eval.json")
        title = " with ".join("/".join(Path(parent).parts[-2:]) for parent in self.parents)
        return write_report(
            folder / "report.html", title=f"{title}, {self.policy.config.rule}", evaluation=self.test, extra=self._sections()
        )

    def _sections(self) -> list[Section]:
        table = Markup(
            '<div class="wide"><table><tr><th></th><th>success</th><th>mean max reward</th><th>composition minus this: '
            "success</th><th>McNemar p</th><th>max reward</th><th>sign-flip p</th></tr>{}</table></div>"
        ).format(
            Markup("").join(
                Markup("<tr>" + "<td>{}</td>" * 7 + "</tr>").format(
                    c.name,
                    str(c.evaluation.success),
                    str(c.evaluation.max_reward),
                    c.pair.success.signed(),
                    f"{c.pair.mcnemar.p_value:.3g}",
                    c.pair.score.signed(),
                    f"{c.pair.score_p:.3g}",
                )
                for c in self.controls
            )
        )
        sections = [
            Section(
                "Against its controls",
                Markup("<p>{}</p>").format(self.verdict()) + table,
                f"{len(self.test.episodes)} test seeds, paired; none of them was used to choose weights.",
            )
        ]
        if len(self.points) > 1:
            sections.append(
                Section(
                    "Search",
                    self._chart(),
                    "On search seeds, with 95 % intervals. The best of many noisy figures looks better than it is: what the "
                    "chosen weights are worth is in the test above, not here.",
                )
            )
        if self.prediction is not None:
            rows = Markup("").join(
                Markup("<tr><td>{}</td><td>{}</td></tr>").format(f"{level.noise_level:.3g}", _said(level.weights))
                for level in self.prediction.levels
            )
            body = Markup("<p>{}</p><table><tr><th>noise level</th><th>weights of least error</th></tr>{}</table>")
            sections.append(
                Section(
                    "Predicted weights",
                    body.format(self._found_and_predicted(self.prediction), rows),
                    f"From the parents' errors on {self.prediction.windows} held-out demonstrated chunks.",
                )
            )
        return sections

    def _chart(self) -> Markup:
        if len(self.parents) > 2:
            rows = [(_said(point.weights), point.interval(self.on)) for point in self.points]
            return Markup(intervals(rows, x_label=str(self.on)))
        total = sum(self.points[0].weights)
        points = [(p.weights[0] / total, p.interval(self.on)) for p in self.points]
        series = {f"{self.on}, 95 %": [(w, i.mean) for w, i in points]}
        if self.prediction is not None:
            predicted = self.prediction.weights[0]
            series[f"predicted weight {predicted:.2f}"] = [(predicted, 0.0), (predicted, 1.0)]
        return Markup(
            line_chart(
                series,
                x_label=f"weight of {escape(Path(self.parents[0]).name)}",
                y_label=f"{self.on} on search seeds",
                y_range=(0.0, 1.0),
                band=[(w, i.low, i.high) for w, i in points],
            )
        )


@dataclass(frozen=True)
class Found:
    """What the search seeds say."""

    policy: Composed
    chosen: Point
    points: list[Point]
    better: int  # the parent that did best alone


class Search:
    """Scans weights, chooses, and tests.

    Args:
        base: The composition, with any weights; its rule, path and sampler stay.
        parents: Its parents as they came.
        names: What to call them.
        spec: The task.
        args: ``points``, ``search_episodes``, ``on`` and what every verb that runs episodes has.

    Raises:
        EvaluationError: Search and test seeds overlap.
    """

    def __init__(
        self, base: Composed, parents: Sequence[Policy], names: list[str], spec: TaskSpec, args: argparse.Namespace
    ) -> None:
        self.base, self.parents, self.names, self.spec, self.args = base, parents, names, spec, args
        self.searched = list(range(SEEDS["search"], SEEDS["search"] + args.search_episodes))
        self.tested = seeds_of(args)
        if set(self.searched) & set(self.tested):
            raise EvaluationError(
                f"test seeds from {self.tested[0]} overlap with search seeds from {self.searched[0]}; choose other --seeds"
            )
        self.rule = base.config.rule
        self.total = float(len(parents)) if self.rule == "product" else 1.0
        # Every parent by the composition's own path and sampler (for and/or: by the stochastic one).
        self.alone = [_alone(base, index) for index in range(len(parents))]

    def find(self) -> Found:
        """Choose weights on the search seeds; for ``and`` and ``or`` there are none to choose."""
        on: On = self.args.on
        weighted = self.rule not in ("and", "or")
        grid = self._grid() if weighted else []
        points = []
        for row in grid:
            weights = tuple(self.total * w for w in row)
            points.append(
                Point(weights, self._measure(_weighted(self.base, weights), self.searched, f"weights {_said(weights)}"))
            )
        corners = [point.evaluation for point in points if max(point.weights) == 1][::-1] if self.rule == "convex" else []
        if not points:
            points = [Point(self.base.config.weights, self._measure(self.base, self.searched, self.rule))]
        if not corners:
            corners = [self._measure(one, self.searched, f"parent {_label(i)}") for i, one in enumerate(self.alone)]
        chosen = max(points, key=lambda point: (point.interval(on).mean, point.evaluation.max_reward.mean))
        worth = [e.success.mean if on == "success" else e.max_reward.mean for e in corners]
        policy = _weighted(self.base, chosen.weights) if weighted else self.base
        return Found(policy, chosen, points, worth.index(max(worth)))

    def _grid(self) -> list[tuple[float, ...]]:
        if self.rule == "guidance":
            return guidance_scales(self.args.points or 9)
        return simplex(len(self.parents), self.args.points or (11 if len(self.parents) == 2 else 5))

    def test(self, found: Found, prediction: Prediction | None) -> Outcome:
        """The chosen composition and everything that it must beat, on the test seeds."""
        test = self._measure(found.policy, self.tested, "composition")
        controls = []
        for name, rival in self._rivals(found):
            evaluation = self._measure(rival, self.tested, name)
            controls.append(Control(name, evaluation, compare([evaluation, test]).pairs[0]))
        return Outcome(
            found.policy,
            found.chosen,
            found.points,
            test,
            controls,
            _label(found.better),
            prediction,
            self.args.on,
            self.names,
        )

    def _rivals(self, found: Found) -> list[tuple[str, Policy]]:
        base, count = self.base, len(self.parents)
        rivals: list[tuple[str, Policy]] = [(f"parent {_label(i)}, same sampler", one) for i, one in enumerate(self.alone)]
        for index, one in enumerate(self.parents):
            if any(getattr(one.config, key) != getattr(base.config, key) for key in ("sampler", "path", "initial_noise")):
                rivals.append((f"parent {_label(index)} as it came", one))
        longer = longer_walk(self.alone[found.better], count)
        if longer is not None:
            rivals.append((f"parent {_label(found.better)}, {count}x the steps", longer))
        if self.rule in ("and", "or"):
            equal = base.varied(rule="convex", weights=[1 / count] * count, sampler=plain_sampler(base))
            rivals.append(("mean, same stochastic sampler", equal))
        elif self.rule != "guidance" and len(set(found.chosen.weights)) > 1:
            rivals.append(("equal weights", _weighted(base, (self.total / count,) * count)))
        return rivals

    def _measure(self, policy: Policy, seeds: list[int], name: str) -> Evaluation:
        args = self.args
        return evaluate(
            policy,
            self.spec,
            seeds,
            num_envs=args.num_envs,
            num_workers=args.workers,
            noise_seed=args.noise_seed,
            name=name,
        )


def simplex(parents: int, points: int) -> list[tuple[float, ...]]:
    """Weights with sum 1 in equal steps, from those of the last parent alone to those of the first alone."""
    steps = points - 1
    rows = (row for row in itertools.product(range(steps + 1), repeat=parents) if sum(row) == steps)
    return [tuple(round(k / steps, 12) for k in row) for row in sorted(rows)]


def guidance_scales(points: int) -> list[tuple[float, ...]]:
    """Weights ``(scale, 1 - scale)`` for scales from 1, the first parent alone, to 3."""
    scales = [round(1 + 2 * k / (points - 1), 12) for k in range(points)]
    return [(scale, round(1 - scale, 12)) for scale in scales]


def longer_walk(policy: Policy, times: int) -> Policy | None:
    """The same policy with ``times`` as many steps; None when its path or sampler has no more."""
    setting = {**policy.config.sampler, "num_steps": times * policy.sampler.num_steps(policy.path)}
    try:
        component("sampler", setting, SAMPLERS)
        longer = policy.varied(sampler=setting)
        longer.sampler.times(longer.path)
    except ConfigError:
        return None
    return longer


def _weighted(base: Composed, weights: tuple[float, ...]) -> Composed:
    return base.varied(weights=list(weights))


def _alone(base: Composed, index: int) -> Composed:
    """One parent by the composition's path and sampler: weight 1 for it, 0 for the others, which are then not asked."""
    sampler = plain_sampler(base) if base.config.rule in ("and", "or") else base.config.sampler
    weights = [float(i == index) for i in range(len(base.policies))]
    rule: Rule = "convex"
    return base.varied(rule=rule, weights=weights, sampler=sampler)


def _label(index: int) -> str:
    return chr(ord("A") + index)


def _said(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:.2f}" for weight in weights)
