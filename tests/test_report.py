"""The report holds everything it needs, and the charts stay within their frames."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from robopolicy.evaluate.charts import HEIGHT, WIDTH, histogram, intervals, line_chart
from robopolicy.evaluate.record import Episode, Evaluation, Film, Settings, TaskRecord
from robopolicy.evaluate.report import Section, reproduce, write_report
from robopolicy.evaluate.stats import Interval

VOID = {"meta", "br", "img"}  # in SVG, elements without content close themselves


class Balanced(HTMLParser):
    """Collects tags, text and attributes; fails on tags that close what is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    return parser


def evaluation(policy="outputs/mine", n=40, task_args=None):
    rng = np.random.default_rng(0)
    return Evaluation(
        policy=policy,
        task=TaskRecord(name="pusht", args=task_args or {}),
        settings=Settings(noise_seed=3, n_obs_steps=2, n_action_steps=8, num_envs=7, num_workers=0, threads=1),
        provenance={"git": "abc", "versions": {"torch": "2"}, "load": [1.0, 1.0, 1.0]},
        seconds=2.0,
        episodes=tuple(
            Episode(seed=200_000 + i, success=bool(s), max_reward=float(r), total_reward=2.0, length=9)
            for i, (s, r) in enumerate(zip(rng.random(n) < 0.7, rng.random(n), strict=True))
        ),
    )


def test_report_needs_nothing_from_outside_and_shows_everything(tmp_path):
    e = evaluation()
    films = [Film(e.episodes[0], b"first"), Film(e.episodes[1], b"second")]
    path = write_report(
        tmp_path / "deep" / "report.html",
        title="mine on pusht",
        evaluation=e,
        learning_curve={"training loss": [(i, 1 / (i + 1)) for i in range(900)], "success": [(0, 0.1), (10, 0.7)]},
        config={"train": {"lr": 0.123}},
        films=films,
        extra=[Section("Hand-made", Markup("<p>body</p>"), "a note")],
    )
    html = path.read_text()
    page = parsed(html)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    outside = [v for k, v in page.attributes if k in ("src", "href") and not v.startswith("data:")]
    assert outside == []
    sources = [v for k, v in page.attributes if k == "src"]
    assert [base64.b64decode(s.partition(",")[2]) for s in sources] == [b"first", b"second"]
    for text in (
        "mine on pusht",
        f"{100 * e.success.mean:.1f} %",
        f"{e.max_reward.mean:.3f}",
        "0.123",
        "Hand-made",
        "a note",
        "abc",
    ):
        assert text in page.text
    assert page.text.count("20003") >= 10  # a row for every seed
    assert page.tags.count("polyline") == 2
    assert "prefers-color-scheme: dark" in html


def test_report_of_several_policies_escapes_their_names(tmp_path):
    several = [evaluation("<script>alert(1)</script>"), evaluation("b&b")]
    html = write_report(tmp_path / "r.html", title="<b>both</b>", evaluation=several).read_text()
    assert "script" not in parsed(html).tags
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;both" in html


def test_report_without_curve_config_or_films_leaves_their_sections_out(tmp_path):
    html = write_report(tmp_path / "r.html", title="t", evaluation=evaluation()).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == ["Episodes", "How it was made"]


def test_the_command_that_repeats_an_evaluation():
    command = reproduce(evaluation(task_args={"obs": "state"}))
    expected = (
        "robopolicy eval outputs/mine --task pusht --task-arg obs=state --episodes 40 --seeds 200000 --noise-seed 3 --num-envs 7"
    )
    assert command == expected
    assert reproduce(evaluation().restricted({200_000, 200_002})) == ""


def coordinates(svg):
    for pair in re.findall(r"([-\d.]+),([-\d.]+)", " ".join(re.findall(r'points="(.*?)"', svg))):
        yield float(pair[0]), float(pair[1])


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=30), st.booleans())
def test_lines_stay_within_their_chart(rows, log):
    rows = sorted(rows)
    if log:
        rows = [(x, abs(y) + 1e-3) for x, y in rows]
    svg = line_chart({"a": rows}, x_label="x", y_label="<y>", log=log)
    parsed(svg)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in coordinates(svg))


def test_a_curve_without_a_finite_point_draws_nothing():
    assert line_chart({"loss": [(0, float("nan"))]}, x_label="x", y_label="y") == ""
    assert line_chart({"loss": [(0, 0.0)]}, x_label="x", y_label="y", log=True) == ""


@given(st.lists(finite, min_size=1, max_size=50))
def test_a_histogram_holds_every_value_once(values):
    svg = histogram(np.array(values), x_label="x")
    parsed(svg)
    counts = [int(c) for c in re.findall(r": (\d+)</title>", svg)]
    assert sum(counts) == len(values)
    assert all(float(h) <= HEIGHT for h in re.findall(r'height="([\d.]+)"', svg))


@pytest.mark.parametrize("zero", [True, False])
def test_intervals_are_drawn_in_order_even_without_width(zero):
    svg = intervals([("a", Interval(0.5, 0.5, 0.5)), ("b", Interval(0.2, 0.1, 0.4))], x_label="success", zero=zero)
    parsed(svg)
    dots = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    assert dots[1] < dots[0] <= WIDTH
