"""Every block says what it was given, to the last digit where that counts."""

from __future__ import annotations

from scaletrain.report.blocks import DEEP_FROM, block, word
from scaletrain.report.content import (
    Fact,
    Facts,
    Fold,
    GateRow,
    HeatMap,
    Judgement,
    Metric,
    Metrics,
    Passage,
    Table,
    Word,
)
from scaletrain.report.gate import COLUMNS
from tests.unit.report.dom import cells, parse

HOSTILE = '<script>alert("1")</script>'


def test_a_heat_map_has_every_number_in_its_cell() -> None:
    results = ((0.9471234567, None), (0.25, 1 / 3))
    heat = HeatMap(caption="R", corner="after / on", rows=("0001-a", "0002-b"), columns=("a", "b"), cells=results)
    table = parse(block(heat)).one("table", "heat")
    assert cells(table) == [["after / on", "a", "b"], ["0001-a", "0.947", ""], ["0002-b", "0.250", "0.333"]]
    assert [float(number.get("value")) for number in table.all("data")] == [0.9471234567, 0.25, 1 / 3]
    assert [cell.get("title") for cell in table.all("td")] == [
        "0001-a, on a: 0.9471",
        "",
        "0002-b, on a: 0.2500",
        "0002-b, on b: 0.3333",
    ]


def test_shades_follow_the_values_and_deep_ones_are_written_on_in_the_other_colour() -> None:
    values = (-0.5, 0.0, DEEP_FROM - 0.001, DEEP_FROM, 1.0)
    heat = HeatMap(caption="R", corner="", rows=("r",), columns=tuple("abcde"), cells=(values,))
    found = parse(block(heat)).all("td")
    assert [cell.get("style") for cell in found] == [f"--shade:{shade}%" for shade in ("0.0", "0.0", "61.9", "62.0", "100.0")]
    assert [cell.get("class") for cell in found] == ["", "", "", "deep", "deep"]


def test_a_short_row_of_a_heat_map_is_filled_up() -> None:
    heat = HeatMap(caption="R", corner="", rows=("a", "b"), columns=("a", "b"), cells=((0.5,), (0.5, 0.5)))
    assert [len(row) for row in cells(parse(block(heat)))] == [3, 3, 3]


def test_a_metric_stands_beside_its_formula() -> None:
    metric = Metric(name="forgetting", value=0.175, formula="1/(T-1) sum_{i<T} (max_{t<T} R[t][i] - R[T][i])")
    shown = cells(parse(block(Metrics(caption="figures", metrics=(metric,)))))
    assert shown[1] == ["forgetting", "0.1750", metric.formula]


def test_the_gate_says_of_every_task_what_it_counted_and_found() -> None:
    row = GateRow(
        task="text",
        examples=1300,
        lost=31,
        gained=2,
        drop=0.0967,
        limit=0.02,
        accuracy=0.845,
        floor=None,
        p_held=1.0,
        p_broken=1.4e-6,
        outcome=Word(text="broken", tone="bad"),
        reason="the drop is shown to be above the limit",
        uses=3,
    )
    new = GateRow(
        task="network",
        examples=300,
        lost=None,
        gained=None,
        drop=None,
        limit=None,
        accuracy=0.9,
        floor=0.7,
        p_held=None,
        p_broken=None,
        outcome=Word(text="new"),
        reason="new, not below its floor",
    )
    judged = Judgement(
        candidate="0003-network",
        verdict=Word(text="refuse", tone="bad"),
        reason="Broken: text.",
        against="0002-text",
        rows=(row, new),
    )
    article = parse(block(judged)).one("article")
    assert [found.text for found in article.all("span", "cut")] == ["text", "network"]
    dash, broken = "\N{EN DASH}", "\N{MULTIPLICATION X} broken the drop is shown to be above the limit"
    assert article.get("class") == "bad"
    assert article.one("h3").text == "0003-network \N{MULTIPLICATION X} refuse"
    assert [paragraph.text for paragraph in article.all("p")] == ["Broken: text.", "Compared with 0002-text."]
    assert cells(article) == [
        [name for name, _ in COLUMNS],
        ["text", "1,300", "31", "2", "0.097", "0.020", "0.845", dash, "1", "1.4e\N{MINUS SIGN}6", "3", broken],
        ["network", "300", dash, dash, dash, dash, "0.900", "0.700", dash, dash, dash, "\N{BULLET} new not below its floor"],
    ]


def test_a_state_is_told_by_its_sign_too() -> None:
    shown = [parse(word(Word(text="x", tone=tone))).text for tone in ("good", "bad", "open", "plain")]
    assert shown == ["\N{CHECK MARK} x", "\N{MULTIPLICATION X} x", "? x", "\N{BULLET} x"]


def test_a_table_with_states_and_figures() -> None:
    table = Table(
        caption="versions",
        header=("version", "state", "accuracy"),
        rows=(("0001-a", Word(text="published", tone="good"), "0.9"),),
        figures=frozenset({"accuracy"}),
    )
    node = parse(block(table))
    assert cells(node) == [["version", "state", "accuracy"], ["0001-a", "\N{CHECK MARK} published", "0.9"]]
    assert [cell.get("class") for cell in node.all("td")] == ["", "", "figure"]
    region = node.one("div")
    assert (region.get("role"), region.get("aria-label"), region.get("tabindex")) == ("region", "versions", "0")


def test_a_fold_opens_on_a_click_or_is_open() -> None:
    folds = [
        parse(block(Fold(title="t", blocks=(Passage(text="inside"),), opened=opened))).one("details") for opened in (False, True)
    ]
    assert ["open" in fold.attributes for fold in folds] == [False, True]
    assert [(fold.one("summary").text, fold.one("p").text) for fold in folds] == [("t", "inside")] * 2


def test_figures_of_the_overview() -> None:
    node = parse(block(Facts(facts=(Fact(name="steps", value="400", note="of 800"), Fact(name="ranks", value="2")))))
    assert [entry.text for entry in node.all("dt") + node.all("dd")] == ["steps", "ranks", "400", "of 800", "2"]


def test_a_figure_that_is_a_long_name_may_be_cut_and_has_the_whole_as_its_title() -> None:
    node = parse(block(Facts(facts=(Fact(name="published", value="0001-" + 64 * "n", note="since"),))))
    assert [found.get("title") for found in node.all("span", "cut")] == ["0001-" + 64 * "n", ""]


def test_settings_keep_their_lines() -> None:
    assert parse(block(Passage(text="a:\n  b: 1\n", verbatim=True))).one("pre").text == "a:\n  b: 1\n"


def test_names_from_strangers_stay_text_in_every_block() -> None:
    heat = HeatMap(caption=HOSTILE, corner=HOSTILE, rows=(HOSTILE,), columns=(HOSTILE,), cells=((0.5,),))
    metrics = Metrics(caption=HOSTILE, metrics=(Metric(name=HOSTILE, value=0.5, formula=HOSTILE),))
    table = Table(caption=HOSTILE, header=(HOSTILE,), rows=((HOSTILE,), (Word(text=HOSTILE),)))
    facts = Facts(facts=(Fact(name=HOSTILE, value=HOSTILE, note=HOSTILE),))
    fold = Fold(title=HOSTILE, word=Word(text=HOSTILE), blocks=(Passage(text=HOSTILE), Passage(text=HOSTILE, verbatim=True)))
    judged = Judgement(candidate=HOSTILE, verdict=Word(text=HOSTILE), reason=HOSTILE, against=HOSTILE, rows=())
    for content, times in ((heat, 4), (metrics, 3), (table, 3), (facts, 3), (fold, 4), (judged, 4)):
        node = parse(block(content))
        assert node.all("script") == [] and node.text.count(HOSTILE) == times
