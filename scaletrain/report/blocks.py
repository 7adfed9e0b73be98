"""Blocks of a page as HTML: figures, heat map, metrics, verdicts, tables, folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

from scaletrain.report.chart import chart_figure
from scaletrain.report.content import (
    Block,
    Charts,
    Fact,
    Facts,
    Fold,
    GateRow,
    HeatMap,
    Histograms,
    Judgement,
    Metrics,
    Passage,
    Table,
    Tone,
    Word,
)
from scaletrain.report.gate import COLUMNS
from scaletrain.report.histogram import histogram_figure
from scaletrain.report.markup import Markup, cut, element, join
from scaletrain.report.scale import fixed, short

SIGNS: dict[Tone, str] = {
    "good": "\N{CHECK MARK}",
    "bad": "\N{MULTIPLICATION X}",
    "open": "?",
    "plain": "\N{BULLET}",
}
DEEP_FROM = 0.62
"""Value of a heat map's cell from which its number is written for a deep ground: there both ways have the same contrast."""


def block(content: Block) -> Markup:
    """Any block."""
    match content:
        case Facts():
            return _facts(content.facts)
        case Charts():
            return element("div", *map(chart_figure, content.charts), class_="charts")
        case Histograms():
            return element("div", *map(histogram_figure, content.histograms), class_="charts")
        case HeatMap():
            return _heat_map(content)
        case Metrics():
            return _metrics(content)
        case Judgement():
            return _judgement(content)
        case Table():
            return _table(content)
        case Passage():
            return element("pre" if content.verbatim else "p", content.text)
        case Fold():
            title = [element("span", content.title), *([" ", word(content.word)] if content.word else [])]
            return element("details", element("summary", *title), *map(block, content.blocks), open=content.opened, class_="fold")
        case _:
            assert_never(content)


def word(state: Word) -> Markup:
    """A state as a small label."""
    sign = element("span", SIGNS[state.tone], aria_hidden="true")
    return element("span", sign, " ", state.text, class_=f"word {state.tone}")


def _facts(facts: Sequence[Fact]) -> Markup:
    def entry(fact: Fact) -> Markup:
        note = element("dd", cut(fact.note), class_="note") if fact.note else Markup()
        return element("div", element("dt", fact.name), element("dd", cut(fact.value)), note)

    return element("dl", *map(entry, facts), class_="facts")


def _caption(text: str) -> Markup:
    """What a table shows; above it rather than in it, where it would be broken to the table's width."""
    return element("p", text, class_="caption")


def _scrolled(name: str, table: Markup) -> Markup:
    """A table that may be wider than the page; with a name and in the tab order, so that the keyboard can scroll it."""
    return element("div", table, class_="scroll", role="region", aria_label=name, tabindex=0)


# ---------------------------------------------------------------------------------------------------------------------- heat map


def _heat_map(heat: HeatMap) -> Markup:
    columns = (element("th", element("span", name), scope="col", title=name) for name in heat.columns)
    head = element("tr", element("th", heat.corner, class_="corner"), *columns)
    body = (
        element("tr", element("th", name, scope="row", title=name), *_heat_cells(name, heat.columns, values))
        for name, values in zip(heat.rows, heat.cells, strict=True)
    )
    table = element("table", element("thead", head), element("tbody", *body), class_="heat")
    return join(_caption(heat.caption), _scrolled(heat.caption, table))


def _heat_cells(row: str, columns: Sequence[str], values: Sequence[float | None]) -> Iterator[Markup]:
    for position, column in enumerate(columns):
        value = values[position] if position < len(values) else None
        if value is None:
            yield element("td", class_="none")
            continue
        shade = min(max(value, 0.0), 1.0)
        number = element("data", fixed(value), value=repr(value))
        style, deep = f"--shade:{100 * shade:.1f}%", "deep" if shade >= DEEP_FROM else None
        yield element("td", number, style=style, class_=deep, title=f"{row}, on {column}: {value:.4f}")


def _metrics(metrics: Metrics) -> Markup:
    rows = (
        element(
            "tr",
            element("th", metric.name, scope="row"),
            element("td", fixed(metric.value, 4), class_="figure"),
            element("td", element("code", metric.formula)),
        )
        for metric in metrics.metrics
    )
    head = element("tr", *(element("th", name, scope="col") for name in ("figure", "value", "formula")))
    table = element("table", element("thead", head), element("tbody", *rows), class_="metrics")
    return join(_caption(metrics.caption), _scrolled(metrics.caption, table))


# -------------------------------------------------------------------------------------------------------------- tables, verdicts


def _table(table: Table) -> Markup:
    def cell(name: str, value: str | Word) -> Markup:
        shown = word(value) if isinstance(value, Word) else _fit(value)
        return element("td", shown, class_="figure" if name in table.figures else None)

    head = element("tr", *(element("th", name, scope="col", class_=_figure(name, table)) for name in table.header))
    rows = (element("tr", *map(cell, table.header, row)) for row in table.rows)
    whole = element("table", element("thead", head), element("tbody", *rows))
    return _scrolled(table.caption, whole)


def _figure(name: str, table: Table) -> str | None:
    return "figure" if name in table.figures else None


def _judgement(judged: Judgement) -> Markup:
    head = element("h3", judged.candidate, " ", word(judged.verdict))
    reason = element("p", judged.reason, class_="reason")
    against = element("p", f"Compared with {judged.against}.") if judged.against else Markup()
    rows = _gate_rows(judged) if judged.rows else Markup()
    return element("article", head, reason, against, rows, class_=judged.verdict.tone)


def _gate_rows(judged: Judgement) -> Markup:
    """One row per task."""
    kinds = [None if name in ("task", "finding") else "figure" for name, _ in COLUMNS]
    pairs = zip(COLUMNS, kinds, strict=True)
    head = element("tr", *(element("th", name, scope="col", title=title, class_=kind) for (name, title), kind in pairs))
    rows = (_gate_row(row, kinds) for row in judged.rows)
    table = element("table", element("thead", head), element("tbody", *rows), class_="gate")
    return _scrolled(f"the gate on {judged.candidate}", table)


def _gate_row(row: GateRow, kinds: Sequence[str | None]) -> Markup:
    examples, lost, gained, uses = (short(count) for count in (row.examples, row.lost, row.gained, row.uses))
    shares = (fixed(share) for share in (row.drop, row.limit, row.accuracy, row.floor))
    found = join(word(row.outcome), " ", row.reason.removeprefix(f"{row.outcome.text}, "))
    values = (examples, lost, gained, *shares, short(row.p_held, 2), short(row.p_broken, 2), uses, found)
    cells = (element("td", value, class_=kind) for value, kind in zip(values, kinds[1:], strict=True))
    return element("tr", element("th", cut(row.task), scope="row"), *cells)


def _fit(text: str) -> Markup:
    """Text in a cell that is as wide as the text is long, up to a point, and breaks only there."""
    return element("span", text, class_="fit long" if len(text) > 60 else "fit")
