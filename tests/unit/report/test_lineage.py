"""What is worth saying about a lineage: results, verdicts, versions, and how it stands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scaletrain.report import (
    Ending,
    GateRow,
    LineageRecord,
    Metric,
    Recorded,
    Summary,
    Version,
    finding,
    judgement,
    lineage_page,
)
from scaletrain.report.content import Block, Charts, Facts, Fold, HeatMap, Judgement, Metrics, Page, Table, Word


def version(name: str, state: str, accuracies: dict[str, float], **changes: object) -> Version:
    whole = {
        "name": name,
        "task": name.partition("-")[2],
        "base": "the encoder",
        "state": state,
        "since": "2026-07-01 10:00:00",
        "accuracies": accuracies,
    }
    return Version(**(whole | changes))  # type: ignore[arg-type]


FIRST = version("0001-a", "published", {"a": 0.9})
SECOND = version("0002-b", "refused", {"a": 0.5, "b": 0.95}, base="0001-a")
THIRD = version("0003-b", "published", {"a": 0.88, "b": 0.92}, base="0001-a")


def page(*versions: Version, **changes: object) -> Page:
    whole = {
        "name": "stream",
        "versions": versions,
        "published": None,
        "summaries": (),
        "ledger": (("1", "2026-07-01 10:00:00", "begun", "0001-a", "{}"),),
        "settings": "seed: 1\n",
    }
    return lineage_page(LineageRecord(**(whole | changes)), "origin", "made")  # type: ignore[arg-type]


def blocks(shown: Page, title: str) -> tuple[Block, ...]:
    (found,) = [section.blocks for section in shown.sections if section.title == title]
    return found


def row(task: str, status: str, floor: float | None = None) -> GateRow:
    return GateRow(
        task=task,
        examples=300,
        lost=3,
        gained=1,
        drop=0.00667,
        limit=0.02,
        accuracy=0.9,
        floor=floor,
        p_held=0.01,
        p_broken=0.99,
        outcome=finding(status),
    )


def new(task: str, floor: float | None = None) -> GateRow:
    """The row of a task that the published model does not know."""
    untested = {"lost": None, "gained": None, "drop": None, "limit": None, "p_held": None, "p_broken": None}
    return replace(row(task, "held", floor), outcome=finding("held", compared=False), **untested)  # type: ignore[arg-type]


def test_the_heat_map_has_a_row_per_stage_that_was_evaluated_and_a_column_per_task() -> None:
    (heat,) = [each for each in blocks(page(FIRST, SECOND, THIRD), "Results") if isinstance(each, HeatMap)]
    assert heat.rows == ("0001-a", "0002-b (refused)", "0003-b") and heat.columns == ("a", "b")
    assert heat.cells == ((0.9, None), (0.5, 0.95), (0.88, 0.92))


def test_the_accuracy_of_each_task_and_their_mean_over_time() -> None:
    (charts,) = [each for each in blocks(page(FIRST, SECOND, THIRD), "Results") if isinstance(each, Charts)]
    (chart,) = charts.charts
    assert chart.places == ("0001-a", "0002-b", "0003-b")
    assert [(series.name, list(series.x), list(series.y), series.leading) for series in chart.series] == [
        ("a", [0, 1, 2], [0.9, 0.5, 0.88], False),
        ("b", [1, 2], [0.95, 0.92], False),
        ("mean of the tasks known", [0, 1, 2], [0.9, 0.725, 0.9], True),
    ]


def test_of_many_tasks_the_mean_the_band_around_all_and_the_lowest_are_drawn() -> None:
    """Twelve can still be told apart by colour and dashes."""
    stages = [version(f"{t:04d}-t{t}", "published", {f"t{k}": (t + k) / 100 for k in range(t, 0, -1)}) for t in range(1, 14)]
    (each,) = [block.charts[0] for block in blocks(page(*stages[:12]), "Results") if isinstance(block, Charts)]
    (together,) = [block.charts[0] for block in blocks(page(*stages), "Results") if isinstance(block, Charts)]
    assert len(each.series) == 13 and {series.notes for series in each.series} == {()}
    known, lowest = together.series
    assert (known.name, known.leading) == ("mean and range of the tasks known", True)
    assert sorted(zip(known.x, known.y, strict=True)) == [(t - 1, (t + k) / 100) for t in range(1, 14) for k in range(1, t + 1)]
    assert (lowest.name, list(lowest.x), list(lowest.y)) == (
        "lowest task, at last t1",
        list(range(13)),
        [(t + 1) / 100 for t in range(1, 14)],
    )
    assert list(lowest.notes) == ["t1"] * 13
    assert each.shares and together.shares


def test_every_summary_figure_has_its_formula_and_the_stages_it_is_of() -> None:
    metric = Metric(name="forgetting", value=0.1, formula="1/(T-1) ...")
    shown = page(FIRST, summaries=(Summary(stages="the stages up to 0001-a", metrics=(metric,)),))
    (found,) = [each for each in blocks(shown, "Results") if isinstance(each, Metrics)]
    assert found == Metrics(caption="Summary figures of the stages up to 0001-a", metrics=(metric,))


def test_the_newest_verdict_stands_open_and_those_before_it_are_folded() -> None:
    said = {name: judgement(name, "accept", [row("a", "held")], None) for name in ("0001-a", "0002-b", "0003-b")}
    shown = page(*(version(name, "published", {}, judgement=each) for name, each in said.items()))
    first, *folds = blocks(shown, "The gate")
    assert first == said["0003-b"]
    assert all(isinstance(fold, Fold) and not fold.opened for fold in folds)
    assert [fold.title for fold in folds if isinstance(fold, Fold)] == ["0002-b", "0001-a", "How the gate decides"]


SHOWN = "Every task that the published model knows is shown to have lost less than its limit."


@pytest.mark.parametrize(
    ("decision", "rows", "tone", "reason"),
    [
        (
            "accept",
            [row("a", "held")],
            "good",
            f"{SHOWN} No task has a floor.",
        ),
        ("accept", [row("a", "held"), new("b", floor=0.5)], "good", f"{SHOWN} No task is below its floor."),
        ("accept", [new("b")], "good", "Nothing was compared: 0001-a knows none of these tasks. No task has a floor."),
        ("accept", [], "good", "Nothing was compared: this lineage has no gate."),
        ("refuse", [row("a", "broken"), row("b", "held"), row("c", "broken")], "bad", "Broken: a, c."),
        (
            "undecidable",
            [row("a", "held"), row("b", "open")],
            "open",
            "Nothing is shown to be broken, but there are too few examples to tell about: b.",
        ),
    ],
)
def test_a_verdict_names_the_tasks_it_rests_on(decision: str, rows: list[GateRow], tone: str, reason: str) -> None:
    found: Judgement = judgement("0002-b", decision, rows, "0001-a")
    assert (found.verdict, found.reason) == (Word(text=decision, tone=tone), reason)  # type: ignore[arg-type]


def test_a_verdict_says_what_the_candidate_was_compared_with() -> None:
    cases = (([row("a", "held"), new("b")], "0001-a"), ([new("b")], "0001-a"), ([], "0001-a"))
    assert [judgement("0002-b", "accept", rows, against).against for rows, against in cases] == ["0001-a", "", ""]


def test_where_nothing_is_published_nothing_is_said_to_be_shown() -> None:
    found = judgement("0002-b", "accept", [new("b", floor=0.5)], None)
    assert (found.reason, found.against) == (
        "Nothing was compared: nothing was published before. No task is below its floor.",
        "",
    )


def test_a_task_that_was_not_compared_is_new_and_not_held() -> None:
    assert finding("held", compared=False) == Word(text="new", tone="plain")
    assert finding("broken", compared=False) == Word(text="broken", tone="bad")


def test_versions_say_what_became_of_them() -> None:
    back = version("0004-c", "rolled back", {"a": 0.7, "b": 0.9, "c": 0.9}, base="0003-b")
    (table,) = blocks(page(FIRST, SECOND, THIRD, back, published="0003-b"), "Versions")
    assert isinstance(table, Table)
    assert [(line[0], line[2], line[3], line[4], line[5]) for line in table.rows] == [
        ("0001-a", "the encoder", Word(text="published before"), "0.900", "0.900"),
        ("0002-b", "0001-a", Word(text="refused", tone="bad"), "0.950", "0.725"),
        ("0003-b", "0001-a", Word(text="published", tone="good"), "0.920", "0.900"),
        ("0004-c", "0003-b", Word(text="rolled back", tone="bad"), "0.900", "0.833"),
    ]


@pytest.mark.parametrize(
    ("versions", "changes", "word", "detail"),
    [
        ((), {}, "empty", "Nothing is published yet."),
        ((FIRST, THIRD), {"published": "0003-b"}, "published", "0003-b was the last attempt. Published is 0003-b."),
        (
            (FIRST, SECOND),
            {"published": "0001-a", "ending": Ending(code=77, step=9, reason="gate: refuse")},
            "refused",
            "0002-b was the last attempt. Published is 0001-a.",
        ),
        (
            (FIRST,),
            {"published": "0001-a", "ending": Ending(code=65, step=0, reason="tasks: got ...")},
            "published",
            "0001-a was the last attempt. Published is 0001-a. A command since: failed, exit code 65, after step 0: "
            "Something that the user gave cannot be used. tasks: got ...",
        ),
        (
            (FIRST, version("0002-b", "trained", {})),
            {"published": "0001-a", "idle_s": 4.0},
            "no end recorded",
            "It is still going, or it was killed. Last record 4.0 s before this page was made. 0002-b is trained and not "
            "concluded. Published is 0001-a.",
        ),
        (
            (version("0001-a", "begun", {}),),
            {"ending": Ending(code=75, step=7, reason="stopped.")},
            "stopped on request",
            "after step 7: stopped. 0001-a is begun and not concluded. Nothing is published yet.",
        ),
    ],
)
def test_how_a_lineage_stands(versions: tuple[Version, ...], changes: dict[str, object], word: str, detail: str) -> None:
    shown = page(*versions, **changes)
    assert (shown.status.text, shown.detail) == (word, detail)


def test_the_overview_is_of_what_is_published() -> None:
    (found,) = blocks(page(FIRST, SECOND, THIRD, published="0003-b"), "Overview")
    assert isinstance(found, Facts)
    assert [(fact.name, fact.value, fact.note) for fact in found.facts] == [
        ("published", "0003-b", "since 2026-07-01 10:00:00"),
        ("tasks it knows", "2", ""),
        ("its average accuracy", "0.900", "on test examples"),
        ("its worst task", "0.880", "a"),
        ("attempts", "3", ""),
        ("of them published", "2", ""),
        ("of them refused", "1", ""),
    ]


def test_the_loss_of_all_stages_lies_along_one_axis() -> None:
    stages = [Recorded(columns={"step": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, k]}, scores={}) for k in (1.0, 0.5)]
    shown = page(version("0001-a", "published", {}, recorded=stages[0]), version("0002-b", "begun", {}, recorded=stages[1]))
    charts, *folds = blocks(shown, "Training")
    assert isinstance(charts, Charts)
    (chart,) = charts.charts
    assert (list(chart.series[0].x), list(chart.series[0].y)) == ([1, 2, 3, 4, 5, 6], [3, 2, 1, 3, 2, 0.5])
    assert [(mark.x, mark.letters, mark.meaning) for mark in chart.marks] == [
        (0, "0001", "0001-a begins"),
        (3, "0002", "0002-b begins"),
    ]
    assert [(fold.title, fold.opened) for fold in folds if isinstance(fold, Fold)] == [
        ("0001-a, 3 steps", False),
        ("0002-b, 3 steps", True),
    ]


def test_an_empty_lineage_has_a_page() -> None:
    assert [section.title for section in page(ledger=(), settings="").sections] == ["Overview", "Records"]
