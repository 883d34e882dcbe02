"""``write_report``: one HTML file that holds everything, films included, and needs nothing from outside.

Evaluation, comparison and the quickstart write the same report. The layout is ``report.html.j2`` beside this file.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from robopolicy.evaluate.charts import histogram, intervals, line_chart
from robopolicy.evaluate.record import Evaluation, Film
from robopolicy.evaluate.stats import Interval

Curve = Mapping[str, Sequence[tuple[float, float]]]  # name -> (training step, value) rows


class Section(NamedTuple):
    """A section of the caller's own; ``body`` is HTML, already escaped, ``note`` plain text."""

    title: str
    body: Markup
    note: str = ""


class Scale(NamedTuple):
    """Where a value and its interval lie on a bar, in percent of its width."""

    low: float
    mean: float
    high: float


class Tile(NamedTuple):
    name: str
    value: str
    detail: str
    scale: Scale | None = None


def write_report(
    path: str | Path,
    *,
    title: str,
    evaluation: Evaluation | Sequence[Evaluation],
    learning_curve: Curve | None = None,
    config: Mapping[str, Any] | None = None,
    films: Sequence[Film] | None = None,
    extra: Sequence[Section] = (),
) -> Path:
    """Write a self-contained HTML report.

    Args:
        path: The file; missing folders are made.
        title: Heading.
        evaluation: One evaluation, shown in full, or several, shown side by side, or none.
        learning_curve: One chart per entry, for example ``{"training loss": [(0, 1.2), (100, 0.4)], "success": [...]}``. Names
            that contain "loss" get a logarithmic axis.
        config: The run's configuration, shown as YAML.
        films: Films to embed; by default those of the evaluations.
        extra: Further sections, shown first.

    Returns:
        The path written.
    """
    evaluations = [evaluation] if isinstance(evaluation, Evaluation) else list(evaluation)
    labels = [chr(ord("A") + i) for i in range(len(evaluations))]
    if films is None:
        films = [film for e in evaluations for film in e.films]
    first = evaluations[0] if evaluations else None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robopolicy.evaluate", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        title=title,
        subtitle=f"{first.task.name}, seeds {_seed_range(first)}, {first.provenance.get('time', '')}" if first else "",
        evaluations=evaluations,
        labels=labels,
        tiles=_tiles(first) if first else [],
        extra=list(extra),
        interval_charts=[
            Markup(intervals([(name, e.success) for name, e in zip(labels, evaluations, strict=True)], x_label="success")),
            Markup(
                intervals([(name, e.max_reward) for name, e in zip(labels, evaluations, strict=True)], x_label="mean max reward")
            ),
        ]
        if first
        else [],
        films=[{"episode": film.episode, "data": base64.b64encode(film.mp4).decode()} for film in films],
        curves=_curves(learning_curve or {}),
        histograms=[Markup(histogram(e.max_rewards, x_label="largest reward in the episode")) for e in evaluations],
        made=[facts(e) for e in evaluations],
        config=yaml.safe_dump(dict(config), sort_keys=False) if config else "",
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html)
    return path


def facts(evaluation: Evaluation) -> dict[str, str]:
    """How an evaluation was made, as rows of a table."""
    settings, origin = evaluation.settings, evaluation.provenance
    arguments = ", ".join(f"{k}={v}" for k, v in evaluation.task.args.items())
    sampler = settings.sampler or {}
    versions = origin.get("versions", {})
    load = origin.get("load")
    return {
        "policy": evaluation.policy,
        "task": evaluation.task.name + (f" ({arguments})" if arguments else ""),
        "environment seeds": _seed_range(evaluation),
        "noise seed": str(settings.noise_seed),
        "chunks": f"{settings.n_obs_steps} observations in, {settings.n_action_steps} actions executed",
        "sampler": ", ".join(f"{k}={v}" for k, v in sampler.items()) or "not recorded",
        "initial noise": "not recorded" if settings.initial_noise is None else f"of scale {settings.initial_noise:g}",
        "network evaluations": f"{settings.nfe} per chunk" if settings.nfe else "not recorded",
        "environments": f"{settings.num_envs} together, {settings.num_workers or 'no'} worker processes",
        "took": f"{evaluation.seconds:.1f} s ({evaluation.seconds / len(evaluation.episodes):.2f} s per episode)",
        "machine": f"{settings.device}, {settings.threads} of {origin.get('cpus', '?')} threads, "
        f"load {load[0] if load else '?'}, {origin.get('platform', '?')}",
        "versions": ", ".join([f"python {origin.get('python', '?')}", *(f"{k} {v}" for k, v in versions.items())]),
        "commit": origin.get("git") or "not a git checkout",
        "again": reproduce(evaluation),
    }


def reproduce(evaluation: Evaluation) -> str:
    """The command that gives the same episodes again; empty when the seeds are not consecutive."""
    seeds = evaluation.seeds
    if int(seeds[-1] - seeds[0]) + 1 != len(seeds):
        return ""
    arguments = [f"--task-arg {shlex.quote(f'{k}={v}')}" for k, v in evaluation.task.args.items()]
    settings = evaluation.settings
    if (steps := (settings.sampler or {}).get("num_steps")) is not None:
        arguments.append(f"--steps {steps}")
    if settings.initial_noise is not None:
        arguments.append(f"--noise {settings.initial_noise!r}")
    return " ".join(
        [
            f"robopolicy eval {shlex.quote(evaluation.policy)} --task {evaluation.task.name}",
            *arguments,
            f"--episodes {len(seeds)} --seeds {seeds[0]} --noise-seed {settings.noise_seed}",
            f"--num-envs {settings.num_envs}",
        ]
    )


def _tiles(evaluation: Evaluation) -> list[Tile]:
    summary = evaluation.summary
    score = summary.mean_max_reward
    in_unit = float(evaluation.max_rewards.min()) >= 0 and float(evaluation.max_rewards.max()) <= 1
    success = summary.success
    return [
        Tile(
            "Success",
            f"{100 * success.mean:.1f} %",
            f"{summary.successes} of {summary.episodes}, 95 % interval {100 * success.low:.1f} to {100 * success.high:.1f} %",
            _scale(success),
        ),
        Tile(
            "Mean max reward",
            f"{score.mean:.3f}",
            f"95 % interval {score.low:.3f} to {score.high:.3f}",
            _scale(score) if in_unit else None,
        ),
        Tile("Steps per episode", f"{summary.mean_length:.0f}", "mean over all episodes"),
    ]


def _scale(interval: Interval) -> Scale:
    return Scale(100 * interval.low, 100 * interval.mean, 100 * interval.high)


def _curves(learning_curve: Curve) -> list[Section]:
    charts = {
        name: line_chart({name: rows}, x_label="training step", y_label=name, log="loss" in name.lower())
        for name, rows in learning_curve.items()
    }
    return [Section(name, Markup(chart)) for name, chart in charts.items() if chart]


def _seed_range(evaluation: Evaluation) -> str:
    seeds = evaluation.seeds
    consecutive = int(seeds[-1] - seeds[0]) + 1 == len(seeds)
    return f"{seeds[0]} to {seeds[-1]}" + ("" if consecutive else f" ({len(seeds)} of them)")
