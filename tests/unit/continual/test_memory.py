"""Which examples a memory keeps: an unbiased sample that is a function of what there was, and of nothing else."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletrain.continual.memory import Balance, Remembered, draw, load_memory, lowest, remember, save_memory
from scaletrain.data.labelled import Example
from scaletrain.errors import CheckpointError, CorpusError, StorageError

BALANCES: list[Balance] = ["class", "none"]


def examples(count: int, label: str = "yes", start: int = 0) -> list[Example]:
    return [Example(f"{label}-{number}", f"text {number}", None, label) for number in range(start, start + count)]


def drawn(task: str, some: list[Example], seed: int = 1) -> list[Remembered]:
    return [Remembered(task, example, draw(seed, task, example.key)) for example in some]


def keys(memory: tuple[Remembered, ...]) -> list[str]:
    return [kept.example.key for kept in memory]


POOL = [
    kept
    for task, label, count in [("a", "x", 9), ("a", "y", 2), ("b", "x", 14), ("b", "z", 5), ("c", "y", 1), ("0", "x", 6)]
    for kept in drawn(task, examples(count, label))
]
"""Six groups of unlike sizes over four tasks, of which one comes first by name and last in time."""


def test_every_example_is_kept_equally_often() -> None:
    total, capacity, seeds = 50, 10, 1500
    some = examples(total)
    counts = Counter(
        key for seed in range(seeds) for key in keys(remember([], "a", some, capacity=capacity, balance="none", seed=seed))
    )
    observed = np.array([counts[example.key] for example in some])
    expected = seeds * capacity / total
    # Without replacement, within one seed the counts are negatively correlated: hence 1 - M/n, and (n - 1)/n for their fixed sum.
    statistic = ((observed - expected) ** 2).sum() / (expected * (1 - capacity / total)) * (total - 1) / total
    assert abs(statistic - (total - 1)) < 4 * np.sqrt(2 * (total - 1))


def test_neighbouring_examples_are_kept_independently() -> None:
    seeds, some = 2000, examples(20)
    kept = [set(keys(remember([], "a", some, capacity=5, balance="none", seed=seed))) for seed in range(seeds)]
    both = sum(some[0].key in memory and some[1].key in memory for memory in kept)
    expected = seeds * (5 / 20) * (4 / 19)
    assert abs(both - expected) < 4 * np.sqrt(expected)


def test_the_draws_are_those_of_every_release() -> None:
    # A lineage keeps its memory over years: another hash would mix two samples.
    assert draw(1, "csv", "k1") == 10638662896883771592
    assert draw(2, "csv", "k1") == 309331955298328893
    assert draw(1, "json", "k1") == 15500711506079923149


@pytest.mark.parametrize("balance", BALANCES)
@given(order=st.randoms(use_true_random=False), capacity=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_examples_does_not_matter(balance: Balance, order: random.Random, capacity: int) -> None:
    shuffled = POOL.copy()
    order.shuffle(shuffled)
    assert lowest(shuffled, capacity, balance) == lowest(POOL, capacity, balance)


@pytest.mark.parametrize("balance", BALANCES)
@given(order=st.randoms(use_true_random=False), parts=st.integers(1, 6), capacity=st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_what_parts_keep_is_enough_for_the_whole(balance: Balance, order: random.Random, parts: int, capacity: int) -> None:
    dealt: list[list[Remembered]] = [[] for _ in range(parts)]
    for candidate in POOL:
        order.choice(dealt).append(candidate)
    merged: tuple[Remembered, ...] = ()
    for part in dealt:
        merged = lowest([*merged, *lowest(part, capacity, balance)], capacity, balance)
    assert merged == lowest(POOL, capacity, balance)


@pytest.mark.parametrize("balance", BALANCES)
def test_task_after_task_or_all_at_once_is_the_same(balance: Balance) -> None:
    stream = {"m": examples(30, "x"), "z": examples(10, "y") + examples(3, "z"), "a": examples(50, "x")}
    memory: tuple[Remembered, ...] = ()
    for task, some in stream.items():
        memory = remember(memory, task, some, capacity=17, balance=balance, seed=5)
    everything = [kept for task, some in stream.items() for kept in drawn(task, some, seed=5)]
    assert memory == lowest(everything, 17, balance)


def test_the_same_task_twice_is_the_same_as_once() -> None:
    once = remember([], "a", examples(30), capacity=10, balance="class", seed=1)
    assert remember(once, "a", examples(30), capacity=10, balance="class", seed=1) == once


def test_the_lowest_draws_are_kept_in_their_order() -> None:
    everything = sorted(drawn("a", examples(30)), key=lambda kept: kept.draw)
    assert lowest(everything, 7, "none") == tuple(everything[:7])


def test_a_memory_that_shrinks_drops_the_largest_draws() -> None:
    large = lowest(POOL, 20, "none")
    assert lowest(large, 8, "none") == large[:8]


def test_classes_share_the_capacity_and_the_first_by_name_take_the_rest() -> None:
    memory = remember([], "a", examples(9, "x") + examples(9, "y") + examples(9, "z"), capacity=11, balance="class", seed=1)
    assert Counter(kept.example.label for kept in memory) == {"x": 4, "y": 4, "z": 3}


def test_a_label_of_another_task_is_another_class() -> None:
    memory = remember([], "b", examples(9, "x"), capacity=10, balance="class", seed=1)
    memory = remember(memory, "a", examples(9, "x") + examples(9, "y"), capacity=10, balance="class", seed=1)
    assert Counter((kept.task, kept.example.label) for kept in memory) == {("a", "x"): 4, ("a", "y"): 3, ("b", "x"): 3}


def test_when_classes_are_added_the_older_ones_lose_their_largest_draws() -> None:
    before = remember([], "b", examples(9, "x"), capacity=6, balance="class", seed=1)
    after = remember(before, "a", examples(9, "y"), capacity=6, balance="class", seed=1)
    assert [kept for kept in after if kept.task == "b"] == list(before[:3])


def test_what_a_small_class_leaves_free_stays_free() -> None:
    memory = remember([], "a", examples(2, "x") + examples(90, "y"), capacity=10, balance="class", seed=1)
    assert Counter(kept.example.label for kept in memory) == {"x": 2, "y": 5}


def test_more_classes_than_places_leave_some_without() -> None:
    some = [example for label in "vwxyz" for example in examples(3, label)]
    memory = remember([], "a", some, capacity=3, balance="class", seed=1)
    assert Counter(kept.example.label for kept in memory) == {"v": 1, "w": 1, "x": 1}


def test_another_seed_keeps_others() -> None:
    assert keys(remember([], "a", examples(90), capacity=9, balance="none", seed=1)) != keys(
        remember([], "a", examples(90), capacity=9, balance="none", seed=2)
    )


def test_two_examples_with_one_key_are_an_error() -> None:
    twins = [Example("k", "one text", None, "x"), Example("k", "another", None, "x")]
    with pytest.raises(CorpusError, match="key of an example of task a: got 'k'"):
        remember([], "a", twins, capacity=5, balance="none", seed=1)


def test_a_memory_on_disk_is_the_memory(tmp_path: Path) -> None:
    odd = [Example("k\u2028\n", 'ümlaut \x85 "quoted"\n', "the \U0001f600 pair", "x"), Example("k2", "", None, "y")]
    memory = remember([], "tásk", [*odd, *examples(20)], capacity=15, balance="none", seed=1)
    save_memory(tmp_path, memory)
    assert load_memory(tmp_path) == memory
    save_memory(tmp_path, ())
    assert load_memory(tmp_path) == ()


@pytest.mark.parametrize(
    "line", ['{"task": "a"}', "{", "[]", '{"task": "a", "draw": 1, "key": "k", "text": "t", "label": "l", "x": 1}']
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: str) -> None:
    save_memory(tmp_path, tuple(drawn("a", examples(2))))
    file = tmp_path / "memory.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match=r"memory\.jsonl:3: "):
        load_memory(tmp_path)


def test_a_missing_memory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"memory\.jsonl: got 'No such file"):
        load_memory(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        save_memory(tmp_path / "nowhere", ())
