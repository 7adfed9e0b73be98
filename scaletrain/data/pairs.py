"""Chunks as pairs of parts, with a question about each: did the second follow the first?

The parts lie as [CLS] A [SEP] B [SEP]. The [SEP] between takes the place of the chunk's last token, so that a pair is no longer
than its chunk and fits wherever that did. A chunk is cut in its middle half, where a word starts: it has no marks of sentences.

- ``sop``, sentence order (ALBERT: Lan et al., arXiv 1909.11942): half of the pairs stand in reverse order.
- ``nsp``, next sentence (BERT: Devlin et al., arXiv 1810.04805): in half of them B is a piece of another chunk. It is taken from
  the chunks of the same slot, which are those of the same lengths and do not depend on the number of ranks. Chunks of a document
  have consecutive numbers; one whose number is near is not taken. Where no chunk of the slot is left, as in a slot of one, there
  is nothing to tell apart: the chunk stays as it is, without a question.

All draws are keyed by the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletrain.data import keyed, words
from scaletrain.data.plan import I64, Picks

PairKind = Literal["nsp", "sop"]

NEAR = 16
"""Chunks of one corpus whose numbers differ by this or less may be of one document."""

NO_QUESTION = -100
"""The label of a chunk that is no pair."""

_CUT, _ANSWER, _PARTNER, _PIECE = 6, 7, 8, 9
"""Beside the draws of `masking` and `spans`."""


@dataclass(frozen=True, slots=True, eq=False)
class PairRule:
    """Which question is asked, and what must be known about the vocabulary: see ``masking.MaskRule``."""

    kind: PairKind
    separator: int
    starts_word: NDArray[np.bool_]


class Paired(NamedTuple):
    """Rows as stored chunks, end to end in ``tokens`` [n], without what stands before and behind them."""

    tokens: NDArray[Any]
    lengths: I64
    """[rows]"""
    seconds: I64
    """[rows]: tokens before the second part, the separator included; the length of the row where there is none."""
    labels: I64
    """[rows]: 1 for another chunk's piece or the reverse order, 0 for what the text has, NO_QUESTION for no pair."""


def pair(chunks: Sequence[NDArray[Any]], samples: Picks, keys: keyed.U64, rule: PairRule) -> Paired:
    """The rows of one slot, one for each of its chunks as stored; ``keys`` are those of its masks."""
    lengths = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
    if not len(chunks):
        return Paired(np.empty(0, np.int32), lengths, lengths, lengths)
    tokens = np.concatenate([*chunks, np.empty(0, np.int32)])
    begins = np.cumsum(lengths) - lengths
    starts = np.flatnonzero(words.starts(tokens, rule.starts_word))
    wrong = _draw(keys, _ANSWER) < 0.5
    near = _near(samples)
    asked = (lengths >= 3) & (True if rule.kind == "sop" else ~near.all(axis=1))

    bodies = lengths - 1
    first = np.maximum(bodies // 4, 1)
    cuts = _place(starts, begins + first, begins + np.maximum(bodies - bodies // 4, first + 1), _draw(keys, _CUT))
    one = [tokens[begin:cut] for begin, cut in zip(begins, cuts, strict=True)]
    two = [tokens[cut : begin + body] for cut, begin, body in zip(cuts, begins, bodies, strict=True)]
    if rule.kind == "sop":
        for row in np.flatnonzero(wrong):
            one[row], two[row] = two[row], one[row]
    else:
        others = _others(near, _draw(keys, _PARTNER))
        sizes = np.minimum(begins + bodies - cuts, lengths[others])
        ends = begins[others] + lengths[others] - sizes + 1
        pieces = _place(starts, begins[others], ends, _draw(keys, _PIECE))
        for row in np.flatnonzero(wrong):
            two[row] = tokens[pieces[row] : pieces[row] + sizes[row]]

    between = np.array([rule.separator], tokens.dtype)
    rows = [
        [one[row], between, two[row]] if asked[row] else [tokens[begins[row] : begins[row] + lengths[row]]]
        for row in range(len(chunks))
    ]
    found = np.array([sum(map(len, row)) for row in rows], dtype=np.int64)
    seconds = np.where(asked, [len(part) + 1 for part in one], found)
    labels = np.where(asked, wrong, NO_QUESTION)
    return Paired(np.concatenate([*(part for row in rows for part in row), tokens[:0]]), found, seconds, labels)


def _draw(keys: keyed.U64, kind: int) -> NDArray[np.float64]:
    return keyed.uniform(keyed.derive(keys, kind), 0)


def _place(starts: I64, first: I64, end: I64, draws: NDArray[np.float64]) -> I64:
    """A place from ``first`` to before ``end``, each of those that are in ``starts`` alike; any one where none of them is."""
    low = np.searchsorted(starts, first)
    count = np.searchsorted(starts, end) - low
    of_starts = starts[np.minimum(low + (draws * count).astype(np.int64), len(starts) - 1)] if len(starts) else first
    return np.where(count > 0, of_starts, first + (draws * (end - first)).astype(np.int64))


def _near(samples: Picks) -> NDArray[np.bool_]:
    """Which two samples may be of one document, [samples, samples]; a sample is near itself."""
    apart = np.abs(samples.chunk[:, None] - samples.chunk)
    near: NDArray[np.bool_] = (samples.corpus[:, None] == samples.corpus) & (apart <= NEAR)
    return near


def _others(near: NDArray[np.bool_], draws: NDArray[np.float64]) -> I64:
    """For each sample one that is not near, each of them alike; the first of all where there is none."""
    ranks = np.cumsum(~near, axis=1)
    drawn = (draws * ranks[:, -1:].reshape(-1)).astype(np.int64)
    others: I64 = np.argmax(ranks > drawn[:, None], axis=1).astype(np.int64)
    return others
