"""Bars hold every count once, and are drawn and written as long as they are."""

from __future__ import annotations

import pytest

from scaletrain.report.blocks import block
from scaletrain.report.content import Histogram, Histograms
from scaletrain.report.histogram import HEIGHT, bar_lines, by_power, by_width
from tests.unit.report.dom import cells, parse

BARS = (("1-8", 4), ("9-16", 0), ("17-20", 1))


def histogram(*bars: tuple[str, int]) -> Histogram:
    return Histogram(title="Length", unit="chunks", x_name="tokens <b>", bars=bars or BARS)


@pytest.mark.parametrize(
    ("counts", "bars", "expected"),
    [
        ({1: 3, 8: 1, 9: 2, 20: 5}, 3, (("1-7", 3), ("8-14", 3), ("15-20", 5))),
        ({1: 3, 2: 1}, 16, (("1", 3), ("2", 1))),
        ({}, 4, (("1", 0),)),
        ({0: 2, 5: 1}, 2, (("1-3", 2), ("4-5", 1))),
    ],
)
def test_bars_of_equal_width(counts: dict[int, int], bars: int, expected: object) -> None:
    assert by_width(counts, bars) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({0: 7, 1: 2, 3: 1, 4: 5, 16: 1}, (("never", 7), ("1-3", 3), ("4-15", 5), ("16-63", 1))),
        (
            {1023: 1, 1024: 2},
            (("never", 0), ("1-3", 0), ("4-15", 0), ("16-63", 0), ("64-255", 0), ("256-1,023", 1), ("1,024-4,095", 2)),
        ),
        ({}, (("never", 0),)),
    ],
)
def test_bars_by_powers(counts: dict[int, int], expected: object) -> None:
    assert by_power(counts, 4, none="never") == expected


def test_bars_in_text_are_in_proportion_and_none_that_counts_is_invisible() -> None:
    found = list(bar_lines(histogram(("1-8", 160), ("9-16", 0), ("17-20", 1), ("21", 80)), width=4))
    assert found == ["  1-8 ████ 160", " 9-16 0", "17-20 ▏ 1", "   21 ██ 80"]


def test_the_picture_has_a_bar_of_its_height_for_each_count_and_says_which() -> None:
    figure = parse(block(Histograms(histograms=(histogram(),)))).one("figure")
    heights = [float(bar.get("height")) for bar in figure.all("rect", "bar")]
    assert heights == [HEIGHT, 0, HEIGHT / 4]
    assert [strip.text for strip in figure.all("rect", "strip")] == ["1-8: 4", "9-16: 0", "17-20: 1"]
    assert cells(figure.one("table")) == [["tokens <b>", "chunks"], ["1-8", "4"], ["9-16", "0"], ["17-20", "1"]]
    assert figure.one("svg").get("aria-label") == "Length (chunks) over tokens <b>. Most, 4, at 1-8."


def test_nothing_to_count_is_said() -> None:
    figure = parse(block(Histograms(histograms=(histogram(("1", 0)),)))).one("figure")
    assert (figure.all("svg"), figure.one("p").text) == ([], "nothing to count")
