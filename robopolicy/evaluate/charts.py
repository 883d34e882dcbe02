"""Small charts as SVG text, drawn by hand so that they take the colours of the page around them, light or dark.

Classes used: ``axis`` (lines), ``tick`` and ``label`` (text), ``s0`` and ``s1`` (series), ``ref`` (reference line), ``band``
(shade), ``note`` (muted text).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

import numpy as np

from robopolicy.evaluate.stats import Interval

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    references: Mapping[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
    band: Sequence[tuple[float, float, float]] = (),
) -> str:
    """Lines through ``(x, y)`` points; with ``log`` the y axis is logarithmic. ``references`` are labelled horizontal lines,
    ``band`` of ``(x, low, high)`` is a shade behind the lines, within ``y_range``."""
    references = references or {}
    points = {
        name: np.array([(x, y) for x, y in rows if math.isfinite(y) and (y > 0 or not log)]) for name, rows in series.items()
    }
    points = {name: p for name, p in points.items() if len(p)}
    if not points:
        return ""
    every = np.concatenate(list(points.values()))
    x_low, x_high = float(every[:, 0].min()), float(every[:, 0].max())
    low, high = y_range or (min([*every[:, 1], *references.values()]), max([*every[:, 1], *references.values()]))
    low, high = (math.log10(low), math.log10(high)) if log else (low, high)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    if x_high == x_low:
        x_high = x_low + 1
    y_ticks = _log_ticks(low, high) if log else [(v, _number(v)) for v in _ticks(low, high)]

    def x_of(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        value = math.log10(y) if log else y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = _frame(
        [(x_of(v), _number(v)) for v in _ticks(x_low, x_high)], [(y_of(v), text) for v, text in y_ticks], x_label, y_label
    )
    for text, value in references.items():
        y = y_of(value)
        parts.append(f'<line class="ref" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="note" x="{WIDTH - RIGHT - 4}" y="{y - 4:.1f}" text-anchor="end">{escape(text)}</text>')
    if band:
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<polygon class="band" points="{" ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in edge)}"/>')
    for index, (name, rows) in enumerate(points.items()):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in _thin(rows))
        parts.append(f'<polyline class="s{index % 2}" points="{path}"/>')
        if len(rows) <= 40:
            parts += [f'<circle class="s{index % 2}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6"/>' for x, y in rows]
        if len(points) > 1:
            parts.append(f'<text class="key k{index % 2}" x="{LEFT + 8}" y="{TOP + 12 + 15 * index}">{escape(name)}</text>')
    return _svg(parts, HEIGHT, y_label)


def histogram(values: np.ndarray, *, x_label: str, bins: int = 20) -> str:
    """How many episodes fall into each of ``bins`` equal ranges."""
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0  # shares and scores are read against their full range
    elif high == low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    top = int(counts.max())
    span, rise = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = _frame(
        [(LEFT + (v - low) / (high - low) * span, _number(v)) for v in _ticks(low, high)],
        [(HEIGHT - BOTTOM - v / top * rise, _number(v)) for v in _ticks(0, top) if v == int(v)],
        x_label,
        "episodes",
    )
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        x = LEFT + (left - low) / (high - low) * span
        width = (right - left) / (high - low) * span
        tall = count / top * rise
        title = f"<title>{_number(left)} to {_number(right)}: {count}</title>"
        parts.append(
            f'<rect class="s0" x="{x + 0.75:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{width - 1.5:.1f}" height="{tall:.1f}">'
            f"{title}</rect>"
        )
    return _svg(parts, HEIGHT, "histogram")


def intervals(rows: Sequence[tuple[str, Interval]], *, x_label: str, zero: bool = False) -> str:
    """One dot with its interval per row, on a common axis; ``zero`` draws a reference line at 0 (for differences)."""
    height = TOP + 34 * len(rows) + BOTTOM
    label_width = 24 + 7 * min(16, max(len(name) for name, _ in rows))
    low, high = min(i.low for _, i in rows), max(i.high for _, i in rows)
    margin = 0.06 * max(high - low, 1e-3)
    low, high = (min(low, 0.0) - margin, max(high, 0.0) + margin) if zero else (low - margin, high + margin)

    def x_of(x: float) -> float:
        return label_width + (x - low) / (high - low) * (WIDTH - label_width - RIGHT)

    base = height - BOTTOM
    parts = [f'<line class="axis" x1="{label_width}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for v in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{x_of(v):.1f}" x2="{x_of(v):.1f}" y1="{TOP}" y2="{base}"/>')
        parts.append(f'<text class="tick" x="{x_of(v):.1f}" y="{base + 16}" text-anchor="middle">{_number(v)}</text>')
    parts.append(
        f'<text class="label" x="{(label_width + WIDTH - RIGHT) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    if zero:
        parts.append(f'<line class="ref" x1="{x_of(0):.1f}" x2="{x_of(0):.1f}" y1="{TOP}" y2="{base}"/>')
    for index, (name, interval) in enumerate(rows):
        y = TOP + 34 * index + 17
        parts.append(f'<text class="tick" x="{label_width - 10}" y="{y + 4}" text-anchor="end">{escape(_clip(name, 16))}</text>')
        parts.append(f'<line class="bar s0" x1="{x_of(interval.low):.1f}" x2="{x_of(interval.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="s0" cx="{x_of(interval.mean):.1f}" cy="{y}" r="5"><title>{interval}</title></circle>')
    return _svg(parts, height, x_label)


def _frame(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> list[str]:
    """Grid, axes and labels of a chart of the standard size; ticks as ``(position in pixels, text)``."""
    base = HEIGHT - BOTTOM
    parts = []
    for y, text in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x, text in x_ticks:
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + base) / 2
    parts.append(
        f'<text class="label" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return parts


def _svg(parts: Sequence[str], height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers within ``[low, high]``."""
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Values and texts for a logarithmic axis over exponents ``[low, high]``: decades, and 2 and 5 between if few."""
    mantissas = (1,) if high - low > 2.5 else (1, 2, 5)
    values = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in mantissas]
    return [(v, _number(v)) for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]


def _number(value: float) -> str:
    if abs(value) >= 1e4:
        return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k"
    return f"{value:.3g}" if 0 < abs(value) < 1000 else f"{value:g}"


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-(length - 1) :]


def _thin(rows: np.ndarray, limit: int = 400) -> np.ndarray:
    """At most ``limit`` points: a curve of thousands of steps averages neighbours, which is also how noise becomes readable."""
    return rows if len(rows) <= limit else np.array([part.mean(axis=0) for part in np.array_split(rows, limit)])
