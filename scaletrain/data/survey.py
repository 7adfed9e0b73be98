"""Every byte of some tars read once, in several processes: which samples are damaged, and how often each token occurs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scaletrain.data import index, npy, words
from scaletrain.data.checksum import crc32
from scaletrain.data.index import BLOCK, Records
from scaletrain.errors import CorpusError, ScaletrainError

STRETCH_BYTES = 1 << 26
"""About what a process is given at a time: little enough that all have work until the end."""
READ_BYTES = 1 << 22
"""Of one read: what is made of it fits a processor's cache. A sample that is larger is read in pieces."""
I64 = npt.NDArray[np.int64]

_ARRAY_AT = BLOCK
"""Where the array of a sample begins that `shards.sample` wrote, and from there its data."""
_DATA_AT = BLOCK + len(npy.header(1, "<u2"))
_HEADS = {dtype: np.frombuffer(npy.header(1, dtype)[:24], np.uint8) for dtype in ("<u2", "<u4", "<i2", "<i4")}
"""What the headers of all arrays of a dtype have in common."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Samples of one tar that follow each other; ``first`` is the number of the first of them among all of its split."""

    file: Path
    first: int
    records: Records


class Damage(NamedTuple):
    """A sample whose bytes are not those that were indexed, or are no chunk of tokens."""

    file: Path
    sample: int
    """Its number in the split."""
    key: str
    """As in its tar header; '?' where that cannot be read."""
    offset: int
    problem: str


@dataclass(slots=True)
class Checked:
    """What came of a stretch. ``occurrences``: int64 [vocabulary], of the samples that are whole."""

    occurrences: I64
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)


def stretches(file: Path, first: int, records: Records) -> Iterator[Stretch]:
    """A tar's samples in parts of about ``STRETCH_BYTES``."""
    for begin, end in _parts(records, STRETCH_BYTES):
        yield Stretch(file, first + begin, records[begin:end])


def check_all(parts: Sequence[Stretch], vocab_size: int, processes: int) -> Iterator[Checked]:
    """``check`` of each part, in order, by several processes where there is enough to read."""
    size = sum(int(part.records["length"].sum(dtype=np.int64)) for part in parts)
    if processes == 1 or size < STRETCH_BYTES:
        yield from map(check, parts, itertools.repeat(vocab_size))
        return
    with ProcessPoolExecutor(min(processes, len(parts)), get_context("spawn")) as pool:
        try:
            yield from pool.map(check, parts, itertools.repeat(vocab_size))
        except BrokenProcessPool:
            problem = "a process that read shards died, most likely killed for want of memory"
            raise ScaletrainError(f"processes: got {processes}; {problem}. Run it with fewer") from None


def check(stretch: Stretch, vocab_size: int) -> Checked:
    """Compares every CRC, and counts the tokens of what is whole; ``vocab_size`` 0: samples are no chunks of tokens.

    What cannot be read, or is not there any more, is damaged too.
    """
    result = Checked(np.zeros(vocab_size, np.int64))
    for begin, end in _parts(stretch.records, READ_BYTES):
        records, first = stretch.records[begin:end], stretch.first + begin
        starts = (records["offset"] - records["offset"][0]).astype(np.int64)
        try:
            data, found = _read(stretch.file, records, starts)
        except OSError as error:
            problems = dict.fromkeys(range(len(records)), f"it cannot be read: {error.strerror}")
            data = b""
        else:
            result.bytes += len(data)
            problems = {
                number: f"CRC-32 {crc:#010x}, its index says {expected:#010x}"
                for number, (crc, expected) in enumerate(zip(found, records["crc32"].tolist(), strict=True))
                if crc != expected
            }
            if vocab_size:
                whole = np.setdiff1d(np.arange(len(records)), list(problems))
                problems |= _count(_Chunks(data, starts[whole], records[whole]), whole, result.occurrences)
        for number, problem in sorted(problems.items()):
            key = _key(data[starts[number] : starts[number] + int(records[number]["length"])])
            result.damaged.append(Damage(stretch.file, first + number, key, int(records[number]["offset"]), problem))
    return result


def _read(file: Path, records: Records, starts: I64) -> tuple[bytes, list[int]]:
    """The bytes from the first of the records to the end of the last, and the CRC-32 of each; of a large one only the head."""
    base, last = int(records["offset"][0]), records[-1]
    span = int(last["offset"]) + int(last["length"]) - base
    with file.open("rb", buffering=0) as raw:
        data = os.pread(raw.fileno(), min(span, READ_BYTES), base)
        if span > READ_BYTES:
            crc = 0
            for at in range(0, span, READ_BYTES):
                crc = crc32(os.pread(raw.fileno(), min(READ_BYTES, span - at), base + at), crc)
            return data, [crc]
    view = memoryview(data)
    ends = starts + records["length"].astype(np.int64)
    return data, [crc32(view[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _parts(records: Records, most: int) -> Iterator[tuple[int, int]]:
    """Runs of records that span at most so many bytes, or hold one record."""
    ends, begin = records["offset"] + records["length"], 0
    while begin < len(records):
        limit = int(records["offset"][begin]) + most
        end = max(int(np.searchsorted(ends, limit, side="right")), begin + 1)
        yield begin, end
        begin = end


class _Chunks(NamedTuple):
    """Samples that are whole, as they lie in the bytes that were read."""

    data: bytes
    starts: I64
    records: Records


def _count(chunks: _Chunks, numbers: I64, occurrences: I64) -> dict[int, str]:
    """Adds the tokens to ``occurrences`` [vocabulary]; returns what is wrong with chunks, by their ``numbers``."""
    problems: dict[int, str] = {}
    left = np.ones(len(numbers), np.bool_)
    for dtype in _HEADS:
        if not left.any():
            break
        usual = _usual(chunks, dtype)
        left &= ~usual
        lengths = chunks.records["tokens"][usual].astype(np.int64)
        size = int(dtype[-1])
        begins = (chunks.starts[usual] + _DATA_AT) // size
        places = np.arange(lengths.sum()) + np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
        ids = np.frombuffer(chunks.data, dtype, len(chunks.data) // size)[places]
        problems |= _add(ids, numbers[usual], lengths, occurrences)
    for place in np.flatnonzero(left).tolist():
        number, start = int(numbers[place]), int(chunks.starts[place])
        span = chunks.data[start : start + int(chunks.records[place]["length"])]
        try:
            member = next(index.members(lambda at, count, span=span: span[at : at + count], len(span), ""))  # type: ignore[misc]
            ids = npy.decode(memoryview(span)[member.data : member.data + member.size])
        except (CorpusError, ValueError, StopIteration):
            problems[number] = "it holds no array of tokens"
            continue
        problems |= _add(ids, np.array([number]), np.array([len(ids)]), occurrences)
    return problems


def _usual(chunks: _Chunks, dtype: str) -> npt.NDArray[np.bool_]:
    """Which samples are laid out as `shards.sample` does it, so that their tokens can be taken from where they must be."""
    size, lengths = int(dtype[-1]), chunks.records["length"].astype(np.int64)
    fits = _DATA_AT + chunks.records["tokens"].astype(np.int64) * size <= lengths
    fits &= (chunks.starts % size == 0) & (chunks.starts + lengths <= len(chunks.data))
    head = chunks.starts[:, None] + _ARRAY_AT + np.arange(len(_HEADS[dtype]))
    bytes_ = np.frombuffer(chunks.data, np.uint8)
    fits[fits] = (bytes_[head[fits]] == _HEADS[dtype]).all(axis=1)
    return fits


def _add(stored: npt.NDArray[np.integer[Any]], numbers: I64, lengths: I64, occurrences: I64) -> dict[int, str]:
    """Counts the tokens of chunks that stand end to end; returns, by number, those with one outside of the vocabulary."""
    ids = words.plain(stored) if stored.dtype.kind == "i" else stored
    problems: dict[int, str] = {}
    if ids.size and int(ids.max()) >= len(occurrences):
        outside = ids >= len(occurrences)
        for token, number in zip(ids[outside].tolist(), np.repeat(numbers, lengths)[outside].tolist(), strict=True):
            problems[number] = f"token {token} is outside of the vocabulary of {len(occurrences)}"
        ids = ids[~outside]
    occurrences += np.bincount(ids, minlength=len(occurrences))
    return problems


def _key(span: bytes) -> str:
    try:
        return next(index.members(lambda at, count: span[at : at + count], len(span), "")).key or "?"
    except (CorpusError, StopIteration):
        return "?"
