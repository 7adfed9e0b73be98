"""Slots and rounds: who runs which chunks together, whatever the number of ranks."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from scaletrain.data.plan import CorpusShape, PhaseShape, Plan
from scaletrain.data.slots import Dealing, DealtPlan, Layout, SlotConfig, deal, rounds, slots_of_rank
from scaletrain.errors import ConfigError, WorldSizeError

LAYOUTS: list[Layout] = ["padded", "unpadded"]
SPREAD = SlotConfig(micro_batch_tokens=1024, slot_multiple=8)


def skewed(n: int, seed: int = 0) -> np.ndarray:
    """Lengths as in real text: many short ones, a few at the limit."""
    return np.clip(np.random.default_rng(seed).lognormal(3.5, 0.9, n), 1, 126).astype(np.int32)


def cost(lengths: np.ndarray, dealing: Dealing) -> int:
    """Tokens that a slot of these chunks computes, counted the slow way."""
    rows = [int(length) + 2 for length in lengths]
    if dealing.layout == "unpadded" or not rows:
        return sum(rows)
    longest = max(rows)
    while longest % dealing.pad_multiple:
        longest += 1
    return longest * len(rows)


def dealt(n: int, dealing: Dealing, steps: int = 10) -> DealtPlan:
    lengths = skewed(10_000)
    return DealtPlan(Plan(1, [PhaseShape((CorpusShape("a", 10_000),), n, steps)]), [lengths], dealing)


@pytest.mark.parametrize(("layout", "spread"), [("padded", False), ("unpadded", False), ("unpadded", True)])
@pytest.mark.parametrize(("n", "tokens", "multiple"), [(1, 200, 1), (3, 200, 8), (200, 512, 1), (200, 512, 12), (999, 4096, 4)])
def test_every_chunk_is_in_one_slot_that_fits(n: int, tokens: int, multiple: int, layout: Layout, spread: bool) -> None:
    lengths, dealing = skewed(n), Dealing(tokens, multiple, 8, layout, spread)
    slots = deal(lengths, dealing)
    assert sorted(np.concatenate(slots)) == list(range(n))
    assert max(cost(lengths[slot], dealing) for slot in slots) <= tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_slots_is_the_smallest_multiple_that_fits(layout: Layout) -> None:
    """One multiple fewer does not fit, by trying every way to cut the sorted chunks."""
    lengths, tokens = np.array([9, 30, 30, 14, 6, 21, 18, 11]), 64
    dealing = Dealing(tokens, 1, 1, layout)

    def cuts(rest: np.ndarray) -> int:
        """Fewest contiguous runs, by exhaustion."""
        sizes = [size for size in range(1, len(rest) + 1) if cost(rest[:size], dealing) <= tokens]
        return 0 if not len(rest) else 1 + min(cuts(rest[size:]) for size in sizes)

    fewest = cuts(np.sort(lengths)[::-1])
    assert len(deal(lengths, dealing)) == fewest
    for multiple in (2, 3, 4):
        assert len(deal(lengths, Dealing(tokens, multiple, 1, layout))) == -(-fewest // multiple) * multiple


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_cut_of_the_sorted_chunks_has_a_cheaper_costliest_slot(layout: Layout) -> None:
    lengths, dealing = np.array([9, 30, 30, 14, 6, 21, 18, 11]), Dealing(128, 3, 1, layout)
    descending = np.sort(lengths)[::-1]
    best = min(
        max(cost(part, dealing) for part in np.split(descending, [first, second]))
        for first in range(1, 7)
        for second in range(first + 1, 8)
    )
    slots = deal(lengths, dealing)
    assert len(slots) == 3
    assert max(cost(lengths[slot], dealing) for slot in slots) == best


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_come_by_falling_cost(layout: Layout) -> None:
    """So the slots of a round are neighbours in cost for every number of ranks."""
    lengths, dealing = skewed(500), Dealing(1024, 8, 1, layout)
    costs = [cost(lengths[slot], dealing) for slot in deal(lengths, dealing)]
    assert costs == sorted(costs, reverse=True)
    assert all(costs[i] - costs[min(i + 3, len(costs) - 1)] < 300 for i in range(0, len(costs), 4))


def test_a_slot_holds_like_lengths() -> None:
    lengths = skewed(1000)
    slots = deal(lengths, Dealing(1024, 1, 1, "padded"))
    spans = sorted((int(lengths[slot].max()), int(lengths[slot].min())) for slot in slots)
    assert all(shorter[0] <= longer[1] for shorter, longer in pairwise(spans))
    padding = 1 - (lengths + 2).sum() / sum(cost(lengths[slot], Dealing(1024, 1, 1, "padded")) for slot in slots)
    assert padding < 0.05


@pytest.mark.parametrize("n", [64, 128, 1000])
def test_unpadded_slots_are_alike_in_tokens_and_in_attention(n: int) -> None:
    """A run that starts now: within a percent in tokens, and in squares of lengths far closer than contiguous runs."""
    lengths, dealing = skewed(n), Dealing.of(SPREAD, "unpadded", world=1)
    slots, cut = deal(lengths, dealing), deal(lengths, replace(dealing, spread=False))
    costs = [cost(lengths[slot], dealing) for slot in slots]
    assert (len(slots), costs) == (len(cut), sorted(costs, reverse=True))
    assert max(costs) < 1.01 * np.mean(costs)
    unlike = [
        max(squares) / np.mean(squares) - 1 for squares in ([((lengths[s] + 2.0) ** 2).sum() for s in d] for d in (slots, cut))
    ]
    assert unlike[0] < unlike[1] / 4
    assert all(lengths[slot].tolist() == sorted(lengths[slot], reverse=True) for slot in slots)


def test_slots_are_contiguous_where_spreading_would_make_one_costlier() -> None:
    lengths = np.array([10, 10, 6, 6, 6])  # rows of 12 12 | 8 8 8; one by one they would be 12 8 8 | 12 8
    slots = deal(lengths, Dealing(28, 2, 1, "unpadded", spread=True))
    assert [slot.tolist() for slot in slots] == [[0, 1], [2, 3, 4]]
    slots = deal(np.array([10, 10, 6, 6]), Dealing(28, 2, 1, "unpadded", spread=True))
    assert [slot.tolist() for slot in slots] == [[0, 2], [1, 3]]


def test_a_run_from_before_there_was_a_choice_keeps_its_slots() -> None:
    stored = {"micro_batch_tokens": 1024, "slot_multiple": 8, "pad_multiple": 1, "layout": "unpadded"}
    kept = Dealing(**stored)
    assert kept != Dealing.of(SPREAD, "unpadded", world=1)
    kept.check(SPREAD, "unpadded")
    assert Dealing.of(SPREAD, "padded", world=1) == Dealing(1024, 8, 1, "padded")


def test_slots_stay_empty_only_where_chunks_are_missing() -> None:
    assert [len(slot) for slot in deal(np.full(3, 10), Dealing(100, 8, 1, "padded"))] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert [len(slot) for slot in deal(np.full(10, 10), Dealing(200, 8, 1, "padded"))] == [2, 2, 1, 1, 1, 1, 1, 1]


def test_chunks_of_one_length_keep_their_order() -> None:
    order = np.concatenate(deal(np.tile([7, 9], 500), Dealing(450, 1, 1, "padded"))).tolist()
    assert order == [*range(1, 1000, 2), *range(0, 1000, 2)]


def test_a_chunk_that_fits_no_slot_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^slots\.micro_batch_tokens: got 64; the longest chunk takes 72 tokens.*at least 72"):
        deal(np.array([5, 70, 6]), Dealing(64, 1, 1, "padded"))
    assert len(deal(np.array([5, 62, 6]), Dealing(64, 1, 1, "padded"))) == 2


def test_padding_to_a_multiple_counts() -> None:
    assert len(deal(np.full(8, 15), Dealing(17 * 8, 1, 1, "padded"))) == 1
    assert len(deal(np.full(8, 15), Dealing(17 * 8, 1, 8, "padded"))) == 2


@pytest.mark.parametrize(
    ("slots", "world", "expected"), [(8, 2, (4, 0)), (8, 3, (3, 1)), (8, 8, (1, 0)), (8, 16, (1, 8)), (1, 1, (1, 0))]
)
def test_rounds_fill_up_with_fillers(slots: int, world: int, expected: tuple[int, int]) -> None:
    assert rounds(slots, world) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 12, 16])
def test_ranks_share_the_slots_and_run_equally_many(world: int) -> None:
    numbers = [list(slots_of_rank(12, rank, world)) for rank in range(world)]
    assert len({len(mine) for mine in numbers}) == 1
    assert sorted(n for mine in numbers for n in mine if n < 12) == list(range(12))
    assert all(mine[0] == rank for rank, mine in enumerate(numbers))


def test_a_dealt_plan_deals_the_picks_of_the_plan() -> None:
    plan = dealt(64, Dealing(512, 4, 1, "padded"))
    picks = plan.plan.picks(3)
    slots = plan.slots(3)
    assert sorted(chunk for slot in slots for chunk in slot.chunk) == sorted(picks.chunk)
    assert [slot.chunk.tolist() for slot in slots] == [
        picks.chunk[s].tolist() for s in deal(plan.lengths[0][picks.chunk], plan.dealing)
    ]


def test_lengths_are_looked_up_in_the_corpus_of_each_pick() -> None:
    corpora = (CorpusShape("long", 50), CorpusShape("short", 50))
    plan = DealtPlan(Plan(1, [PhaseShape(corpora, 20, 5)]), [np.full(50, 100), np.full(50, 10)], Dealing(1020, 1, 1, "padded"))
    assert [set(slot.corpus.tolist()) for slot in plan.slots(2)] == [{0}, {1}]


def test_the_multiple_of_the_fresh_start_is_its_world_size_unless_set() -> None:
    assert Dealing.of(SlotConfig(), "padded", world=6).slot_multiple == 6
    assert Dealing.of(SlotConfig(slot_multiple=24), "padded", world=6).slot_multiple == 24


def test_waste_is_the_share_of_slots_with_nothing_to_do() -> None:
    plan = dealt(64, Dealing(1024, 4, 1, "padded"))
    for world in (1, 3, 4, 5, 8):
        slots = [plan.slots(step) for step in range(plan.steps)]
        run = sum(rounds(len(step), world).per_rank * world for step in slots)
        assert plan.waste(world) == pytest.approx(1 - sum(len(slot) > 0 for step in slots for slot in step) / run)


def test_a_wasteful_world_size_is_refused_with_those_that_fit() -> None:
    plan = dealt(64, Dealing(8192, 24, 1, "padded"))
    assert [plan.check_world(world, multiple_follows=False) for world in (1, 2, 3, 4, 6, 8, 12, 24)] == [0.0] * 8
    assert plan.check_world(13, multiple_follows=False) == pytest.approx(2 / 26)
    with pytest.raises(
        WorldSizeError, match=r"world size: got 16; 25% .* at most 10% .* is 24\)\. Sizes that fit: 1, 2, .*13, 24, 25, 26\."
    ):
        plan.check_world(16, multiple_follows=False)


def test_a_corpus_with_a_chunk_that_fits_no_slot_is_refused_before_the_first_step() -> None:
    plan = dealt(8, Dealing(100, 1, 1, "padded"), steps=1)
    with pytest.raises(ConfigError, match="the longest chunk takes 128 tokens"):
        plan.check_chunks()


def test_a_fresh_start_is_judged_with_the_multiple_that_each_size_would_bring() -> None:
    plan = dealt(10, Dealing(8192, 16, 1, "padded"))
    with pytest.raises(WorldSizeError, match=r"38% of the slots .* Sizes that fit: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\."):
        plan.check_world(16, multiple_follows=True)
    with pytest.raises(WorldSizeError, match="Sizes that fit: none"):
        plan.check_world(16, multiple_follows=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dealing_a_step_of_4096_takes_milliseconds(layout: Layout) -> None:
    lengths, dealing = skewed(4096), Dealing.of(SlotConfig(slot_multiple=8), layout, world=1)
    began = time.process_time()
    for _ in range(5):
        deal(lengths, dealing)
    assert (time.process_time() - began) / 5 < 0.05
