"""How the chunks of one step are dealt into slots, and slots into rounds: arithmetic on lengths, the same on every rank.

A slot is one micro-batch. Where rows are padded, chunks are sorted by length and cut into contiguous runs, so that a slot holds
like lengths; the cuts make the costliest slot as cheap as possible. Without padding nothing is lost by mixing lengths: each chunk
goes where there is least so far, so that slots are alike in tokens, and nearly so in attention, which costs a length's square.
The number of slots K is the smallest multiple of ``slot_multiple`` for which every slot of contiguous runs fits
``micro_batch_tokens``. None of this knows the number of ranks: rank r of W runs slots r, r + W, ..., one in each
round, and because slots are ordered by cost those of one round are alike whatever W is. Where W does not divide K, the last
round is filled up with slots of weight zero.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from scaletrain.data.plan import I64, Picks, StepPlan
from scaletrain.errors import CheckpointError, ConfigError, WorldSizeError

Layout = Literal["padded", "unpadded"]

SPECIAL_TOKENS = 2
"""Every chunk gets a first and a last token when it is collated; they count."""

MAX_WASTE = 0.10
"""Largest share of slots that may do nothing: above it the ranks would be better used otherwise."""

SAMPLED_STEPS = 64
"""Steps, evenly spaced over the run, from which the waste of a number of ranks is estimated."""

LARGEST_ADVISED_WORLD = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotConfig:
    """How large a micro-batch is, and how many of them make a step."""

    micro_batch_tokens: Annotated[int, Field(ge=8)] = 8192
    """Most tokens of a slot, padding and special tokens included: what the memory of one device can take."""
    slot_multiple: Annotated[int, Field(ge=1)] | None = None
    """The number of slots in a step is a multiple of this. Empty: the number of ranks of the fresh start, kept from then on. A
    job that is to shrink and grow sets a number that its future numbers of ranks divide: 12, 24, 64."""
    pad_multiple: Annotated[int, Field(ge=1)] = 1
    """Rows are padded to a multiple of this; 8 suits GPUs when the micro-batches are small."""


@dataclass(frozen=True, slots=True)
class Dealing:
    """The rule that deals a step, complete: stored with a run, because what a slot holds follows from it."""

    micro_batch_tokens: int
    slot_multiple: int
    pad_multiple: int
    layout: Layout
    spread: bool = False
    """Whether unpadded chunks are spread over the slots one by one. Runs that were started before there was a choice have no such
    entry: they keep their contiguous slots."""

    @classmethod
    def of(cls, config: SlotConfig, layout: Layout, world: int) -> Dealing:
        """The rule of a fresh start on ``world`` ranks."""
        multiple = config.slot_multiple or world
        return cls(config.micro_batch_tokens, multiple, config.pad_multiple, layout, spread=layout == "unpadded")

    def check(self, config: SlotConfig, layout: Layout) -> None:
        """Raises CheckpointError for settings that say otherwise than the run's own rule; an empty slot_multiple says nothing."""
        asked = asdict(config) | {"layout": layout}
        for name, kept in asdict(self).items():
            if asked.get(name) is not None and asked[name] != kept:
                where = "model.layout" if name == "layout" else f"slots.{name}"
                rule = f"this run was started with {kept!r}, and what a slot holds follows from it"
                raise CheckpointError(where, asked[name], rule, "Set it back, or start again in another folder")


class Rounds(NamedTuple):
    """How many slots each rank runs, and how many of those, over all ranks, only fill up the last round."""

    per_rank: int
    fillers: int


def rounds(slots: int, world: int) -> Rounds:
    """Rounds that ``slots`` slots take on ``world`` ranks."""
    per_rank = -(-slots // world)
    return Rounds(per_rank, per_rank * world - slots)


def slots_of_rank(slots: int, rank: int, world: int) -> range:
    """Slot numbers of one rank, one per round; numbers from ``slots`` on are fillers."""
    return range(rank, rounds(slots, world).per_rank * world, world)


def deal(lengths: NDArray[Any], dealing: Dealing) -> list[I64]:
    """Deals n chunks of ``lengths`` tokens (special tokens not counted) into K slots.

    Returns K arrays of places in ``lengths``, costliest slot first, longest chunk first inside a slot; together they hold every
    place once. Slots are empty only where there are fewer chunks than slots. Raises ConfigError for a chunk that alone does not
    fit.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    runs = _Runs(lengths[order], dealing)
    slots = runs.slots()
    low, high = runs.longest, dealing.micro_batch_tokens
    while low < high:  # the smallest limit under which the runs are no more than the slots
        limit = (low + high) // 2
        low, high = (low, limit) if len(runs.cut(limit)) <= slots else (limit + 1, high)
    if dealing.spread and (mixed := _spread(runs.rows, slots, high)):
        return [order[np.array(places, dtype=np.int64)] for places in mixed]
    bounds = _split(runs.cut(high), slots, runs.cost)
    bounds.sort(key=lambda run: (-runs.cost(*run), run))
    return [order[begin:end] for begin, end in bounds] + [order[:0]] * (slots - len(bounds))


class _Runs:
    """Chunks from the longest to the shortest, and the contiguous runs that they can be cut into."""

    def __init__(self, descending: NDArray[Any], dealing: Dealing) -> None:
        rows = descending.astype(np.int64) + SPECIAL_TOKENS
        self._dealing = dealing
        self._padded = dealing.layout == "padded"
        if self._padded:
            rows = -(-rows // dealing.pad_multiple) * dealing.pad_multiple
        self.rows: list[int] = rows.tolist()
        self._ends: list[int] = np.cumsum(rows).tolist()
        self.longest = self.rows[0] if self.rows else 0
        if self.longest > dealing.micro_batch_tokens:
            rule = f"the longest chunk takes {self.longest} tokens, special tokens included, and a slot must hold it"
            remedy = f"Set it to at least {self.longest}, or prepare the data with a smaller max_tokens"
            raise ConfigError("slots.micro_batch_tokens", dealing.micro_batch_tokens, rule, remedy)

    def cost(self, begin: int, end: int) -> int:
        """Tokens that a slot of these chunks computes."""
        if self._padded:
            return (end - begin) * self.rows[begin]
        return self._ends[end - 1] - self._ends[begin] + self.rows[begin]

    def cut(self, limit: int) -> list[tuple[int, int]]:
        """The fewest contiguous runs that cost at most ``limit`` each: every one as long as it can be."""
        runs, begin, chunks = [], 0, len(self.rows)
        while begin < chunks:
            if self._padded:
                end = min(begin + limit // self.rows[begin], chunks)
            else:
                end = bisect_right(self._ends, self._ends[begin] - self.rows[begin] + limit)
            runs.append((begin, end))
            begin = end
        return runs

    def slots(self) -> int:
        """K of the contract; a step has at least one multiple of slots, even when it has no chunk."""
        multiple = self._dealing.slot_multiple
        return max(-(-len(self.cut(self._dealing.micro_batch_tokens)) // multiple), 1) * multiple


def _spread(rows: list[int], slots: int, limit: int) -> list[list[int]] | None:
    """Each row, the longest first, into the slot that has the least so far; None where a slot then has more than ``limit``.

    The LPT rule; its costliest slot is within 4/3 - 1/(3 slots) of the cheapest that can be (Graham, "Bounds on multiprocessing
    timing anomalies", 1969).
    """
    filled = [(0, number) for number in range(slots)]
    places: list[list[int]] = [[] for _ in range(slots)]
    for place, row in enumerate(rows):
        cost, number = filled[0]
        places[number].append(place)
        heapq.heapreplace(filled, (cost + row, number))
    costliest_first = sorted(filled, key=lambda slot: (-slot[0], slot[1]))
    return [places[number] for _, number in costliest_first] if costliest_first[0][0] <= limit else None


def _split(runs: list[tuple[int, int]], slots: int, cost: Callable[[int, int], int]) -> list[tuple[int, int]]:
    """Halves the costliest runs until there are as many as slots: an empty slot would take a pass of the model for nothing."""
    queue = [(-cost(*run), run) for run in runs]
    heapq.heapify(queue)
    whole: list[tuple[int, int]] = []
    while queue and len(queue) + len(whole) < slots:
        _, (begin, end) = heapq.heappop(queue)
        if end - begin == 1:
            whole.append((begin, end))
            continue
        middle = (begin + end) // 2
        for half in ((begin, middle), (middle, end)):
            heapq.heappush(queue, (-cost(*half), half))
    return whole + [run for _, run in queue]


@dataclass(frozen=True, slots=True)
class DealtPlan:
    """A plan and the rule that deals its steps: what every slot of a run holds. ``lengths`` has an array of tokens per corpus."""

    plan: StepPlan
    lengths: Sequence[NDArray[Any]]
    dealing: Dealing

    @property
    def steps(self) -> int:
        """Steps of the plan."""
        return self.plan.steps

    def slots(self, step: int) -> list[Picks]:
        """The samples of each of the K slots of a step. Raises ConfigError for a chunk that does not fit a slot."""
        picks = self.plan.picks(step)
        return [picks[places] for places in deal(self._lengths_of(picks), self.dealing)]

    def check_chunks(self) -> None:
        """Raises ConfigError if any chunk of any corpus does not fit a slot: a run must not find out at its last step."""
        for lengths in self.lengths:
            _Runs(lengths.max(initial=0).reshape(1), self.dealing)

    def waste(self, world: int) -> float:
        """Share of slots with no chunk in them when ``world`` ranks run the plan: 0 to 1, the mean over a sample of steps."""
        return self._needs().waste(self.dealing.slot_multiple, world)

    def check_world(self, world: int, *, multiple_follows: bool) -> float:
        """The waste of ``world`` ranks; raises WorldSizeError above 10 %, naming the share and the numbers of ranks that fit.

        ``multiple_follows``: on a fresh start that sets no slot multiple, another number of ranks would bring its own.
        """
        needs, multiple = self._needs(), self.dealing.slot_multiple
        waste = needs.waste(multiple, world)
        if waste <= MAX_WASTE:
            return waste
        worlds = range(1, LARGEST_ADVISED_WORLD + 1)
        fit = [str(n) for n in worlds if needs.waste(n if multiple_follows else multiple, n) <= MAX_WASTE]
        rule = f"{waste:.0%} of the slots would do nothing, and at most {MAX_WASTE:.0%} may (slots.slot_multiple is {multiple})"
        remedy = f"Sizes that fit: {', '.join(fit) or 'none'}. Or take more chunks per step, or smaller micro-batches"
        raise WorldSizeError("world size", world, rule, remedy)

    def _needs(self) -> _Needs:
        steps = np.unique(np.linspace(0, self.steps - 1, min(self.steps, SAMPLED_STEPS)).astype(np.int64))
        needed, chunks = [], []
        for step in steps:
            lengths = self._lengths_of(self.plan.picks(int(step)))
            needed.append(len(_Runs(-np.sort(-lengths), self.dealing).cut(self.dealing.micro_batch_tokens)))
            chunks.append(len(lengths))
        return _Needs(np.array(needed), np.array(chunks))

    def _lengths_of(self, picks: Picks) -> I64:
        lengths = np.empty(len(picks), dtype=np.int64)
        for corpus in np.unique(picks.corpus):
            mine = picks.corpus == corpus
            lengths[mine] = self.lengths[corpus][picks.chunk[mine]]
        return lengths


@dataclass(frozen=True, slots=True)
class _Needs:
    """For some steps, the fewest slots that hold the chunks, and the number of chunks."""

    slots: I64
    chunks: I64

    def waste(self, multiple: int, world: int) -> float:
        dealt = np.maximum(-(-self.slots // multiple), 1) * multiple
        run = -(-dealt // world) * world
        return 1.0 - float(np.minimum(dealt, self.chunks).sum() / run.sum())
