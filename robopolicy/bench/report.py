"""A latency measurement on paper: table, histogram (PNG), report.html, JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from robopolicy.bench.latency import Samples
from robopolicy.bench.samples import histogram, summarize
from robopolicy.deploy.latency import PERCENTILES
from robopolicy.evaluate.record import write_json
from robopolicy.evaluate.report import Section, write_report

COLUMNS = (*PERCENTILES, "max")


def table(results: Mapping[str, Samples]) -> list[tuple[str, str, dict[str, float]]]:
    """Rows ``(contestant, part, figures)``, figures in milliseconds; ``whole`` is the way from observation to action."""
    return [
        (name, part, {key: value if key == "n" else 1e3 * value for key, value in summarize(seconds).to_json().items()})
        for name, samples in results.items()
        for part, seconds in samples.items()
    ]


def print_table(results: Mapping[str, Samples]) -> None:
    """On the terminal, in milliseconds."""
    width = max([*(len(name) for name in results), 8])
    print(f"{'ms':<{width}}  {'':<8}" + "".join(f"{column:>10}" for column in COLUMNS))
    for name, part, figures in table(results):
        label = name if part == "whole" else ""
        print(f"{label:<{width}}  {part:<8}" + "".join(f"{figures[column]:>10.3f}" for column in COLUMNS))


def plot(samples: Mapping[str, np.ndarray], label: str, deadline: float | None = None) -> bytes:
    """PNG of the histograms of several samples [s], on a common logarithmic axis; ``deadline`` [s] is a line."""
    from matplotlib.figure import Figure

    shown = {name: 1e3 * values for name, values in samples.items()}
    low, high = min(values.min() for values in shown.values()), max(values.max() for values in shown.values())
    figure = Figure(figsize=(7.2, 1.2 + 1.3 * len(shown)), dpi=110, layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(len(shown), 1, sharex=True)))
    for ax, (name, values) in zip(axes, shown.items(), strict=True):
        found = histogram(values, low=low, high=high)
        ax.stairs(found.counts, found.edges, fill=True, alpha=0.75)
        for key, style in (("p50", "-"), ("p99", "--")):
            ax.axvline(summarize(values).percentiles[key], color="black", linestyle=style, linewidth=0.9)
        if deadline is not None and 1e3 * deadline <= 3 * high:
            ax.axvline(1e3 * deadline, color="tab:red", linewidth=1.2)
        ax.set(xscale="log", yscale="symlog", ylabel="count")
        ax.set_title(name, fontsize=9, loc="left")
    axes[-1].set_xlabel(f"{label} [ms]; solid p50, dashed p99" + ("" if deadline is None else ", red the deadline"))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write(
    folder: Path, title: str, results: Mapping[str, Samples], document: Mapping[str, Any], deadline: float | None = None
) -> Path:
    """Write ``latency.json``, ``latency.png`` and ``report.html`` into ``folder``. Returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(results)
    figures: dict[str, dict[str, Any]] = {}
    for name, part, values in rows:
        figures.setdefault(name, {})[part] = values
    samples = {name: [round(1e3 * s, 5) for s in parts["whole"].tolist()] for name, parts in results.items()}
    write_json(folder / "latency.json", {**document, "milliseconds": figures, "whole_ms": samples})
    png = plot({name: parts["whole"] for name, parts in results.items()}, "from observation to action", deadline)
    (folder / "latency.png").write_bytes(png)
    head = "".join(f'<th class="n">{column}</th>' for column in COLUMNS)
    body = "".join(
        f"<tr><td>{escape(name) if part == 'whole' else ''}</td><td>{part}</td>"
        + "".join(f'<td class="n">{values[column]:.3f}</td>' for column in COLUMNS)
        + "</tr>"
        for name, part, values in rows
    )
    calls = min(len(parts["whole"]) for parts in results.values())
    note = (
        f"Milliseconds, {calls} calls each after warm-ups, taking turns. 'whole' is from observations to actions in their units, "
        "'cpu' is the processor time of the same, which other work on the machine hardly changes."
    )
    sections = [
        Section(
            "From observation to action",
            Markup(f'<div class="wide"><table><tr><th></th><th></th>{head}</tr>{body}</table></div>'),
            note,
        ),
        Section(
            "Distribution",
            _image(png),
            "Logarithmic both ways: the tail is what breaks a control loop, and the mean hides it.",
        ),
        _conditions(document),
    ]
    return write_report(folder / "report.html", title=title, evaluation=[], extra=sections)


def write_loop(folder: Path, title: str, report: Mapping[str, Any], lateness: np.ndarray, document: Mapping[str, Any]) -> Path:
    """Write ``loop.json``, ``loop.png`` (lateness of every period) and ``report.html``. Returns the path of the last."""
    from robopolicy.bench.loop import rows_of

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "loop.json", _finite({"schema_version": 1, **document, "report": report}))
    png = plot({"start of every period": np.maximum(lateness, 1e-6)}, "late")
    (folder / "loop.png").write_bytes(png)
    head = "".join(f'<th class="n">{column}</th>' for column in COLUMNS)
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f'<td class="n">{figures[column]:.3f}</td>' for column in COLUMNS) + "</tr>"
        for name, figures in rows_of(report)
    )
    others = {k: v for k, v in report.items() if not k.endswith("_ms")}
    rest = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in others.items())
    sections = [
        Section("Timing [ms]", Markup(f'<div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div>')),
        Section("Distribution", _image(png)),
        Section("Periods, plans, smoothness", Markup(f'<div class="wide"><table>{rest}</table></div>')),
        _conditions(document),
    ]
    return write_report(folder / "report.html", title=title, evaluation=[], extra=sections)


def _finite(value: Any) -> Any:
    """With None for what is not a number: percentiles of nothing."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _image(png: bytes) -> Markup:
    return Markup(f'<img style="max-width:100%" alt="histograms" src="data:image/png;base64,{base64.b64encode(png).decode()}">')


def _conditions(document: Mapping[str, Any]) -> Section:
    facts = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in _facts(document))
    return Section("Conditions", Markup(f'<div class="wide"><table>{facts}</table></div>'))


def _facts(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The conditions as rows: the state of the machine at start and end, and the settings."""
    started, ended = document["started"], document["ended"]
    kept = [(key, started[key]) for key in ("cpu", "cpus", "kernel", "preemption", "governor", "affinity", "scheduler", "git")]
    versions = ", ".join(f"{name} {version}" for name, version in document["runtimes"].items())
    return [
        *document["settings"].items(),
        ("load at start, end", f"{started['load'][0]}, {ended['load'][0]}"),
        *kept,
        ("versions", f"python {started['python']}, {versions}"),
    ]
