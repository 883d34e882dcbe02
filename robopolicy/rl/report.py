"""The end of a fine-tuning run: base against result on the same test seeds, and ``report.html``."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from tqdm import tqdm

from robopolicy.evaluate.charts import line_chart
from robopolicy.evaluate.film import film_rollouts
from robopolicy.evaluate.paired import Comparison, compare
from robopolicy.evaluate.record import Evaluation, Film, write_json
from robopolicy.evaluate.report import Section, write_report
from robopolicy.evaluate.run import SEEDS, check_fit, record, rollout
from robopolicy.policy import Policy, load_policy
from robopolicy.rl.diagnose import warnings
from robopolicy.rl.finetune import COLLAPSED, Finetuner
from robopolicy.train.metrics import read_metrics
from robopolicy.vector import VectorEnv

Rows = Sequence[Mapping[str, Any]]

POINTS = 80  # of a curve: more iterations are averaged, which is how noise becomes readable

# key in metrics.jsonl -> title, what is good
DIAGNOSTICS = {
    "ratio/kl": ("KL of new to old policy", "mean of (r - 1) - log r over the updates of an iteration"),
    "ratio/clip_fraction": ("clipped ratios", ".05 to .3 is usual, above .5 updates are thrown away"),
    "ratio/max": ("largest ratio", "above 10 the clip does not hold"),
    "value/explained_variance": ("explained variance of values", "towards 1; below 0 advantages are noise"),
    "ratio/divergence_from_base": ("divergence from the base", "in the method's own measure; a sudden rise precedes a collapse"),
}


def final_test(finetuner: Finetuner) -> Comparison | None:
    """Base (with its own sampler) and last checkpoint on the same test seeds; written to ``test/``, the first seeds filmed.

    None when the config asks for neither episodes nor films.
    """
    config, out = finetuner.config, finetuner.out
    num = config.eval.test_episodes or config.eval.films
    if not num:
        return None
    evaluations = []
    for name, policy in ((config.base, finetuner.base.policy), (str(out), load_policy(out, finetuner.device))):
        evaluations.append(_evaluate(finetuner, policy, name, range(SEEDS["test"], SEEDS["test"] + num)))
    comparison = compare(evaluations)
    for name, evaluation in zip(("base", "result"), evaluations, strict=True):
        evaluation.save(out / "test" / name / "eval.json")
    write_json(out / "test" / "comparison.json", {**comparison.to_json(), "run": summary(finetuner)})
    return comparison


def _evaluate(finetuner: Finetuner, policy: Policy, name: str, seeds: Sequence[int]) -> Evaluation:
    """One episode per seed; the first ``eval.films`` of them are filmed, whatever came of them."""
    config = finetuner.config
    started, num_envs = time.perf_counter(), min(config.eval.num_envs, len(seeds))
    with VectorEnv(config.task.spec, num_envs, config.eval.num_workers) as env:
        check_fit(policy, env)
        episodes = rollout(policy, env, seeds, noise_seed=0, name=name)
        rollouts = list(tqdm(episodes, total=len(seeds), desc=f"test {name}", unit="episode"))
    seconds = time.perf_counter() - started
    chosen = [r for r in rollouts if r.episode.seed in seeds[: config.eval.films]]
    return record(
        policy,
        config.task.spec,
        rollouts,
        name=name,
        noise_seed=0,
        num_envs=num_envs,
        num_workers=config.eval.num_workers,
        seconds=seconds,
        films=sorted(film_rollouts(config.task.spec, chosen, len(chosen), len(chosen)), key=lambda film: film.episode.seed),
    )


def summary(finetuner: Finetuner) -> dict[str, Any]:
    """What the run took."""
    rows = read_metrics(finetuner.out / "metrics.jsonl")
    collect, update = (sum(row.get(f"time/{part}", 0.0) for row in rows) for part in ("collect", "update"))
    steps = finetuner.checkpoints.steps()
    return {
        "method": finetuner.config.method["type"],
        "seed": finetuner.config.seed,
        "iterations": finetuner.iteration,
        "checkpoint": steps[-1] if steps else None,
        "env_steps": finetuner.env_steps,
        "minutes": round(finetuner.seconds / 60, 2),
        "env_steps_per_s": round(finetuner.env_steps / max(finetuner.seconds, 1e-9), 1),
        "collecting": round(collect / max(collect + update, 1e-9), 3),
        "threads": torch.get_num_threads(),
    }


def write_run_report(finetuner: Finetuner, code: int, test: Comparison | None = None) -> Path:
    """Write ``report.html`` into the run folder.

    Args:
        finetuner: After its run. code: What the run returned. test: What :func:`final_test` returned.

    Returns:
        The path written.
    """
    config, rows = finetuner.config, read_metrics(finetuner.out / "metrics.jsonl")
    tested = [] if test is None else _tested(test, config.eval.test_episodes)
    if test is None and code in (0, COLLAPSED) and config.eval.test_episodes:
        tested = [Section("Before and after", Markup(""), "Not tested yet: it runs now, or was interrupted; --resume makes it.")]
    sections = [*tested, _success(rows), _run(finetuner, code, rows)]
    return write_report(
        finetuner.out / "report.html",
        title=f"{config.name}: {config.method['type']} on {config.task.name}",
        evaluation=[] if test is None else test.evaluations,
        config=config.model_dump(mode="json"),
        films=[],  # they are in a section of their own, in pairs
        extra=[*sections, _diagnostics(rows)],
    )


def _tested(test: Comparison, episodes: int) -> list[Section]:
    before, after = test.evaluations
    pair, counts = test.pairs[0], test.pairs[0].mcnemar
    sections = []
    if episodes:
        rows = {
            "success before": f"{before.summary.successes}/{test.shared} = {before.success}",
            "success after": f"{after.summary.successes}/{test.shared} = {after.success}",
            "difference of success": pair.success.signed(),
            "only before / only after": f"{counts.only_a} / {counts.only_b} seeds, McNemar exact p = {counts.p_value:.3g}",
            "mean max reward": f"{before.max_reward} before, {after.max_reward} after",
            "difference of max reward": f"{pair.score.signed()}, sign-flip p = {pair.score_p:.3g}",
        }
        note = (
            "The base with its own sampler and the last checkpoint, on the same seeds, which training never meets; 95 %, paired."
        )
        sections.append(Section("Before and after", _table(rows), note))
    films = {film.episode.seed: film for film in after.films}
    pairs = [(film, films[film.episode.seed]) for film in before.films if film.episode.seed in films]
    if pairs:
        body = Markup('<div class="grid">{}</div>').format(
            Markup("").join(_figure(film, when) for both in pairs for film, when in zip(both, ("before", "after"), strict=True))
        )
        sections.append(Section("Films, before and after", body, "The first test seeds, not chosen by their outcome."))
    return sections


def _figure(film: Film, when: str) -> Markup:
    episode = film.episode
    return Markup(
        '<figure><video controls loop muted autoplay playsinline src="data:video/mp4;base64,{}"></video>'
        '<figcaption>{}: <span class="tag{}">{}</span> seed {}, max reward {}</figcaption></figure>'
    ).format(
        base64.b64encode(film.mp4).decode(),
        when,
        "" if episode.success else " failed",
        "success" if episode.success else "failure",
        episode.seed,
        f"{episode.max_reward:.3f}",
    )


def _success(rows: Rows) -> Section:
    evaluated = [row for row in rows if "eval/success" in row]
    success = line_chart(
        {"evaluated": _points(evaluated, "eval/success"), "exploring": _thin(_points(rows, "train/success"))},
        x_label="environment steps",
        y_label="success",
        y_range=(0.0, 1.0),
        band=[(row["train/env_steps"], row["eval/success_low"], row["eval/success_high"]) for row in evaluated],
    )
    reward = line_chart(
        {"evaluated": _points(evaluated, "eval/total_reward"), "exploring": _thin(_points(rows, "train/total_reward"))},
        x_label="environment steps",
        y_label="total reward of an episode",
    )
    return Section(
        "Learning",
        _grid([success, reward]),
        "Evaluated: without exploration, on validation seeds, with its 95 % interval. Exploring: the episodes it learns from.",
    )


def _diagnostics(rows: Rows) -> Section:
    charts = [
        line_chart({title: _thin(_points(rows, key))}, x_label="environment steps", y_label=title)
        for key, (title, _) in DIAGNOSTICS.items()
    ]
    return Section("Diagnostics", _grid(charts), "; ".join(f"{title}: {good}" for title, good in DIAGNOSTICS.values()) + ".")


def _run(finetuner: Finetuner, code: int, rows: Rows) -> Section:
    facts, config = summary(finetuner), finetuner.config
    ended = {
        0: "after all of its iterations",
        COLLAPSED: f"its policy collapsed; the last checkpoint is that of iteration {facts['checkpoint']}, before it did",
    }.get(code, "stopped by a signal; no test was made. It can be resumed")
    table = {
        "ended": ended,
        "iterations": f"{facts['iterations']} of {config.iterations}",
        "environment steps": f"{facts['env_steps']:,}",
        "took": f"{facts['minutes']:.1f} minutes without evaluations, {facts['env_steps_per_s']:,.0f} steps per second",
        "of which": f"{facts['collecting']:.0%} collecting, {1 - facts['collecting']:.0%} updating",
    }
    found = warnings(config, rows)
    notes = Markup("").join(Markup("<li>iteration {}: {}</li>").format(*entry) for entry in found)
    body = _table(table) + (Markup("<h3>Warnings</h3><ul>{}</ul>").format(notes) if found else Markup(""))
    return Section("The run", body, "" if found else "Nothing in its diagnostics called for a warning.")


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(row["train/env_steps"], row[key]) for row in rows if key in row and "train/env_steps" in row]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return points
    return [(float(x), float(y)) for x, y in (part.mean(axis=0) for part in np.array_split(np.array(points), POINTS))]


def _table(rows: Mapping[str, str]) -> Markup:
    cells = (Markup('<tr><th style="width:220px">{}</th><td>{}</td></tr>').format(*row) for row in rows.items())
    return Markup("<table>{}</table>").format(Markup("").join(cells))


def _grid(charts: Sequence[str]) -> Markup:
    cells = (Markup("<div>{}</div>").format(Markup(chart)) for chart in charts if chart)
    return Markup('<div class="grid">{}</div>').format(Markup("").join(cells))
