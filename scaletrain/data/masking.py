"""Which tokens of a chunk are hidden from a masked language model, and what stands in their place.

A mask is a function of the run's seed, the corpus, the pass over it and the chunk, and of nothing else: not of the batch that
the chunk is in, the rank that reads it or what was drawn before. So a chunk has new masks in every pass, and the same ones on
any machine. The rule is BERT's (Devlin et al., arXiv 1810.04805): of the tokens chosen, 80 % become the mask token, 10 % a
random one and 10 % stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletrain.data import keyed, spans, words
from scaletrain.data.plan import I64, Picks
from scaletrain.data.spans import SpanConfig, Words

_CHOOSE, _FATE, _REPLACEMENT = 0, 1, 2
_BLOCK = 1 << 13


@dataclass(frozen=True, slots=True, eq=False)
class MaskRule:
    """How to mask: the rates, and what must be known about the vocabulary.

    ``rate`` of the ordinary tokens are chosen. Of those a share ``masked`` becomes ``mask_id``, a share ``randomised`` a random
    ordinary token, and the rest stays. ``special`` (ids, ascending) are neither chosen nor drawn. ``starts_word`` [vocab_size]
    makes whole words share one choice, the exceptions that a chunk has stored included (``words``); without it every token is
    chosen by itself. ``spans`` chooses runs of them instead, and each run has one fate.
    """

    rate: float
    masked: float
    randomised: float
    mask_id: int
    vocab_size: int
    special: I64
    starts_word: NDArray[np.bool_] | None = None
    spans: SpanConfig | None = None


class Masked(NamedTuple):
    """Tokens after masking (int64 [n]), the places of the chosen ones, ascending, and what stood there before."""

    tokens: I64
    selected: I64
    labels: I64


def chunk_keys(seed: int, corpora: Sequence[str], picks: Picks) -> keyed.U64:
    """One key per sample; ``corpora`` are the digests that ``picks.corpus`` counts in, so a corpus is known by what it holds."""
    of_corpus = np.array([keyed.key(seed, "mask", digest) for digest in corpora], dtype=np.uint64)
    if not len(picks):
        return of_corpus[:0]
    return keyed.derive(keyed.derive(of_corpus[picks.corpus], picks.corpus_pass), picks.chunk)


def mask(tokens: NDArray[Any], lengths: NDArray[Any], keys: keyed.U64, rule: MaskRule) -> Masked:
    """Masks chunks as stored that lie end to end in ``tokens`` [n]; ``lengths`` and ``keys`` have one entry per chunk.

    A token's draws are keyed by its chunk and its place in the chunk, so every chunk is masked as it would be alone.
    """
    stored = tokens.astype(np.int64)
    original = words.plain(stored)
    if not len(original):
        return Masked(original, original[:0], original[:0])
    is_special = np.zeros(rule.vocab_size, dtype=np.bool_)
    is_special[rule.special] = True
    if rule.spans is None:
        selected = _chosen(stored, lengths, keyed.derive(keys, _CHOOSE), rule)
        selected = selected[~is_special[original[selected]]]
    else:
        span = _spans(stored, ~is_special[original], lengths, keys, rule)
        selected = np.flatnonzero(span >= 0)

    ends = np.cumsum(lengths)
    chunk = np.searchsorted(ends, selected, side="right")
    place = selected - (ends - lengths)[chunk]
    shared = place if rule.spans is None else span[selected]
    fate = keyed.number(keyed.derive_at(keyed.derive(keys, _FATE)[chunk], shared))
    ordinary = np.flatnonzero(~is_special)
    drawn = keyed.number(keyed.derive_at(keyed.derive(keys, _REPLACEMENT)[chunk], place)) * len(ordinary)
    replacement = np.where(fate < rule.masked + rule.randomised, ordinary[drawn.astype(np.int64)], original[selected])
    corrupted = original.copy()
    corrupted[selected] = np.where(fate < rule.masked, rule.mask_id, replacement)
    return Masked(corrupted, selected, original[selected])


def _chosen(stored: I64, lengths: NDArray[Any], keys: keyed.U64, rule: MaskRule) -> I64:
    """The places of the chosen tokens, special ones among them: one draw each, or one for every word."""
    ends = np.cumsum(lengths)
    begins, word, found = ends - lengths, 0, []
    for first in range(0, len(stored), _BLOCK):  # a long row at once would cost more in fresh memory than in arithmetic
        last = min(first + _BLOCK, len(stored))
        chunks = slice(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last - 1, "right")) + 1)
        inside = np.minimum(ends[chunks], last) - np.maximum(begins[chunks], first)
        begin, draw = np.repeat(begins[chunks], inside), np.arange(first, last)
        if rule.starts_word is not None:
            # The draw of a word is that of its first token; a chunk begins with a word even if it was cut out of one.
            starts = words.starts(stored[first:last], rule.starts_word) | (draw == begin)
            draw = np.maximum.accumulate(np.where(starts, draw, word))
            word = int(draw[-1])
        hashes = keyed.derive_at(np.repeat(keys[chunks], inside), draw - begin)
        found.append(first + np.flatnonzero(keyed.below(hashes, rule.rate)))
    return np.concatenate(found)


def _spans(stored: I64, hideable: NDArray[np.bool_], lengths: NDArray[Any], keys: keyed.U64, rule: MaskRule) -> I64:
    """The number in its chunk of the span that hides each token, or -1: where there is none, and where it is not ``hideable``."""
    assert rule.spans is not None
    ends = np.cumsum(lengths)
    starts = np.ones(len(stored), np.bool_) if rule.starts_word is None else words.starts(stored, rule.starts_word)
    starts[(ends - lengths)[lengths > 0]] = True
    first = np.flatnonzero(starts)
    sizes = np.diff(first, append=len(stored))
    special = np.bincount(np.searchsorted(first, np.flatnonzero(~hideable), "right") - 1, minlength=len(first))
    of_chunks = Words(np.diff(np.searchsorted(first, ends), prepend=0), sizes - special)
    span = np.repeat(spans.choose(of_chunks, keys, rule.rate, rule.spans), sizes)
    return np.where(hideable, span, -1)
