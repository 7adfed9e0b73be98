"""What is worth saying about a run: while it goes, when it is done, and when it broke."""

from __future__ import annotations

import math

import pytest

from scaletrain.report import Ending, Event, FinalTest, Recorded, RunRecord, run_page
from scaletrain.report.content import Block, Chart, Charts, Facts, Fold, Page, Passage, Table
from scaletrain.report.run import evaluations, events_table, learning, meaning

NAN = math.nan


def recorded(**changes: object) -> Recorded:
    columns = {
        "step": [1.0, 2.0, 3.0, 4.0],
        "samples": [8.0, 16.0, 24.0, 32.0],
        "loss": [4.0, 3.0, 2.0, 1.0],
        "real_tokens": [100.0, 100.0, 100.0, 100.0],
        "real_tokens_per_second": [900.0, 1000.0, 1100.0, NAN],
        "step_s": [2.0, 1.0, 1.0, 1.0],
        "data_wait_s": [0.5, 0.0, 0.0, 0.0],
        "eta_s": [40.0, 30.0, 20.0, 95.0],
        "padding_share": [0.1, 0.2, 0.1, 0.2],
        "memory_bytes": [1e9, 2e9, 2e9, 2e9],
        "mfu": [NAN] * 4,
    }
    scores = {"loss": [(0.0, 5.0), (2.0, 2.5), (4.0, 2.75)], "accuracy": [(0.0, 0.0), (2.0, 0.5), (4.0, 0.25)]}
    start = Event(step=0, name="start", facts={"ranks": 2, "device": "cpu"})
    whole = {"columns": columns, "scores": scores, "events": (start,)}
    return Recorded(**(whole | changes))  # type: ignore[arg-type]


def page(**changes: object) -> Page:
    whole = {"name": "run", "recorded": recorded(), "settings": "steps: 8\n", "total_steps": 8}
    return run_page(RunRecord(**(whole | changes)), "origin", "made")  # type: ignore[arg-type]


def blocks(shown: Page, title: str) -> tuple[Block, ...]:
    (found,) = [section.blocks for section in shown.sections if section.title == title]
    return found


def facts(shown: Page) -> dict[str, tuple[str, str]]:
    (found,) = [each for each in blocks(shown, "Overview") if isinstance(each, Facts)]
    return {fact.name: (fact.value, fact.note) for fact in found.facts}


def titles(charts: list[Chart]) -> dict[str, list[str]]:
    return {chart.title: [series.name for series in chart.series] for chart in charts}


@pytest.mark.parametrize(
    ("ending", "word", "tone", "detail"),
    [
        (
            None,
            "no end recorded",
            "open",
            "It is still going, or it was killed. Last record 2 min 05 s before this page was made.",
        ),
        (Ending(code=0, step=4, reason="done"), "done", "good", "after step 4"),
        (Ending(code=75, step=4, reason="stopped on request"), "stopped on request", "open", "after step 4: stopped on request"),
        (
            Ending(code=72, step=4, reason="step 5: loss nan."),
            "failed, exit code 72",
            "bad",
            "after step 4: The loss or the gradient is not finite. step 5: loss nan.",
        ),
        (Ending(code=-9, step=None, reason=""), "failed, exit code -9", "bad", "after step ?:  "),
    ],
)
def test_how_a_run_stands(ending: Ending | None, word: str, tone: str, detail: str) -> None:
    shown = page(ending=ending, idle_s=125.0)
    assert (shown.status.text, shown.status.tone, shown.detail) == (word, tone, detail)


def test_exit_codes_have_the_words_of_the_errors() -> None:
    assert meaning(65) == "Something that the user gave cannot be used."
    assert meaning(74) == "A disk that is full, read-only or failing; what was there before is untouched."
    assert meaning(76) == "Another rank died or did not answer in time."
    assert [meaning(code) for code in (0, 70, 1, -9)] == [""] * 4


def test_the_overview_of_a_run_that_is_going() -> None:
    assert facts(page()) == {
        "steps": ("4", "50% of 8"),
        "training loss": ("1", "at first 4"),
        "loss, evaluated": ("2.75", "best 2.5 at step 2, at first 5"),
        "accuracy, evaluated": ("0.25", "best 0.5 at step 2, at first 0"),
        "tokens": ("400", "32 samples"),
        "tokens per second": ("1,000", "median"),
        "time in steps": ("5.0 s", "10.0% of it waiting for data"),
        "padding": ("15.0%", "of all token positions"),
        "time left": ("1 min 35 s", "of steps, at the last pace"),
        "peak memory": ("2 GB", "of the first rank"),
        "ranks": ("2", ""),
        "device": ("cpu", ""),
    }


def test_a_run_that_has_ended_has_no_time_left() -> None:
    assert "time left" not in facts(page(ending=Ending(code=0, step=4, reason="done")))


def test_the_best_evaluation_is_a_finite_one() -> None:
    scores = {"loss": [(0.0, NAN), (1.0, 3.0)], "accuracy": [(0.0, NAN), (1.0, 0.5), (2.0, NAN)]}
    shown = facts(page(recorded=recorded(scores=scores)))
    assert shown["loss, evaluated"] == ("3", "best 3 at step 1, at first not finite")
    assert shown["accuracy, evaluated"] == ("not finite", "best 0.5 at step 1, at first not finite")


def test_a_run_without_a_single_step_has_a_page() -> None:
    shown = page(recorded=Recorded(columns={}, scores={}), total_steps=None, settings="", problems=("no metrics.",))
    assert [section.title for section in shown.sections] == ["Overview"]
    assert facts(shown) == {"steps": ("0", "")}
    assert blocks(shown, "Overview")[0] == Passage(text="Careful: no metrics.")


def test_the_sections() -> None:
    assert [section.title for section in page().sections] == [
        "Overview",
        "Learning",
        "Evaluations",
        "Pace",
        "Events",
        "Settings",
    ]


def test_the_loss_stands_beside_its_evaluations_and_where_it_was_continued() -> None:
    events = tuple(Event(step=step, name="start", facts={}) for step in (0, 2, 2))
    chart = learning(recorded(events=events))[0]
    assert [(series.name, list(series.x), list(series.y), series.dotted) for series in chart.series] == [
        ("training", [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], False),
        ("evaluated", [0.0, 2.0, 4.0], [5.0, 2.5, 2.75], True),
    ]
    assert [(mark.x, mark.meaning) for mark in chart.marks] == [(2, "continued after step 2")]


def test_terms_of_the_loss_are_shown_where_there_are_several() -> None:
    columns = recorded().columns
    one = recorded(columns={**columns, "terms.ce": [1.0] * 4})
    two = recorded(columns={**columns, "terms.ce": [1.0] * 4, "terms.ewc": [0.5] * 4})
    assert titles(learning(one)) == {"Loss": ["training", "evaluated"]}
    assert titles(learning(two)) == {"Loss": ["training", "evaluated"], "Terms of the loss": ["ce", "ewc"]}


def test_shares_among_the_scores_have_one_chart_and_all_others_one_each() -> None:
    scores = {name: [(1.0, value)] for name, value in (("loss", 0.5), ("accuracy", 0.9), ("macro_f1", 0.8), ("perplexity", 8.0))}
    assert titles(evaluations(recorded(scores=scores))) == {"Scores": ["accuracy", "macro f1"], "Perplexity": ["perplexity"]}
    assert titles(evaluations(recorded())) == {"Accuracy": ["accuracy"]}
    scores = {"accuracy": [(1.0, 0.5)], "pair_accuracy": [(1.0, 0.5)], "pair_loss": [(1.0, 0.69)]}
    assert titles(evaluations(recorded(scores=scores))) == {"Scores": ["accuracy", "pair accuracy"], "Pair loss": ["pair loss"]}


def test_pace_has_throughput_and_what_was_wasted_and_mfu_only_where_it_is_known() -> None:
    (charts,) = blocks(page(), "Pace")
    assert isinstance(charts, Charts)
    assert titles(list(charts.charts)) == {
        "Throughput": ["throughput"],
        "Time of a step": ["time of a step"],
        "Wasted computation": ["padding"],
        "Waiting for data": ["waiting for data"],
    }


def test_equal_events_in_a_row_are_one_line() -> None:
    events = [Event(step=0, name="start", facts={"ranks": 2})]
    events += [Event(step=100 * k, name="checkpoint", facts={}) for k in range(1, 31)]
    events += [Event(step=3000, name="start", facts={"ranks": 4})]
    table = events_table(events)
    assert isinstance(table, Table)
    assert table.rows == (
        ("0", "start", "ranks 2"),
        ("100 to 3,000", "checkpoint (30 times)", ""),
        ("3,000", "start", "ranks 4"),
    )


def test_facts_of_an_event_may_be_anything() -> None:
    table = events_table([Event(step=1, name="odd", facts={"a": 10**400, "b": math.inf, "c": True, "d": None, "e": [10**20]})])
    assert isinstance(table, Table)
    assert table.rows == (("1", "odd", "a over 1e300, b not finite, c True, d None, e [100000000000000000000]"),)


def test_shares_have_axes_that_know_it() -> None:
    charts = [*evaluations(recorded(scores={"accuracy": [(1.0, 0.0)], "perplexity": [(1.0, 8.0)]}))]
    assert {chart.title: chart.shares for chart in charts} == {"Accuracy": True, "Perplexity": False}


def test_the_final_test_of_a_classifier_has_a_row_per_label() -> None:
    tested = FinalTest(
        split="test",
        examples=1200,
        figures={"accuracy": 0.9, "majority_baseline": 0.25},
        labels=(("yes", 0.9, 0.8, 0.85, 600),),
        mistakes=(("yes", "no", 12),),
    )
    said, figures, labels, mistakes = blocks(page(tested=tested), "Final test")
    assert isinstance(said, Passage) and said.text.startswith("On the 1,200 examples of the test split")
    assert isinstance(figures, Facts)
    assert [(fact.name, fact.value) for fact in figures.facts] == [("accuracy", "0.9"), ("majority baseline", "0.25")]
    assert isinstance(labels, Fold) and isinstance(labels.blocks[0], Table)
    assert labels.blocks[0].rows == (("yes", "0.900", "0.800", "0.850", "600"),)
    assert isinstance(mistakes, Fold) and isinstance(mistakes.blocks[0], Table)
    assert mistakes.blocks[0].rows == (("yes", "no", "12"),)
