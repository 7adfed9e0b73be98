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

from scaletrain.data import keyed
from scaletrain.data.plan import I64, Picks

_CHOOSE, _FATE, _REPLACEMENT = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class MaskRule:
    """How to mask: the rates, and what must be known about the vocabulary.

    ``rate`` of the ordinary tokens are chosen. Of those a share ``masked`` becomes ``mask_id``, a share ``randomised`` a random
    ordinary token, and the rest stays. ``special`` (ids, ascending) are neither chosen nor drawn. ``starts_word`` [vocab_size]
    makes whole words share one choice; without it every token is chosen by itself.
    """

    rate: float
    masked: float
    randomised: float
    mask_id: int
    vocab_size: int
    special: I64
    starts_word: NDArray[np.bool_] | None = None


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
    """Masks chunks that lie end to end in ``tokens`` [n]; ``lengths`` and ``keys`` have one entry per chunk.

    A token's draws are keyed by its chunk and its place in the chunk, so every chunk is masked as it would be alone.
    """
    original = tokens.astype(np.int64)
    if not len(original):
        return Masked(original, original[:0], original[:0])
    begin = np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.arange(len(original))
    token_keys = np.repeat(keys, lengths)
    is_special = np.zeros(rule.vocab_size, dtype=np.bool_)
    is_special[rule.special] = True

    first = place if rule.starts_word is None else _first_of_word(place, begin, rule.starts_word[original])
    chosen = keyed.uniform(keyed.derive(token_keys, _CHOOSE), first - begin) < rule.rate
    selected = np.flatnonzero(chosen & ~is_special[original])

    keys_there, place_there = token_keys[selected], (place - begin)[selected]
    fate = keyed.uniform(keyed.derive(keys_there, _FATE), place_there)
    ordinary = np.flatnonzero(~is_special)
    drawn = keyed.uniform(keyed.derive(keys_there, _REPLACEMENT), place_there) * len(ordinary)
    replacement = np.where(fate < rule.masked + rule.randomised, ordinary[drawn.astype(np.int64)], original[selected])
    corrupted = original.copy()
    corrupted[selected] = np.where(fate < rule.masked, rule.mask_id, replacement)
    return Masked(corrupted, selected, original[selected])


def _first_of_word(place: I64, begin: I64, starts: NDArray[np.bool_]) -> I64:
    """The place of the first token of each token's word; a chunk begins with a word even if it was cut out of one."""
    return np.maximum.accumulate(np.where(starts | (place == begin), place, 0))
