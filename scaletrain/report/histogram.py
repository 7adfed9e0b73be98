"""How often things occur, as bars: binned, as inline SVG that keeps its text size at any width, and as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from scaletrain.report.content import Histogram
from scaletrain.report.markup import Markup, element
from scaletrain.report.scale import fitted, short

HEIGHT = 200
"""Of the plot, in pixels."""
_LETTER = 6.6  # pixels that a letter of an axis label takes at most
_GAP = 0.12
"""Share of a bar's place that stays free."""
_BLOCKS = " \N{LEFT ONE EIGHTH BLOCK}\N{LEFT ONE QUARTER BLOCK}\N{LEFT THREE EIGHTHS BLOCK}\N{LEFT HALF BLOCK}" + (
    "\N{LEFT FIVE EIGHTHS BLOCK}\N{LEFT THREE QUARTERS BLOCK}\N{LEFT SEVEN EIGHTHS BLOCK}\N{FULL BLOCK}"
)


def by_width(counts: Mapping[int, int], bars: int) -> tuple[tuple[str, int], ...]:
    """``counts`` of whole numbers from 1 on, in at most ``bars`` bars of equal width; ``'1-8'`` -> how many."""
    most = max(1, *counts, 1)
    width = -(-most // bars)
    found = [0] * -(-most // width)
    for value, count in counts.items():
        found[max(value - 1, 0) // width] += count
    return tuple((_range(k * width + 1, min((k + 1) * width, most)), count) for k, count in enumerate(found))


def by_power(counts: Mapping[int, int], base: int, *, none: str) -> tuple[tuple[str, int], ...]:
    """``counts`` of whole numbers in bars from each power of ``base`` to the next; 0 has its own, called ``none``."""
    found, below = {none: counts.get(0, 0)}, 1
    while below <= max(counts, default=0):
        found[_range(below, below * base - 1)] = sum(n for value, n in counts.items() if below <= value < below * base)
        below *= base
    return tuple(found.items())


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def bar_lines(histogram: Histogram, width: int = 40) -> Iterator[str]:
    """The bars as text, the longest ``width`` letters long."""
    most = max((count for _, count in histogram.bars), default=0) or 1
    room = max(len(label) for label, _ in histogram.bars)
    for label, count in histogram.bars:
        eighths = -(-8 * width * count // most)  # what is there at all is seen
        bar = _BLOCKS[8] * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")
        yield f"{label:>{room}} {bar}{' ' if bar else ''}{count:,}"


def histogram_figure(histogram: Histogram) -> Markup:
    """A ``figure`` with title, bars and a table of the same numbers; a line of text where nothing was counted."""
    title = element("figcaption", element("strong", histogram.title), " ", element("span", histogram.unit, class_="unit"))
    if not any(count for _, count in histogram.bars):
        return element("figure", title, element("p", "nothing to count", class_="nothing"), class_="chart")
    return element("figure", title, _picture(histogram), _table(histogram), class_="chart")


def _picture(histogram: Histogram) -> Markup:
    y = fitted(0.0, float(max(count for _, count in histogram.bars)), 5)
    left = 14 + round(_LETTER * max(map(len, y.labels)))
    grid = []
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = round(HEIGHT * (1 - y.share(tick)), 1)
        grid.append(element("line", x1=0, x2="100%", y1=at, y2=at, class_="grid"))
        grid.append(element("text", label, x=0, dx=-8, y=at, dy="0.35em", text_anchor="end"))
    return element(
        "svg",
        *grid,
        *_bars(histogram.bars, [HEIGHT * y.share(count) for _, count in histogram.bars]),
        element("text", histogram.x_name, x="100%", y=HEIGHT + 38, text_anchor="end"),
        role="img",
        aria_label=_spoken(histogram),
        height=HEIGHT,
        style=f"width:calc(100% - {left + 22}px);margin-left:{left}px",
    )


def _bars(bars: Sequence[tuple[str, int]], heights: Sequence[float]) -> Iterator[Markup]:
    """Each bar, its first number below it where there is room, and what it says to a pointer over its whole place."""
    place = 100 / len(bars)
    stride = -(-len(bars) * max(len(label.split("-")[0]) for label, _ in bars) // 44)
    for number, ((label, count), height) in enumerate(zip(bars, heights, strict=True)):
        x, width = f"{(number + _GAP / 2) * place:.2f}%", f"{(1 - _GAP) * place:.2f}%"
        drawn = max(height, 1.0) if count else 0.0
        yield element("rect", x=x, width=width, y=round(HEIGHT - drawn, 1), height=round(drawn, 1), class_="bar c0")
        said = element("title", f"{label}: {count:,}")
        yield element("rect", said, x=f"{number * place:.2f}%", width=f"{place:.2f}%", height=HEIGHT, class_="strip")
        if number % stride == 0:
            middle = f"{(number + 0.5) * place:.2f}%"
            yield element("text", label.split("-")[0], x=middle, y=HEIGHT + 18, text_anchor="middle")


def _table(histogram: Histogram) -> Markup:
    rows = (element("tr", element("th", label, scope="row"), element("td", f"{count:,}")) for label, count in histogram.bars)
    head = element("tr", element("th", histogram.x_name), element("th", histogram.unit, scope="col"))
    table = element("table", element("thead", head), element("tbody", *rows), class_="figures")
    return element("details", element("summary", "as a table"), element("div", table, class_="scroll"), class_="numbers")


def _spoken(histogram: Histogram) -> str:
    label, count = max(histogram.bars, key=lambda bar: bar[1])
    return f"{histogram.title} ({histogram.unit}) over {histogram.x_name}. Most, {short(count)}, at {label}."
