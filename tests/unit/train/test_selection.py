"""Which checkpoint is kept, and when a run has seen enough."""

from __future__ import annotations

import math
from typing import Any

import pytest

from scaletrain.train.selection import Selection, SelectionConfig


def offered(scores: list[float], **settings: Any) -> Selection:
    selection = Selection(SelectionConfig(**settings))
    for step, score in enumerate(scores, start=1):
        selection.offer(step, {selection.config.metric: score})
    return selection


def test_the_best_is_the_highest_and_the_earliest_of_equals() -> None:
    assert offered([0.5, 0.7, 0.6, 0.7]).best_step == 2


def test_of_losses_the_lowest_is_the_best() -> None:
    assert offered([0.5, 0.3, 0.6], metric="loss").best_step == 2


def test_a_gain_that_is_too_small_is_none() -> None:
    assert offered([0.5, 0.505], minimum_gain=0.01).best_step == 1


@pytest.mark.parametrize(("scores", "exhausted"), [([0.5, 0.4], False), ([0.5, 0.4, 0.4], True), ([0.5, 0.4, 0.6, 0.5], False)])
def test_patience_counts_evaluations_since_the_best(scores: list[float], exhausted: bool) -> None:
    assert offered(scores, patience=2).exhausted is exhausted


def test_without_patience_a_run_never_ends_early() -> None:
    assert not offered([0.9] + [0.1] * 100).exhausted


def test_a_resumed_selection_goes_on_where_it_was() -> None:
    """At every cut: what is decided after it does not depend on the cut."""
    scores = [0.2, 0.5, 0.5, 0.4, 0.6, 0.1]
    whole = offered(scores, patience=3)
    for cut in range(len(scores) + 1):
        selection = Selection.resumed(whole.config, offered(scores[:cut], patience=3).state())
        for step, score in enumerate(scores[cut:], start=cut + 1):
            selection.offer(step, {"accuracy": score})
        assert selection.state() == whole.state()


def test_a_score_that_is_not_a_number_is_never_the_best() -> None:
    """Compared with nothing, it would be; and after it, nothing would be better."""
    selection = Selection(SelectionConfig(metric="loss", patience=3))
    assert [selection.offer(step, {"loss": loss}) for step, loss in enumerate([math.nan, 2.0, math.nan, 1.0])] == [
        False,
        True,
        False,
        True,
    ]
    assert (selection.best_step, selection.since_best) == (3, 0)
