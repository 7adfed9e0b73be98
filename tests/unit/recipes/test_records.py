"""Files that hold what no run would write have a page all the same, which says no more than they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scaletrain import report
from scaletrain.continual import store
from scaletrain.continual.gate import GateConfig, judge
from scaletrain.continual.ledger import Ledger
from scaletrain.recipes import records
from tests.unit.report.dom import Node, cells, parse

HUGE = "1" + 400 * "0"
"""A number that no float holds."""


def run_page(folder: Path, **files: str) -> Node:
    """The page of a run whose folder holds these files."""
    for name, text in {"metrics.jsonl": "", **files}.items():
        (folder / name).write_text(text)
    return parse(report.render(report.run_page(records.read_run(folder, 0.0), "origin", "made")))


def careful(page: Node) -> list[str]:
    return [node.text for node in page.all("section")[0].all("p")]


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "null", "{}", '{"code": Infinity}', '{"code": "0"}', f'{{"code": {HUGE}}}', 200_000 * "["],
    ids=["list", "number", "null", "empty", "infinite", "text", "huge", "deep"],
)
def test_an_end_of_another_shape_is_no_end(tmp_path: Path, text: str) -> None:
    page = run_page(tmp_path, **{"exit.json": text})
    assert page.one("p", "status").text.startswith("? no end recorded")
    assert careful(page) == ["Careful: How it ended cannot be read from exit.json."]


def test_steps_that_no_run_could_take_are_not_known(tmp_path: Path) -> None:
    page = run_page(tmp_path, **{"exit.json": f'{{"code": 0, "step": {HUGE}}}', "config.yaml": f"steps: {HUGE}\n"})
    assert page.one("p", "status").text == "\N{CHECK MARK} done after step ?"
    assert [node.text for node in page.one("dl").all("dd")] == ["0"]


def test_numbers_of_a_final_test_may_be_anything(tmp_path: Path) -> None:
    label = f'{{"label": "x", "precision": NaN, "recall": {HUGE}, "f1": 0.5, "support": Infinity}}'
    mistake = '{"true": "x", "predicted": "y", "count": 3}'
    figures = f'"split": "test", "examples": Infinity, "accuracy": {HUGE}, "macro_f1": 0.5'
    page = run_page(tmp_path, **{"report.json": f'{{{figures}, "labels": [{label}], "mistakes": [{mistake}]}}'})
    assert careful(page) == []
    figures, *_ = [node.text for node in page.all("section")[1].all("dl")]
    assert figures == "accuracynot finitemacro f10.5"
    labels, mistakes = page.all("section")[1].all("table")
    assert cells(labels)[1:] == [["x", "not finite", "not finite", "0.500", "\N{EN DASH}"]]
    assert cells(mistakes)[1:] == [["x", "y", "3"]]


@pytest.mark.parametrize(
    "text", ["[]", "7", '{"split": "test"}', '{"split": "test", "examples": 2, "labels": [[]]}', 200_000 * "["]
)
def test_a_final_test_of_another_shape_is_none(tmp_path: Path, text: str) -> None:
    (said,) = careful(run_page(tmp_path, **{"report.json": text}))
    assert said.startswith("Careful: The final test cannot be read from report.json (")


@pytest.mark.parametrize("text", ["a: [", "steps: 1" + 5000 * "0", 1000 * "["], ids=["torn", "huge", "deep"])
def test_settings_that_cannot_be_read_are_told(tmp_path: Path, text: str) -> None:
    (said,) = careful(run_page(tmp_path, **{"config.yaml": text}))
    assert said.startswith("Careful: The settings cannot be read. ")


def test_facts_of_an_event_may_be_anything_and_a_line_that_nothing_can_read_is_passed_over(tmp_path: Path) -> None:
    lines = [
        f'{{"kind": "event", "step": 2, "name": "odd", "facts": {{"n": {HUGE}}}}}',
        f'{{"kind": "event", "step": {20 * HUGE}, "name": "odder", "facts": {{}}}}',
        200_000 * "[",
        '{"kind": "event", "step": 3, "name": "even", "facts": {}}',
    ]
    page = run_page(tmp_path, **{"metrics.jsonl": "\n".join(lines)})
    assert cells(page.one("table"))[1:] == [["2", "odd", "n over 1e300"], ["3", "even", ""]]


# --- lineages


def judged(folder: Path, **changes: Any) -> report.LineageRecord:
    """A lineage that knows nothing but one judgement on ``0002-b``: task a was published before, and task b is new."""
    before = {str(k): True for k in range(400)}
    verdict = judge(GateConfig(max_drop=0.1), {"a": before}, {"a": before, "b": before})
    facts: dict[str, Any] = {"version": "0002-b", "against": "0001-a", "verdict": verdict.to_json(), "uses": {"a": 2, "b": 1}}
    Ledger(folder / store.LEDGER).append("judged", facts | changes)
    return records.read_lineage(folder, 0.0)


def test_a_task_that_was_compared_with_nothing_is_new_and_not_held(tmp_path: Path) -> None:
    (version,) = judged(tmp_path).versions
    assert version.judgement is not None
    assert [(row.task, row.outcome) for row in version.judgement.rows] == [
        ("a", report.finding("held")),
        ("b", report.finding("held", compared=False)),
    ]


def test_a_ledger_with_a_line_that_nothing_can_read_is_shown_without_it(tmp_path: Path) -> None:
    judged(tmp_path)
    with (tmp_path / store.LEDGER).open("a") as file:
        file.write(200_000 * "[" + "\n")
    lineage = records.read_lineage(tmp_path, 0.0)
    assert [version.name for version in lineage.versions] == ["0002-b"]
    assert lineage.problems[0].startswith("The ledger was altered")


@pytest.mark.parametrize("uses", [7, "ab", ["a"], None])
def test_a_judgement_of_another_shape_is_none(tmp_path: Path, uses: object) -> None:
    lineage = judged(tmp_path, uses=uses)
    assert lineage.versions[0].judgement is None
    assert [text.split(" (")[0] for text in lineage.problems][:1] == [
        "What the gate said of 0002-b cannot be read from the ledger"
    ]
