"""What is said of a matrix of results, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from scaletrain.continual import metrics
from scaletrain.continual.metrics import FORMULAS

R = [[0.90, 0.20, 0.10], [0.70, 0.85, 0.15], [0.60, 0.80, 0.95]]
DIPPED = [[0.80, 0.20, 0.10], [0.88, 0.85, 0.15], [0.60, 0.80, 0.95]]
"""The first task is at its best after the second."""


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (metrics.average_accuracy(R), 2.35 / 3),
        (metrics.average_incremental_accuracy(R), (0.90 + 1.55 / 2 + 2.35 / 3) / 3),
        (metrics.forgetting(R), 0.175),
        (metrics.backward_transfer(R), -0.175),
        (metrics.forward_transfer(R, [0.10, 0.10, 0.10]), 0.075),
        (metrics.intransigence(R, 0.96), 0.01),
        (metrics.forgetting(DIPPED), 0.165),
        (metrics.backward_transfer(DIPPED), -0.125),
    ],
)
def test_the_worked_example(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_worked_example_to_five_digits() -> None:
    assert [round(metrics.average_accuracy(R), 5), round(metrics.average_incremental_accuracy(R), 5)] == [0.78333, 0.81944]


def test_forgetting_is_negative_when_the_last_stage_made_old_tasks_better_than_ever() -> None:
    assert metrics.forgetting([[0.5], [0.7, 0.9]]) == pytest.approx(-0.2)


def test_the_last_stage_is_no_best_of_the_past() -> None:
    assert metrics.forgetting([[0.5], [0.6, 0.9], [0.8, 0.7, 0.9]]) == pytest.approx(((0.6 - 0.8) + (0.9 - 0.7)) / 2)


def test_what_lies_beyond_the_diagonal_is_needed_by_forward_transfer_only() -> None:
    triangle = [row[: stage + 1] for stage, row in enumerate(DIPPED)]
    assert metrics.summary(triangle) == metrics.summary(DIPPED)
    with pytest.raises(ValueError, match="after the stage before its own"):
        metrics.forward_transfer(triangle, [0.1, 0.1, 0.1])


def test_a_row_counts_the_tasks_known_by_then() -> None:
    assert metrics.average_accuracy([[0.4, 1.0, 1.0], [0.2, 0.6, 1.0]]) == pytest.approx(0.4)
    assert metrics.average_incremental_accuracy([[0.4, 1.0, 1.0], [0.2, 0.6, 1.0]]) == pytest.approx(0.4)


@pytest.mark.parametrize("metric", [metrics.forgetting, metrics.backward_transfer])
def test_a_single_task_has_nothing_to_forget(metric: object) -> None:
    with pytest.raises(ValueError, match="single row"):
        metric([[0.9]])  # type: ignore[operator]
    assert metrics.summary([[0.9]]) == {"average_accuracy": 0.9, "average_incremental_accuracy": 0.9}


@pytest.mark.parametrize("results", [[], [[0.9], [0.8]]])
def test_rows_that_are_missing_or_short_are_refused(results: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="R"):
        metrics.average_accuracy(results)


def test_recovery_is_the_share_of_what_naive_training_lost() -> None:
    assert metrics.recovery(0.83, 0.24, 0.90) == pytest.approx(0.59 / 0.66)
    assert [metrics.recovery(0.24, 0.24, 0.90), metrics.recovery(0.90, 0.24, 0.90)] == [0, 1]


def test_recovery_needs_something_that_was_lost() -> None:
    with pytest.raises(ValueError, match="nothing to recover"):
        metrics.recovery(0.5, 0.9, 0.9)


def test_every_metric_has_its_formula() -> None:
    functions = {
        name for name, value in vars(metrics).items() if callable(value) and getattr(value, "__module__", "") == metrics.__name__
    }
    assert {name for name in functions if not name.startswith("_")} - {"summary", "table"} == set(FORMULAS)


def test_the_table_shows_r_and_each_number_beside_its_formula() -> None:
    rows = [[0.90], [0.70, 0.85], [0.60, 0.80, 0.95]]
    assert metrics.table(rows, ["csv", "json", "argparse"]).splitlines() == [
        "                   csv    json  argparse",
        "after csv       0.9000",
        "after json      0.7000  0.8500",
        "after argparse  0.6000  0.8000    0.9500",
        "",
        "average_accuracy               0.7833  = 1/T sum_i R[T][i]",
        "average_incremental_accuracy   0.8194  = 1/T sum_t (1/t sum_{i<=t} R[t][i])",
        "forgetting                     0.1750  = 1/(T-1) sum_{i<T} (max_{t<T} R[t][i] - R[T][i])",
        "backward_transfer             -0.1750  = 1/(T-1) sum_{i<T} (R[T][i] - R[i][i])",
    ]


def test_a_table_needs_a_name_for_every_task() -> None:
    with pytest.raises(ValueError, match="2 names for 3 tasks"):
        metrics.table(R, ["a", "b"])
