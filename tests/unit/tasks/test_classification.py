"""The classification task: what a slot carries, what a sample may be sorted into, and what is kept of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scaletrain.data.collate import Frame, Slot
from scaletrain.data.examples import Examples
from scaletrain.data.plan import Picks
from scaletrain.data.slots import Layout
from scaletrain.tasks import Task
from scaletrain.tasks.classification import Classification, Logits, Scenario, visible_columns

FIRST, LAST, PAD = 101, 102, 0
BLOCKS = (3, 2, 4)


def corpus(lengths: list[int], targets: list[int], tasks: list[int], boundaries: list[int] | None = None) -> Examples:
    return Examples(
        tokens=np.arange(10, 10 + sum(lengths), dtype=np.int32),
        offsets=np.cumsum([0, *lengths]),
        boundary=np.array(boundaries or lengths, np.int32),
        target=np.array(targets),
        task=np.array(tasks, np.int16),
        keys=tuple(map(str, range(len(lengths)))),
        truncated=0,
    )


NEW = corpus([4, 2, 6, 3], [0, 2, 4, 8], [0, 0, 1, 2])
OLD = corpus([5, 1], [3, 1], [1, 0])


def classification(scenario: Scenario = "class", layout: Layout = "padded", **more: Any) -> Classification:
    frame = Frame(FIRST, LAST, PAD, layout, token_types=more.pop("token_types", False))
    return Classification([NEW, OLD], visible_columns(scenario, BLOCKS), frame, seed=5, **more)


def slot_of(task: Classification, samples: list[tuple[int, int]], index: int = 0) -> Slot:
    picks = Picks(
        np.array([corpus for corpus, _ in samples], np.int16),
        np.zeros(len(samples), np.int64),
        np.array([chunk for _, chunk in samples], np.int64),
    )
    return task.collate(3, index, picks, [task.corpora[corpus].read(chunk) for corpus, chunk in samples])


def test_it_is_a_task() -> None:
    as_task: Task = classification()
    assert as_task.weights == {"classification": 1.0}


def test_a_slot_carries_the_labels_and_tasks_of_its_samples_whatever_corpus_they_are_of() -> None:
    slot = slot_of(classification(), [(0, 3), (1, 0), (0, 1), (1, 1)])
    assert slot.targets["labels"].tolist() == [8, 3, 2, 1]
    assert slot.targets["tasks"].tolist() == [2, 1, 0, 0]
    assert slot.counts == {"classification": 4}
    assert slot.inputs["input_ids"][0].tolist() == [FIRST, *NEW.read(3), LAST, PAD, PAD]


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
def test_the_second_text_of_a_pair_has_type_one_with_the_token_that_ends_it(layout: Layout) -> None:
    """Two pairs and a single text; types as BERT's own tokenizer gives them."""
    pairs = corpus([5, 3, 4], [0, 0, 0], [0, 0, 0], boundaries=[3, 3, 1])
    frame = Frame(FIRST, LAST, PAD, layout, token_types=True)
    slot = slot_of(Classification([pairs], visible_columns("class", [2]), frame, 0), [(0, 0), (0, 1), (0, 2)])
    rows = [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]
    expected = [[*row, *[0] * (7 - len(row))] for row in rows] if layout == "padded" else [[*rows[0], *rows[1], *rows[2]]]
    assert slot.inputs["token_type_ids"].tolist() == expected


def test_models_without_token_types_get_none() -> None:
    assert "token_type_ids" not in slot_of(classification(), [(0, 0)]).inputs


@pytest.mark.parametrize(
    ("scenario", "rows"),
    [
        ("class", ["111111111"] * 3),
        ("task", ["111000000", "000110000", "000001111"]),
    ],
)
def test_what_a_sample_of_each_task_may_be_sorted_into(scenario: Scenario, rows: list[str]) -> None:
    assert visible_columns(scenario, BLOCKS).astype(int).tolist() == [[int(each) for each in row] for row in rows]


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_the_loss_is_that_of_a_softmax_over_the_visible_columns(scenario: Scenario) -> None:
    task = classification(scenario)
    slot = slot_of(task, [(0, 0), (0, 2), (0, 3), (1, 1)])
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = task.terms(logits, slot)["classification"]
    expected = 0.0
    for row, label, number in zip(logits.detach().double(), slot.targets["labels"], slot.targets["tasks"], strict=True):
        seen = row[torch.from_numpy(task.visible[number])]
        expected += float(seen.logsumexp(0) - row[label])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    hidden = ~torch.from_numpy(task.visible[slot.targets["tasks"].numpy()])
    assert not gradient[hidden].any() and bool(gradient[~hidden].all())


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_a_dummy_slot_runs_everything_for_nothing(scenario: Scenario) -> None:
    task = classification(scenario, cached={"teacher": [np.ones((4, 2), np.float32), np.ones((2, 2), np.float32)]})
    slot = slot_of(task, [], index=9)
    assert slot.inputs["input_ids"].tolist() == [[FIRST, LAST]]
    assert slot.targets["teacher"].tolist() == [[0.0, 0.0]]
    weight = torch.randn(5, 9, requires_grad=True)
    loss = task.terms(torch.ones(1, 5) @ weight, slot)["classification"]
    loss.backward()
    assert (slot.counts, loss.item()) == ({"classification": 0}, 0.0)
    assert weight.grad is not None and not weight.grad.any()
    assert len(task.score(torch.zeros(1, 9), slot)) == 0


def test_predictions_are_made_among_the_visible_columns() -> None:
    logits = torch.zeros(2, 9)
    logits[:, 7], logits[0, 1], logits[1, 4] = 5.0, 2.0, 1.0
    samples = [(0, 0), (0, 2)]  # of task 0 with label 0, of task 1 with label 4
    for scenario, predicted in (("class", [7, 7]), ("task", [1, 4])):
        task = classification(scenario)  # type: ignore[arg-type]
        table = task.score(logits, slot_of(task, samples))
        assert table[:, 1].tolist() == [0, 4]
        assert table[:, 2].tolist() == predicted
        seen = torch.from_numpy(task.visible[0])
        assert table[0, 3] == pytest.approx(float(logits[0][seen].softmax(0).max()))


class Doubled:
    """A further term: twice the sum of the first logits."""

    weight = 0.25

    def sum(self, outputs: Tensor, slot: Slot) -> Tensor:
        return 2 * outputs[:, 0].sum()


def test_further_terms_are_counted_by_samples_and_left_out_of_evaluation() -> None:
    task = classification(further={"doubled": Doubled()})
    slot = slot_of(task, [(0, 0), (1, 0)])
    assert task.weights == {"classification": 1.0, "doubled": 0.25}
    assert slot.counts == {"classification": 2, "doubled": 2}
    assert task.terms(torch.ones(2, 9), slot)["doubled"].item() == 4.0
    assert task.over([OLD]).weights == {"classification": 1.0}


def test_cached_rows_belong_to_their_samples() -> None:
    rows = [np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(10, 14, dtype=np.float32).reshape(2, 2)]
    slot = slot_of(classification(cached={"teacher": rows}), [(1, 1), (0, 2), (1, 0)])
    assert slot.targets["teacher"].tolist() == [[12, 13], [4, 5], [10, 11]]


def test_a_teacher_keeps_every_logit() -> None:
    logits = torch.randn(2, 9)
    slot = slot_of(classification("task"), [(0, 0), (0, 1)])
    scorer = Logits(classification("task"))
    assert scorer.columns == 9
    np.testing.assert_array_equal(scorer.score(logits, slot), logits.double().numpy())


def test_the_summary_is_computed_from_the_whole() -> None:
    table = np.array([[0.5, 0, 0, 0.9], [1.5, 1, 0, 0.8], [0.25, 1, 1, 0.7], [0.75, 8, 8, 0.6]])
    summary = classification().summary(table)
    assert summary["loss"] == 0.75 and summary["accuracy"] == 0.75
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert summary["weighted_f1"] == pytest.approx((2 / 3 + 2 * 2 / 3 + 1) / 4)


def test_slots_of_one_stage_are_alike_and_those_of_a_grown_head_are_not() -> None:
    task = classification()
    assert slot_of(task, [(0, 0)]).signature == slot_of(task, []).signature
    grown = Classification([NEW], visible_columns("class", [*BLOCKS, 1]), Frame(FIRST, LAST, PAD), 5)
    assert grown.signature != task.signature
