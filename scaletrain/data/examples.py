"""Examples as token arrays: a corpus that a plan can deal and the loader read, with what a classification needs to know of each.

All tokens lie end to end in one array, so a million short examples are a few arrays and not a million. The first and the last
special token of an example are put in when it is collated, as with any chunk; what stands between, the separators of a pair
included, is stored.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.plan import I64
from scaletrain.data.slots import SPECIAL_TOKENS
from scaletrain.data.tables import Example
from scaletrain.data.tokenizer import PretrainedConfig, load
from scaletrain.errors import ConfigError, CorpusError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

I32 = NDArray[np.int32]

_BATCH = 1024
"""Examples tokenised at once: the library spreads them over the cores."""


@dataclass(frozen=True, eq=False)
class Examples:
    """One corpus of a plan: ``chunks`` examples. Made by an ``Encoder``; its arrays cannot be written to."""

    tokens: I32
    """Token ids of all examples, end to end, without the first and last special token of each."""
    offsets: I64
    """Shape [chunks + 1]: where each example begins in ``tokens``, and where the last one ends."""
    boundary: I32
    """Shape [chunks]: tokens before the second text of a pair begins, the separators between included. That of a single text, or
    of a pair whose second text has no tokens, is its length."""
    target: I64
    """Shape [chunks]: the column of the example's label among all logits of the model."""
    task: NDArray[np.int16]
    """Shape [chunks]: the number of the task that the example belongs to."""
    keys: tuple[str, ...]
    """The examples' keys; two tasks may use the same."""
    truncated: int
    """How many examples were cut to fit."""

    def __post_init__(self) -> None:
        for array in (self.tokens, self.offsets, self.boundary, self.target, self.task):
            array.setflags(write=False)

    @property
    def chunks(self) -> int:
        """How many examples there are."""
        return len(self.keys)

    @cached_property
    def lengths(self) -> I64:
        """Shape [chunks]: tokens of each example, without its first and last special token."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """The largest of ``lengths``; 0 without examples."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of keys, tokens, where each example and each second text begins, targets and tasks: all that training sees."""
        digest = hashlib.sha256(json.dumps(self.keys, ensure_ascii=False).encode())
        for array in (self.offsets, self.tokens, self.boundary, self.target, self.task):
            digest.update(f"|{array.dtype.str}{len(array)}:".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def read(self, chunk: int) -> I32:
        """Token ids of one example, shape [lengths[chunk]], as the loader wants them. Raises IndexError."""
        if not 0 <= chunk < self.chunks:
            raise IndexError(f"chunk: got {chunk}; there are examples 0 to {self.chunks - 1}")
        return self.tokens[self.offsets[chunk] : self.offsets[chunk + 1]]


class Encoder:
    """Tokenises as plain ``transformers`` does, cutting an example (of a pair the longer text first) to ``max_tokens``.

    The tokenizer is loaded once: that takes longer than to tokenise a thousand short texts.
    """

    def __init__(self, tokenizer_folder: Path, max_tokens: int) -> None:
        """``max_tokens`` counts all special tokens. Raises TokenizerError for a tokenizer that cannot be loaded, and ConfigError
        for a ``max_tokens`` that holds no text."""
        self._tokenizer, self._max_tokens = load(PretrainedConfig(path=str(tokenizer_folder))), max_tokens
        _check_room(self._tokenizer, max_tokens)

    def encode(
        self, examples: Sequence[Example], targets: Callable[[Example], int] | Mapping[str, int], task: int = 0
    ) -> Examples:
        """``targets`` gives the column of an example, or of a label.

        Raises TokenizerError for a tokenizer that does not put its ``cls_token`` first and its ``sep_token`` last, CorpusError
        for a label without a column.
        """
        column = targets if callable(targets) else _columns(targets)
        batches = [_Batch.of(batch, self._tokenizer, self._max_tokens) for batch in _batches(examples)]
        lengths = np.array([length for batch in batches for length in batch.lengths], dtype=np.int64)
        return Examples(
            tokens=np.concatenate([np.empty(0, np.int32), *(batch.tokens for batch in batches)]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            boundary=np.array([place for batch in batches for place in batch.boundary], dtype=np.int32),
            target=np.array([column(example) for example in examples], dtype=np.int64),
            task=np.full(len(examples), task, dtype=np.int16),
            keys=tuple(example.key for example in examples),
            truncated=sum(batch.truncated for batch in batches),
        )


def concatenate(parts: Sequence[Examples]) -> Examples:
    """One corpus of several, in order, each with the tasks and targets that it has."""
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    return Examples(
        tokens=np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)]),
        offsets=np.concatenate([*(part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)), starts[-1:]]),
        boundary=np.concatenate([np.empty(0, np.int32), *(part.boundary for part in parts)]),
        target=np.concatenate([np.empty(0, np.int64), *(part.target for part in parts)]),
        task=np.concatenate([np.empty(0, np.int16), *(part.task for part in parts)]),
        keys=tuple(itertools.chain.from_iterable(part.keys for part in parts)),
        truncated=sum(part.truncated for part in parts),
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some examples tokenised: their tokens end to end, and the numbers of each."""

    tokens: I32
    lengths: list[int]
    boundary: list[int]
    truncated: int

    @classmethod
    def of(cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> _Batch:
        """``examples`` are all single texts or all pairs."""
        pairs = None if examples[0].pair is None else [example.pair for example in examples]
        call: Any = tokenizer  # untyped upstream
        texts = [example.text for example in examples]
        encoded = call(texts, pairs, truncation="longest_first", max_length=max_tokens)
        rows: list[list[int]] = encoded["input_ids"]
        ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        for example, row in zip(examples, rows, strict=True):
            if len(row) < SPECIAL_TOKENS or (row[0], row[-1]) != ends:
                found = call.convert_ids_to_tokens(row[:1] + row[1:][-1:])
                rule = f"every text begins with {tokenizer.cls_token!r} and ends with {tokenizer.sep_token!r}"
                raise TokenizerError(f"tokens of example {example.key}", found, rule, "Use the tokenizer of an encoder")
        lengths = [len(row) - SPECIAL_TOKENS for row in rows]
        boundary = lengths if pairs is None else [_second(encoded.sequence_ids(place)) for place in range(len(rows))]
        inside = itertools.chain.from_iterable(row[1:-1] for row in rows)
        truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        return cls(np.fromiter(inside, np.int32, sum(lengths)), lengths, boundary, truncated)


def _second(sequence_ids: list[int | None]) -> int:
    """Tokens before those of text 1, the first special token not counted."""
    return (sequence_ids.index(1) if 1 in sequence_ids else len(sequence_ids) - 1) - 1


def _batches(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """Runs of at most ``_BATCH`` that are all pairs or all single texts."""
    runs = (list(run) for _, run in itertools.groupby(examples, key=lambda example: example.pair is None))
    return [run[start : start + _BATCH] for run in runs for start in range(0, len(run), _BATCH)]


def _check_room(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_tokens <= special + 1:
        rule = f"a pair takes {special} special tokens, and each text needs room for one more"
        raise ConfigError("max_tokens", max_tokens, rule, f"Set it to at least {special + 2}")


def _columns(targets: Mapping[str, int]) -> Callable[[Example], int]:
    def column(example: Example) -> int:
        if example.label not in targets:
            rule = f"the model has no output for this label; it has those for {', '.join(sorted(targets)[:20])}"
            raise CorpusError(f"label of example {example.key}", example.label, rule, "Correct or leave out the example")
        return targets[example.label]

    return column
