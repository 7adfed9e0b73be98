"""Curves as inline SVG that keeps its text size at any width: x in shares of the plot, y in pixels.

A curve of many points is the mean of each bin with a band from its lowest to its highest value. Strips over the plot show what
lies under them on hover (``<title>``: no script). A table with the same numbers stands behind a fold.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from scaletrain.report.bins import Bin, binned, within
from scaletrain.report.content import Chart, Series
from scaletrain.report.markup import Markup, cut, element
from scaletrain.report.scale import Axis, exact, fitted, short

BINS = 480
STRIPS = 48
"""Stretches of the x axis that answer a pointer; twice as many in a wide chart."""
ROWS = 20
"""Of the table behind a chart, at most."""
COLOURS = 6
HEIGHT = 200
"""Of the plot, in pixels."""
WIDTH = 1000
"""Of the plot, in units that the browser stretches to the width there is."""
_LETTER = 6.6  # pixels that a letter of an axis label takes at most


@dataclass(frozen=True, slots=True)
class _Plot:
    """A chart with its axes: what is drawn where."""

    chart: Chart
    x: Axis
    y: Axis

    def across(self, value: float) -> float:
        return self.x.share(value)

    def down(self, value: float) -> float:
        return HEIGHT * (1 - self.y.share(value))


HIGHLIGHT = "".join(
    f".chart:has(.key li:nth-child({n}):is(:hover,:focus)) :is(.curves>g:not(:nth-child({n})),.dot){{opacity:.1}}\n"
    for n in range(1, 33)
)
"""Style rules: a name of the key that is pointed at fades all curves but its own."""


def chart_figure(chart: Chart) -> Markup:
    """A ``figure`` with title, key, picture and table; a line of text where no value is finite."""
    bins = [binned(series.x, series.y, BINS) for series in chart.series]
    title = element("figcaption", element("strong", chart.title), " ", element("span", chart.unit, class_="unit"), _latest(chart))
    finite = [each for curve in bins for each in curve if each.finite]
    if not finite:
        return element("figure", title, element("p", "no finite value to draw", class_="nothing"), class_=_classes(chart))
    plot = _Plot(chart, _x_axis(chart), _y_axis(chart, finite))
    key = _key(chart) if len(chart.series) > 1 else Markup()
    return element("figure", title, key, _picture(plot, bins), _table(chart), class_=_classes(chart))


def _classes(chart: Chart) -> str:
    return "chart wide" if chart.wide else "chart"


def _latest(chart: Chart) -> Markup:
    """The last value, where there is one curve to have it."""
    if len(chart.series) != 1 or not chart.series[0].y:
        return Markup()
    return element("span", short(chart.series[0].y[-1]), class_="latest", title="last value")


def _x_axis(chart: Chart) -> Axis:
    if chart.places:
        ticks = tuple(map(float, range(len(chart.places))))
        return Axis(-0.5, len(ticks) - 0.5, ticks, chart.places)
    ends = [end for series in chart.series if series.x for end in (series.x[0], series.x[-1])]
    ends += [mark.x for mark in chart.marks]
    return exact(min(ends), max(ends))


def _y_axis(chart: Chart, bins: Sequence[Bin]) -> Axis:
    low, high = min(each.low for each in bins), max(each.high for each in bins)
    return fitted(low, high, 5, may_be_logarithmic=chart.may_be_logarithmic, shares=chart.shares)


# ----------------------------------------------------------------------------------------------------------------------- picture


def _picture(plot: _Plot, bins: Sequence[Sequence[Bin]]) -> Markup:
    """The plot is as large as its ``svg``; labels lie outside of that, in its margins."""
    curves = [_curve(plot, number, curve) for number, curve in enumerate(bins)]
    stretched = element(
        "svg", *curves, viewBox=f"0 0 {WIDTH} {HEIGHT}", preserveAspectRatio="none", width="100%", height=HEIGHT, class_="curves"
    )
    left = 14 + math.ceil(_LETTER * max(map(len, plot.y.labels)))
    return element(
        "svg",
        *_grid(plot),
        stretched,
        *_marks(plot),
        *_dots(plot, bins),
        *_gaps(plot, bins),
        element("text", plot.chart.x_name, x="100%", y=HEIGHT + 38, text_anchor="end"),
        *_strips(plot),
        role="img",
        aria_label=_spoken(plot.chart),
        height=HEIGHT,
        style=f"width:calc(100% - {left + 22}px);margin-left:{left}px",
    )


def _grid(plot: _Plot) -> Iterator[Markup]:
    for tick, label in zip(plot.y.ticks, plot.y.labels, strict=True):
        y = round(plot.down(tick), 1)
        yield element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid")
        yield element("text", label, x=0, dx=-8, y=y, dy="0.35em", text_anchor="end")
    stride = 1 + (len(plot.x.ticks) - 1) // 16
    letters = max(4, 42 // len(plot.x.ticks))
    for tick, label in list(zip(plot.x.ticks, plot.x.labels, strict=True))[::stride]:
        x = _percent(plot.across(tick))
        yield element("line", x1=x, x2=x, y1=HEIGHT, y2=HEIGHT + 5, class_="tick")
        yield element("text", label[:letters] if plot.chart.places else label, x=x, y=HEIGHT + 20, text_anchor="middle")


def _curve(plot: _Plot, number: int, bins: Sequence[Bin]) -> Markup:
    """Band and line of one series, broken where a bin has no finite value."""
    band, line = "", ""
    for run in _segments(bins):
        x = [f"{WIDTH * plot.across(each.middle):.1f}" for each in run]
        line += "M" + "L".join(f"{at} {plot.down(each.mean):.1f}" for at, each in zip(x, run, strict=True))
        if any(each.low < each.high for each in run):
            there = [f"{at} {plot.down(each.high):.1f}" for at, each in zip(x, run, strict=True)]
            back = [f"{at} {plot.down(each.low):.1f}" for at, each in zip(x, run, strict=True)]
            band += "M" + "L".join(there + back[::-1]) + "Z"
    shade = element("path", d=band, class_="band") if band else Markup()
    return element("g", shade, element("path", d=line, class_="line"), class_=_style(plot.chart, number))


def _segments(bins: Sequence[Bin]) -> list[list[Bin]]:
    """What is drawn in one stroke: bins in a row that have a finite value."""
    return [list(group) for drawable, group in groupby(bins, key=lambda each: each.finite > 0) if drawable]


def _dots(plot: _Plot, bins: Sequence[Sequence[Bin]]) -> Iterator[Markup]:
    """Of measurements, and of any value with none beside it, of which a line shows nothing."""
    for number, (series, curve) in enumerate(zip(plot.chart.series, bins, strict=True)):
        all_of_them = series.dotted and len(curve) <= 2 * STRIPS
        for each in (each for run in _segments(curve) if all_of_them or len(run) == 1 for each in run):
            x, y = _percent(plot.across(each.middle)), round(plot.down(each.mean), 1)
            yield element("circle", cx=x, cy=y, r=3, class_=f"dot {_style(plot.chart, number)}")


def _gaps(plot: _Plot, bins: Sequence[Sequence[Bin]]) -> Iterator[Markup]:
    """A red tick on the axis wherever a value is not finite, alone or among others."""
    for each in sorted({each.middle for curve in bins for each in curve if each.finite < each.points}):
        x = _percent(plot.across(each))
        yield element("line", x1=x, x2=x, y1=HEIGHT - 7, y2=HEIGHT, class_="gap")


def _marks(plot: _Plot) -> Iterator[Markup]:
    crowded = len(plot.chart.marks) > 24
    for mark in plot.chart.marks:
        x = _percent(plot.across(mark.x))
        line = element("line", x1=x, x2=x, y1=0, y2=HEIGHT)
        letters = Markup() if crowded else element("text", mark.letters[:4], x=x, dx=4, y=10)
        yield element("g", line, letters, class_="mark")


def _strips(plot: _Plot) -> Iterator[Markup]:
    """Stretches of the x axis, each with what lies in it as the text that appears on hover."""
    chart = plot.chart
    count = len(chart.places) or (2 * STRIPS if chart.wide else STRIPS)
    for k, (first, last) in enumerate(_stretches(plot.x.low, plot.x.high, count)):
        marks = [mark.meaning for mark in chart.marks if first <= mark.x <= last]
        parts = [(series, within(series.x, series.y, first, last)) for series in chart.series]
        found = [(series, part) for series, part in parts if part]
        if found or marks:
            where = [f"{chart.x_name} {_where(chart, [part for _, part in found])}"] if found else []
            said = "\n".join([*where, *(f"{series.name}: {_summary(series, part)}" for series, part in found), *marks])
            place = {"x": _percent(k / count), "width": _percent(1 / count)}
            yield element("rect", element("title", said), **place, height=HEIGHT, class_="strip")


def _stretches(low: float, high: float, count: int) -> Iterator[tuple[float, float]]:
    """``count`` stretches from ``low`` to ``high``, both ends of each included and none in two of them."""
    edges = [*(low + (high - low) * k / count for k in range(count)), high]
    for first, last in pairwise(edges):
        yield first, last if last == high else math.nextafter(last, -math.inf)


def _where(chart: Chart, parts: Sequence[Bin]) -> str:
    """``12``, or ``12 to 24``, or the name of the place."""
    first, last = min(part.first for part in parts), max(part.last for part in parts)
    if chart.places:
        return chart.places[round(first)]
    return f"{first:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}"


def _summary(series: Series, part: Bin) -> str:
    """``2.31``, or with its spread ``2.31 (2.1 to 2.5)``; says how many were not finite, and what is noted on a single one."""
    spread = f" ({short(part.low)} to {short(part.high)})" if part.low < part.high else ""
    lost = part.points - part.finite
    missing = f", {lost} of {part.points} not finite" if lost and part.points > 1 else ""
    note = f", {series.notes[bisect_left(series.x, part.first)]}" if series.notes and part.points == 1 else ""
    return f"{short(part.mean)}{spread}{missing}{note}"


# ----------------------------------------------------------------------------------------------------------- key, table, in words


def _key(chart: Chart) -> Markup:
    """Which line is which: a sample of each with its name."""
    items = []
    for number, series in enumerate(chart.series):
        line = element("line", x1=1, x2=21, y1=6, y2=6, class_="line")
        dot = element("circle", cx=11, cy=6, r=3, class_="dot") if series.dotted else Markup()
        swatch = element("svg", element("g", line, dot, class_=_style(chart, number)), width=22, height=12, aria_hidden="true")
        items.append(element("li", swatch, " ", cut(series.name), tabindex=0))
    return element("ul", *items, class_="key")


def _table(chart: Chart) -> Markup:
    """The numbers of the picture in at most ``ROWS`` rows; where a row stands for many values, mean and extremes."""
    points = sorted({x for series in chart.series for x in series.x})
    several = len(points) > ROWS
    stretches = _stretches(points[0], points[-1], ROWS) if several else zip(points, points, strict=True)
    rows = []
    for first, last in stretches:
        parts = [within(series.x, series.y, first, last) for series in chart.series]
        found = [part for part in parts if part]
        if found:
            cells = [
                element("td", _summary(series, part) if part else "") for series, part in zip(chart.series, parts, strict=True)
            ]
            rows.append(element("tr", element("th", _where(chart, found), scope="row"), *cells))
    head = element("tr", element("th", chart.x_name), *(element("th", cut(series.name), scope="col") for series in chart.series))
    table = element("table", element("thead", head), element("tbody", *rows), class_="figures")
    return element("details", element("summary", "as a table"), element("div", table, class_="scroll"), class_="numbers")


def _spoken(chart: Chart) -> str:
    """The picture in a sentence per curve."""
    said = [f"{chart.title} ({chart.unit}) over {chart.x_name}."]
    for series in chart.series:
        whole = within(series.x, series.y, -math.inf, math.inf)
        if whole and whole.finite:
            ends = (within(series.x, series.y, end, end) for end in (series.x[0], series.x[-1]))
            first, last = (short(end.mean) if end else "" for end in ends)
            said.append(f"{series.name}: from {first} to {last}, lowest {short(whole.low)}, highest {short(whole.high)}.")
    return " ".join(said)


def _style(chart: Chart, number: int) -> str:
    """Colour and, where those are used up, dashes of the curve with this number."""
    if chart.series[number].leading:
        return "leading"
    place = sum(not series.leading for series in chart.series[:number])
    return f"c{place % COLOURS} d{min(place // COLOURS, 3)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
