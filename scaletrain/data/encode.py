"""What a tokenising process does: a batch of raw documents in, the bytes of their tar samples out.

Everything here is a pure function of the documents, their numbers and the ``Recipe``; order, duplicates and shards are the
business of the process that collects the results, so that any number of processes gives the same bytes. Data crosses the process
border as text and bytes only.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scaletrain.data import shards, words
from scaletrain.data.clean import DROPPED, CleanConfig, clean, dropped, share, text_hash
from scaletrain.data.duplicates import MinHashConfig, Signer
from scaletrain.data.index import RECORD
from scaletrain.data.tokenizer import encoder, word_starts
from scaletrain.errors import ScaletrainError

if TYPE_CHECKING:
    import tokenizers

Ids = npt.NDArray[np.integer[Any]]
Marks = npt.NDArray[np.bool_]

KEPT = len(DROPPED)
OTHER_SPLIT = KEPT + 1
"""Outcomes of a document beside the reasons in ``DROPPED``, by number."""
_BACK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the bytes of a document's chunks."""

    tokenizer: str
    """The tokenizer's folder."""
    max_tokens: int
    clean: CleanConfig
    held_out: float
    """Share of the documents that belong to validation, by the hash of their text; 0 when validation has a source of its own."""
    seed: int
    validation: bool
    """Encode the documents of validation instead of those of train."""
    segmenter: words.Segmenter = "none"
    """What says where words start in a script that writes no blanks between them."""
    near: MinHashConfig | None = None
    """How near duplicates are found, when they are: the documents get signatures."""


class Batch(NamedTuple):
    """Raw documents that follow one another in their source."""

    first: int
    """The number of the first one."""
    documents: list[str]


class Encoded(NamedTuple):
    """What became of a batch of n documents with c chunks."""

    outcomes: bytes
    """[n] u8: a position in ``DROPPED``, ``KEPT`` or ``OTHER_SPLIT``."""
    hashes: bytes
    """[n] 16 bytes each: of the clean text."""
    signatures: bytes
    """One for each document that is kept, as ``duplicates.Signer`` makes them; none without near duplicates."""
    chunks: bytes
    """[n] u32: how many samples the document has."""
    records: bytes
    """[c] ``index.RECORD``, offsets from the start of ``data``."""
    data: bytes
    """The samples one after the other, as they lie in a tar."""


class Encoder:
    """A loaded tokenizer with the recipe that it is used by."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._tokenizer: tokenizers.Tokenizer = encoder(Path(recipe.tokenizer))
        self._starts = word_starts(Path(recipe.tokenizer))
        self._cut = words.load(recipe.segmenter)
        signed = self._cut is not None  # the sign carries what the segmenter said
        self._dtype = np.dtype("<i2" if signed else "<u2")
        if len(self._starts) > 1 << 8 * self._dtype.itemsize - signed:
            self._dtype = np.dtype("<i4" if signed else "<u4")
        self._signer = Signer(recipe.near) if recipe.near is not None else None

    def encode(self, batch: Batch) -> Encoded:
        """Clean, judge, tokenise and pack a batch."""
        first, documents = batch
        texts = [clean(document, self.recipe.clean) for document in documents]
        hashes = [text_hash(text) for text in texts]
        outcomes = bytearray(self._judge(text, hashed) for text, hashed in zip(texts, hashes, strict=True))
        wanted = [number for number, outcome in enumerate(outcomes) if outcome == KEPT]
        tokenise = self._tokenizer.encode_batch_fast if self._cut is None else self._tokenizer.encode_batch  # with offsets
        encodings = tokenise([texts[number] for number in wanted], add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), self._dtype)
        ends = np.cumsum([len(encoding) for encoding in encodings], dtype=np.int64).tolist()
        counts, samples, lengths = [0] * len(documents), [], []
        for number, encoding, begin, end in zip(wanted, encodings, [0, *ends], ends, strict=False):
            pieces = self._pieces(texts[number], encoding, ids[begin:end])
            counts[number] = len(pieces)
            if not pieces:
                outcomes[number] = DROPPED.index("no_tokens")
            samples += [shards.sample(f"{first + number:09d}-{piece:04d}", ids) for piece, ids in enumerate(pieces)]
            lengths += [len(ids) for ids in pieces]
        kept = (text for text, outcome in zip(texts, outcomes, strict=True) if outcome == KEPT)
        return Encoded(
            outcomes=bytes(outcomes),
            hashes=b"".join(hashes),
            signatures=b"".join(map(self._signer.sign, kept)) if self._signer is not None else b"",
            chunks=np.array(counts, "<u4").tobytes(),
            records=_records(samples, lengths),
            data=b"".join(samples),
        )

    def _pieces(self, text: str, encoding: tokenizers.Encoding, ids: Ids) -> list[Ids]:
        """The chunks of a document as they are stored."""
        if self._cut is None and 0 < len(ids) <= self.recipe.max_tokens:
            return [ids]
        rule = self._starts[ids]
        if self._cut is None:
            return list(split(ids, self.recipe.max_tokens, rule))
        spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2)
        starts, sentences = words.token_starts(text, spans, self._cut, rule), words.sentence_starts(text, spans)
        return list(split(words.mark(ids, starts, rule), self.recipe.max_tokens, starts, sentences))

    def _judge(self, text: str, hashed: bytes) -> int:
        recipe = self.recipe
        reason = dropped(text, recipe.clean)
        if reason is not None:
            # Counted once: in the pass over the train documents.
            return OTHER_SPLIT if recipe.validation and recipe.held_out else DROPPED.index(reason)
        if recipe.held_out and (share(hashed, "validation", recipe.seed) < recipe.held_out) != recipe.validation:
            return OTHER_SPLIT
        return KEPT


def split(ids: Ids, max_tokens: int, starts: Marks, sentences: Marks | None = None) -> Iterator[Ids]:
    """Cut a document into pieces of at most ``max_tokens``.

    A cut is made before a sentence if one starts within the last few tokens, else before a word, else where the piece is full;
    ``starts`` and ``sentences`` say of each token whether it starts one.
    """
    at = 0
    while len(ids) - at > max_tokens:
        end = at + max_tokens
        window = slice(max(at + 1, end - _BACK_TOKENS + 1), end + 1)
        for marks in (starts,) if sentences is None else (sentences, starts):
            back = np.flatnonzero(marks[window][::-1])
            if len(back):
                end -= int(back[0])
                break
        yield ids[at:end]
        at = end
    if len(ids) > at:
        yield ids[at:]


def _records(samples: list[bytes], lengths: list[int]) -> bytes:
    records = np.zeros(len(samples), RECORD)
    records["length"] = [len(sample) for sample in samples]
    records["offset"][1:] = np.cumsum(records["length"], dtype=np.uint64)[:-1]
    records["crc32"] = [shards.crc(sample) for sample in samples]
    records["tokens"] = lengths
    return records.tobytes()


_encoder: Encoder | None = None


def _start(recipe: Recipe) -> None:
    """Runs first in every tokenising process."""
    global _encoder
    # Several processes share the cores already: the tokenizer starts no threads of its own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(recipe)


def _end_with_parent() -> None:
    """A killed parent cannot tell its pool to stop, and a pool's process would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(batch: Batch) -> Encoded:
    assert _encoder is not None, "_start runs first"
    return _encoder.encode(batch)


def run(recipe: Recipe, batches: Iterable[Batch], processes: int) -> Iterator[Encoded]:
    """Encode batches in ``processes`` processes, a few batches ahead; results come in the order of the batches.

    Raises ScaletrainError when a process dies.
    """
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (recipe,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        problem = "a tokenising process died, most likely killed for want of memory"
        raise ScaletrainError(f"processes: got {processes}; {problem}. Run the same command with fewer: it continues") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
