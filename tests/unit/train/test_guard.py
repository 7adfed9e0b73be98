"""What a guard decides, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaletrain.data.loader import Batch
from scaletrain.errors import CheckpointError, ConfigError, DivergedError
from scaletrain.train.guard import Guard, GuardConfig


def guard(folder: Path = Path(), **settings: Any) -> Guard:
    return Guard(GuardConfig(**settings), lambda step: [f"s{step}.{n}" for n in range(10)], folder)


def test_what_is_not_finite_is_left_out_and_never_enters_the_window() -> None:
    made = guard(spikes="skip", spike_window=8)
    reasons = [made.judge(step, loss, 1.0) for step, loss in enumerate([1.0, math.nan, 2.0, math.inf], 1)]
    assert [bool(reason) for reason in reasons] == [False, True, False, True]
    assert made.state()["windows"] == {"loss": [1.0, 2.0], "gradient norm": [1.0, 1.0]}
    assert made.skipped == [2, 4]


def test_too_many_in_a_row_are_named_and_one_that_is_taken_starts_the_count_anew(tmp_path: Path) -> None:
    made = guard(tmp_path, consecutive=2)
    for step, norm in enumerate([math.nan, 1.0, math.inf], 1):
        made.judge(step, 1.0, norm)
        made.check()
    made.judge(4, 1.0, math.nan)
    with pytest.raises(DivergedError) as found:
        made.check()
    assert "steps 3 to 4 could not be taken (not finite: loss 1.0, gradient norm nan)" in str(found.value)
    assert "step 3: s3.0, s3.1, s3.2, s3.3, s3.4, s3.5, s3.6, s3.7 and 2 more; step 4:" in str(found.value)
    assert list(json.loads((tmp_path / "diverged.json").read_text())["samples"]["4"]) == [f"s4.{n}" for n in range(10)]


def test_a_spike_is_far_above_the_median_in_deviations_of_the_window() -> None:
    """1.4826 times the median absolute deviation is 1.4826 for 1 .. 8 doubled: the bound lies at 9 + 6 * 1.4826 * 4."""
    window, bound = [2.0 * n for n in range(1, 9)], 9 + 6 * 1.4826 * 4
    for above, spike in ((-1e-6, False), (1e-6, True)):
        made = guard(spikes="skip", spike_window=8)
        for step, value in enumerate(window, 1):
            assert made.judge(step, value, 1.0) is None
        reason = made.judge(9, bound + above, 1.0)
        assert bool(reason) is spike
        if spike:
            assert str(reason).startswith("spike: loss ")


def test_nothing_is_a_spike_before_the_window_is_full_or_below_it_or_where_it_is_flat() -> None:
    made = guard(spikes="skip", spike_window=8)
    assert [made.judge(step, 10.0**step, 1.0) for step in range(1, 9)] == [None] * 8
    flat = guard(spikes="skip", spike_window=8)
    for step in range(1, 9):
        flat.judge(step, 5.0, 1.0)
    assert flat.judge(9, 5.2, 1.0) is None
    assert flat.judge(10, 0.1, 0.1) is None
    assert flat.judge(11, 5.5, 1.0) is not None


def test_a_spike_may_end_the_run_at_once(tmp_path: Path) -> None:
    made = guard(tmp_path, spikes="stop", spike_window=8)
    for step in range(1, 9):
        made.judge(step, 1.0, 1.0)
        made.check()
    made.judge(9, 1.0, math.nan)
    made.check()
    made.judge(10, 1.0, 50.0)
    with pytest.raises(DivergedError, match="spike: gradient norm 50"):
        made.check()


def test_a_guard_goes_on_from_its_state_as_json() -> None:
    whole, half = (guard(spikes="skip", spike_window=8, pass_over=((3, 4),)) for _ in range(2))
    values = [(1.0 / 3 + 0.01 * n, 1.0 / 7) for n in range(20)]
    said = [whole.judge(step, *value) for step, value in enumerate(values, 1)]
    for step, value in enumerate(values[:10], 1):
        half.judge(step, *value)
    resumed = guard(spikes="skip", spike_window=8, pass_over=((3, 4),))
    resumed.resume(json.loads(json.dumps(half.state())), 10)
    assert [resumed.judge(step, *value) for step, value in enumerate(values[10:], 11)] == said[10:]
    assert resumed.state() == whole.state()


@pytest.mark.parametrize(
    ("now", "fine"), [([(3, 4)], True), ([(3, 4), (6, 6)], True), ([], False), ([(3, 5)], False), ([(3, 9)], False)]
)
def test_only_what_was_left_out_may_be_passed_over_afterwards(now: list[tuple[int, int]], fine: bool) -> None:
    before = guard(pass_over=((3, 4),), consecutive=1)
    for step in range(1, 7):
        before.judge(step, math.nan if step == 6 else 1.0, 1.0)
    resumed = guard(pass_over=tuple(now), consecutive=1)
    if fine:
        resumed.resume(before.state(), 6)
        assert resumed.state()["row"] == ([6] if now == [(3, 4)] else [])
    else:
        with pytest.raises(CheckpointError, match=r"guard.pass_over: got .*; of the 6 steps so far"):
            resumed.resume(before.state(), 6)


def test_steps_that_are_passed_over_are_not_read() -> None:
    asked: list[tuple[int, int]] = []

    def read(first: int, last: int) -> Iterator[Batch]:
        asked.append((first, last))
        yield from (Batch(step, (), {"mlm": 1}, 1, 1, 0, 10 * step + 10) for step in range(first, last))

    batches = list(guard(pass_over=((1, 1), (4, 5), (9, 12))).batches(read, 0, 10, lambda step: 10 * step))
    assert asked == [(1, 3), (5, 8)]
    assert [batch.step for batch in batches] == list(range(10))
    assert [batch.samples_after for batch in batches] == [10 * n for n in range(1, 11)]
    assert [bool(batch.counts) for batch in batches] == [n in (1, 2, 5, 6, 7) for n in range(10)]


def test_a_range_has_its_first_step_first() -> None:
    with pytest.raises(ConfigError, match=r"guard.pass_over.1: got \[4, 3\]"):
        GuardConfig(pass_over=((1, 2), (4, 3)))
