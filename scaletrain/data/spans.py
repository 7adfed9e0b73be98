"""Spans of whole words to hide, after SpanBERT (Joshi et al., arXiv 1907.10529, section 3.1).

Spans are drawn one after the other until the budget of the chunk is spent: a length in words from a geometric distribution that
is cut off at a longest one, and a first word, uniform over those not hidden yet. A span ends before one that was there already,
at the end of its chunk, and at the word that spends the budget.

The draws are keyed by the chunk, so all chunks are done at once: every candidate is drawn first, and which of them stand follows
from how they cover each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from scaletrain.data import keyed
from scaletrain.data.plan import I64

_LENGTH, _START, _ROUNDING = 3, 4, 5
"""Beside the draws of `masking`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanConfig:
    """How long spans are: 3.8 words on average with the paper's values."""

    stop: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Chance that a span ends after any of its words: the p of the geometric distribution."""
    longest: Annotated[int, Field(ge=1, le=64)] = 10
    """Words in the longest span; no longer one is drawn."""

    def law(self) -> NDArray[np.float64]:
        """The chance of each length from 1 to ``longest``."""
        falling = np.power(1 - self.stop, np.arange(self.longest), dtype=np.float64)
        law: NDArray[np.float64] = falling / falling.sum()
        return law


class Words(NamedTuple):
    """The words of some chunks, end to end. ``in_chunk`` [chunks]: how many each has; ``sizes`` [words]: tokens to be hidden in
    each, special ones not counted."""

    in_chunk: I64
    sizes: I64


def choose(words: Words, keys: keyed.U64, rate: float, config: SpanConfig) -> I64:
    """The span that hides each word, int64 [words]: its number in its chunk, counted from 0, or -1 where the word stays.

    ``rate`` of a chunk's tokens are to be hidden, a count that is rounded up or down by chance; what exceeds it is less than the
    last word.
    """
    chunk = np.repeat(np.arange(len(keys)), words.in_chunk)
    tokens = np.bincount(chunk, words.sizes, len(keys))
    budgets = np.floor(rate * tokens + keyed.uniform(keyed.derive(keys, _ROUNDING), 0)).astype(np.int64)
    # Twice as many again where the candidates did not do: those before them, and what follows from them, stay as they were.
    candidates = np.where(budgets > 0, budgets // 3 + 8, 0)
    while True:
        spans, spent = _spend(words, budgets, candidates, keys, config)
        short = spent < budgets
        if not short.any():
            return spans
        candidates[short] *= 2


def _spend(words: Words, budgets: I64, candidates: I64, keys: keyed.U64, config: SpanConfig) -> tuple[I64, I64]:
    """The spans that some candidates give, as of ``choose``, and how many tokens of each chunk all of them would hide."""
    before = np.cumsum(candidates) - candidates
    owner = np.repeat(np.arange(len(keys)), candidates)
    number = np.arange(len(owner)) - before[owner]
    begins = np.cumsum(words.in_chunk) - words.in_chunk
    starts, stops = (keyed.number(keyed.derive_at(keyed.derive(keys, draw)[owner], number)) for draw in (_START, _LENGTH))
    first = begins[owner] + (starts * words.in_chunk[owner]).astype(np.int64)
    drawn = np.searchsorted(np.cumsum(config.law())[:-1], stops, side="right")
    lengths = np.minimum(drawn + 1, (begins + words.in_chunk)[owner] - first)

    cover = _cover(first, lengths, len(words.sizes))
    covered = np.flatnonzero(cover < len(owner))
    covered = covered[np.argsort(cover[covered], kind="stable")]  # by chunk, then by span, then by place
    sizes, chunk = words.sizes[covered], owner[cover[covered]]
    spent = np.bincount(chunk, sizes, len(keys)).astype(np.int64)
    earlier = np.cumsum(sizes) - sizes - (np.cumsum(spent) - spent)[chunk]
    hidden = covered[earlier < budgets[chunk]]
    spans = np.full(len(words.sizes), -1)
    spans[hidden] = number[cover[hidden]]
    return spans, spent


def _cover(first: I64, lengths: I64, n_words: int) -> I64:
    """The first of the candidates that stand to cover each word, or their number. One stands if none before it covers its start.

    Found by going over all of them until nothing changes: after n rounds those are right that hang on fewer than n others.
    """
    span = np.repeat(np.arange(len(first)), lengths)
    word = np.arange(len(span)) + (first - (np.cumsum(lengths) - lengths))[span]
    stands = np.ones(len(first), dtype=np.bool_)
    while True:
        cover = np.full(n_words, len(first))
        standing = stands[span]
        np.minimum.at(cover, word[standing], span[standing])
        again = cover[first] >= np.arange(len(first))
        if np.array_equal(again, stands):
            return cover
        stands = again
