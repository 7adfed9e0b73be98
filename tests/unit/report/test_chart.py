"""Curves stand where their values are, gaps stay gaps, and everything drawn is said in words and numbers too."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from scaletrain.report.chart import BINS, HEIGHT, ROWS, STRIPS, WIDTH, chart_figure
from scaletrain.report.content import Chart, Mark, Series
from tests.unit.report.dom import Node, cells, parse

NAN = math.nan


def figure(*series: Series, **changes: object) -> Node:
    return parse(chart_figure(Chart(title="Loss", unit="nats", series=series, **changes)))  # type: ignore[arg-type]


def curve(x: list[float], y: list[float], name: str = "training", **changes: bool) -> Series:
    return Series(name=name, x=x, y=y, **changes)


def paths(node: Node, kind: str) -> list[str]:
    return [path.get("d") for path in node.all("path", kind)]


def titles(node: Node) -> list[str]:
    return [title.text for title in node.all("title")]


def test_a_curve_goes_through_its_values() -> None:
    """The axis runs from 0 to 10 and from step 0 to step 100."""
    assert paths(figure(curve([0, 50, 100], [10.0, 0.0, 5.0])), "line") == [
        f"M0.0 0.0L{WIDTH / 2:.1f} {HEIGHT:.1f}L{WIDTH:.1f} {HEIGHT / 2:.1f}"
    ]


def test_axes_have_ticks_with_labels_and_names() -> None:
    texts = [text.text for text in figure(curve([0, 400], [10.0, 0.0]), x_name="step").all("text")]
    assert texts == ["0", "5", "10", "0", "100", "200", "300", "400", "step"]


def test_what_is_not_finite_is_a_gap_and_is_marked_on_the_axis() -> None:
    node = figure(curve([0, 1, 2, 3, 4], [1.0, 2.0, NAN, math.inf, 2.0]))
    (line,) = paths(node, "line")
    assert [part.count("L") for part in line.split("M")[1:]] == [1, 0]
    assert [gap.get("x1") for gap in node.all("line", "gap")] == ["50.00%", "75.00%"]
    assert cells(node.one("table"))[3] == ["2", "not finite"]


def test_a_lost_value_among_others_is_marked_and_counted() -> None:
    """Its bin has a mean all the same."""
    x = [float(step) for step in range(10_000)]
    node = figure(curve(x, [NAN if step == 5_000 else 1.0 for step in range(10_000)]))
    (gap,) = node.all("line", "gap")
    assert float(gap.get("x1").rstrip("%")) == pytest.approx(50, abs=0.2)
    (line,) = paths(node, "line")
    assert line.count("M") == 1
    assert [title for title in titles(node) if "not finite" in title] == ["step 5,000 to 5,207\ntraining: 1, 1 of 208 not finite"]


def test_a_value_between_two_gaps_is_seen() -> None:
    node = figure(curve([0, 1, 2, 3, 4, 5], [1.0, NAN, 2.0, NAN, 1.0, 1.0]))
    assert [(dot.get("cx"), dot.get("cy"), dot.get("class")) for dot in node.all("circle")] == [
        ("0.00%", f"{HEIGHT}.0", "dot c0 d0"),
        ("40.00%", "0.0", "dot c0 d0"),
    ]


def test_a_single_step_is_a_dot_at_the_end_of_the_step_axis() -> None:
    node = figure(curve([1], [2.0]))
    assert [(dot.get("cx"), dot.get("cy")) for dot in node.all("circle")] == [("100.00%", f"{HEIGHT / 2}")]
    assert [text.text for text in node.all("text")][-3:] == ["0", "1", "step"]


@pytest.mark.parametrize(("value", "ends"), [(0.0, ("0", "1.0")), (1.0, ("0.90", "1.00")), (0.5, ("0.45", "0.55"))])
def test_the_axis_of_shares_stays_between_0_and_1(value: float, ends: tuple[str, str]) -> None:
    texts = [text.text for text in figure(curve([1], [value]), shares=True).all("text")]
    assert (texts[0], texts[-4]) == ends


def test_of_several_values_at_one_place_the_mean_is_drawn_with_a_band_around_all() -> None:
    node = figure(curve([0, 0, 0, 1, 1], [0.0, 0.4, 0.8, 0.2, 1.0], dotted=True), places=("0001-a", "0002-b"))
    (line,), (band,) = paths(node, "line"), paths(node, "band")
    assert re.findall(r" ([\d.]+)", line) == ["120.0", "80.0"]
    assert re.findall(r" ([\d.]+)", band) == ["40.0", "0.0", "160.0", "200.0"]
    assert len(node.all("circle", "dot")) == 2
    assert titles(node) == ["step 0001-a\ntraining: 0.4 (0 to 0.8)", "step 0002-b\ntraining: 0.6 (0.2 to 1)"]
    (picture,) = [svg for svg in node.all("svg") if svg.get("role") == "img"]
    assert picture.get("aria-label").endswith("training: from 0.4 to 0.6, lowest 0, highest 1.")


def test_a_value_is_told_with_its_note() -> None:
    node = figure(Series(name="lowest", x=[0, 1], y=[0.5, 0.25], notes=("text", "numbers")))
    assert [title for title in titles(node)] == ["step 0\nlowest: 0.5, text", "step 1\nlowest: 0.25, numbers"]
    assert [row[1] for row in cells(node.one("table"))[1:]] == ["0.5, text", "0.25, numbers"]


def test_the_whole_of_a_name_that_is_cut_is_shown_by_the_pointer() -> None:
    name = "n" * 64
    node = figure(curve([0, 1], [0.5, 0.25], name), curve([0, 1], [0.5, 0.25], "b"))
    assert [found.get("title") for found in node.all("span", "cut")] == [name, ""] * 2


def test_of_many_points_the_mean_is_drawn_and_a_band_to_the_extremes() -> None:
    x = [float(step) for step in range(100_000)]
    node = figure(curve(x, [0.0 if step % 2 else 10.0 for step in range(100_000)]))
    (line,), (band,) = paths(node, "line"), paths(node, "band")
    assert line.count("L") == BINS - 1
    heights = {float(y) for y in re.findall(r" (-?[\d.]+)", line)}
    assert heights <= {HEIGHT / 2 + d for d in (-0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5)}
    assert set(re.findall(r" (-?[\d.]+)", band)) == {"0.0", f"{HEIGHT:.1f}"}
    assert len(chart_figure(Chart(title="", unit="", series=(curve(x, x),)))) < 60_000


def test_every_stretch_tells_on_hover_what_lies_in_it_and_no_point_is_told_twice() -> None:
    node = figure(curve([float(step) for step in range(1, 1001)], [1.0] * 1000))
    assert len(titles(node)) == STRIPS
    ranges = [re.fullmatch(r"step ([\d,]+) to ([\d,]+)\ntraining: 1", title) for title in titles(node)]
    ends = [[int(end.replace(",", "")) for end in found.groups()] for found in ranges if found]
    assert [ends[0][0], ends[-1][1], len(ends)] == [1, 1000, STRIPS]
    assert all(after[0] == before[1] + 1 for before, after in pairwise(ends))


def test_hover_shows_every_curve_the_spread_and_what_happened() -> None:
    node = figure(
        curve([0, 1, 2], [1.0, 2.0, 3.0]),
        curve([2], [5.0], "evaluated", dotted=True),
        marks=(Mark(x=2, letters="v", meaning="continued after step 2"),),
    )
    assert titles(node)[0] == "step 0\ntraining: 1"
    assert titles(node)[-1] == "step 2\ntraining: 3\nevaluated: 5\ncontinued after step 2"


def test_what_happened_before_the_first_value_is_on_the_plot_too() -> None:
    node = figure(curve([1, 2], [1.0, 2.0]), marks=(Mark(x=0, letters="0001", meaning="0001-a begins"),))
    assert [line.get("x1") for line in node.one("g", "mark").all("line")] == ["0.00%"]
    assert paths(node, "line")[0].startswith(f"M{WIDTH / 2:.1f} ")


def test_the_table_says_in_few_rows_what_is_drawn() -> None:
    rows = cells(figure(curve([float(step) for step in range(200)], [float(step) for step in range(200)])).one("table"))
    assert rows[0] == ["step", "training"] and len(rows) == 1 + ROWS
    assert rows[1] == ["0 to 9", "4.5 (0 to 9)"] and rows[-1] == ["190 to 199", "194.5 (190 to 199)"]


def test_the_picture_has_a_sentence_for_those_who_do_not_see_it() -> None:
    (picture,) = [svg for svg in figure(curve([0, 1, 2], [3.0, 1.0, 2.0])).all("svg") if svg.get("role") == "img"]
    assert picture.get("aria-label") == "Loss (nats) over step. training: from 3 to 2, lowest 1, highest 3."


def test_curves_differ_by_colour_and_then_by_dashes_and_the_leading_one_by_itself() -> None:
    curves = [curve([0, 1], [0.0, k], f"task {k}") for k in range(1, 9)] + [curve([0, 1], [0.0, 1.0], "mean", leading=True)]
    node = figure(*curves)
    styles = [group.get("class") for group in node.one("svg", "curves").all("g")]
    assert styles == ["c0 d0", "c1 d0", "c2 d0", "c3 d0", "c4 d0", "c5 d0", "c0 d1", "c1 d1", "leading"]
    assert [item.text.strip() for item in node.one("ul", "key").all("li")] == [*(f"task {k}" for k in range(1, 9)), "mean"]
    assert [item.one("g").get("class") for item in node.one("ul", "key").all("li")] == styles


def test_a_single_curve_needs_no_key_and_shows_its_last_value() -> None:
    node = figure(curve([0, 1], [3.0, 2.5]))
    assert node.all("ul") == [] and node.one("span", "latest").text == "2.5"


def test_measurements_are_dots() -> None:
    node = figure(curve([0, 5, 10], [0.0, NAN, 10.0], dotted=True))
    assert [(dot.get("cx"), dot.get("cy")) for dot in node.all("circle")] == [("0.00%", f"{HEIGHT}.0"), ("100.00%", "0.0")]


def test_places_have_names() -> None:
    node = figure(curve([0, 1], [0.5, 0.25], "text"), places=("0001-text", "0002-numbers"), x_name="after stage")
    assert [circle.get("x1") for circle in node.all("line", "tick")] == ["25.00%", "75.00%"]
    assert titles(node) == ["after stage 0001-text\ntext: 0.5", "after stage 0002-numbers\ntext: 0.25"]
    assert [row[0] for row in cells(node.one("table"))] == ["after stage", "0001-text", "0002-numbers"]


@pytest.mark.parametrize("y", [[], [NAN, NAN]])
def test_nothing_to_draw_is_said(y: list[float]) -> None:
    node = figure(curve([float(step) for step in range(len(y))], y))
    assert node.one("p", "nothing").text == "no finite value to draw" and node.all("svg") == []


def test_names_from_strangers_stay_text() -> None:
    name = "</title><script>alert(1)</script>"
    node = figure(curve([0], [1.0], name), curve([0], [1.0], '"><img src=x>'), places=(name,))
    assert node.all("script") + node.all("img") == []
    assert node.one("ul", "key").all("li")[0].text.strip() == name
    assert titles(node)[0].splitlines()[:2] == [f"step {name}", f"{name}: 1"]
