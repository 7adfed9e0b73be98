"""Scores of a classification, against numbers worked out by hand and against the definitions."""

from __future__ import annotations

import numpy as np
import pytest

from scaletrain.tasks.confusion import Confusion, report_text

TRUE = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 2, 1])
LABELS = ["a", "b", "c", "never"]


@pytest.fixture
def confusion() -> Confusion:
    return Confusion.of(TRUE, PREDICTED, len(LABELS))


def test_rows_are_truth_and_columns_predictions(confusion: Confusion) -> None:
    assert confusion.counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_accuracy_is_the_share_of_the_diagonal(confusion: Confusion) -> None:
    assert confusion.accuracy == 3 / 6


def test_f1_by_hand(confusion: Confusion) -> None:
    """a: precision 1, recall 2/3, F1 4/5. b: 1/3, 1/2, 2/5. c: 0. `never` occurs nowhere and is in no mean."""
    assert confusion.macro_f1 == pytest.approx((0.8 + 0.4 + 0.0) / 3)
    assert confusion.weighted_f1 == pytest.approx((3 * 0.8 + 2 * 0.4 + 1 * 0.0) / 6)


def test_the_report_leaves_out_labels_without_a_trace(confusion: Confusion) -> None:
    rows = confusion.per_label(LABELS)
    assert [(row["label"], row["support"]) for row in rows] == [("a", 3), ("b", 2), ("c", 1)]
    assert rows[1]["precision"] == pytest.approx(1 / 3) and rows[1]["recall"] == 0.5
    assert report_text(rows).splitlines()[1].split() == ["a", "1.000", "0.667", "0.800", "3"]


def test_a_label_that_is_only_predicted_counts_in_the_macro_mean() -> None:
    assert Confusion.of(np.array([0, 0]), np.array([0, 1]), 2).macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_mistakes_are_listed_by_their_number(confusion: Confusion) -> None:
    worst = confusion.worst(LABELS)
    assert [(each["true"], each["predicted"], each["count"]) for each in worst] == [("a", "b", 1), ("b", "c", 1), ("c", "b", 1)]


def test_against_the_definitions_on_random_labels() -> None:
    generator = np.random.default_rng(3)
    true, predicted = generator.integers(0, 7, 500), generator.integers(0, 7, 500)
    confusion = Confusion.of(true, predicted, 7)
    f1 = []
    for label in range(7):
        hit = int(((true == label) & (predicted == label)).sum())
        f1.append(2 * hit / (int((true == label).sum()) + int((predicted == label).sum())))
    assert confusion.macro_f1 == pytest.approx(float(np.mean(f1)))
    assert confusion.weighted_f1 == pytest.approx(sum(f1[label] for label in true) / 500)
