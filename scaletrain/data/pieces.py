"""Encoded batches on disk: what the part of a prepare that is split over machines hands to the merge.

A piece is a file of frames, one a batch: a fixed head (magic, CRC-32 of the rest, number of the first document, sizes of the
fields) and the fields of ``Encoded`` as they are. Pieces are written under a temporary name; nothing in them is executed or
unpickled, and a damaged one is an error that names its part.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from scaletrain import durable
from scaletrain.data.checksum import crc32
from scaletrain.data.encode import KEPT, Encoded
from scaletrain.data.index import RECORD
from scaletrain.data.shards import storage
from scaletrain.errors import CorpusError

_HEAD = struct.Struct(f"<4sIQ{len(Encoded._fields)}Q")
_MAGIC = b"enc1"


class PieceWriter:
    """One piece; it gets its name when it is whole and on the disk. Every method but ``discard`` raises StorageError."""

    def __init__(self, file: Path) -> None:
        self._file, self._temporary = file, file.with_name(f".{file.name}.tmp")
        self.bytes = 0
        with storage(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream: BinaryIO = open(self._temporary, "wb", buffering=1 << 20, opener=durable.own)  # noqa: SIM115

    def add(self, first: int, encoded: Encoded) -> None:
        """Append a batch whose first document has the number ``first``."""
        fixed = struct.pack(f"<{1 + len(encoded)}Q", first, *map(len, encoded))
        crc = crc32(fixed)
        for field in encoded:
            crc = crc32(field, crc)
        with storage(self._file.parent, len(encoded.data)):
            self._stream.write(_MAGIC + crc.to_bytes(4, "little") + fixed)
            for field in encoded:
                self._stream.write(field)
        self.bytes += _HEAD.size + sum(map(len, encoded))

    def finish(self) -> None:
        """Make it durable and give it its name."""
        with storage(self._file.parent):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._temporary.replace(self._file)
            durable.sync(self._file.parent)

    def discard(self) -> None:
        """Leave nothing behind of a piece that was not finished."""
        with contextlib.suppress(OSError):
            self._stream.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a batch lies."""

    file: Path
    offset: int
    """Of its head."""
    crc: int
    first: int
    """The number of its first document."""
    sizes: tuple[int, ...]
    """Of the fields of ``Encoded``, in bytes; the first one has one byte for each document."""

    @property
    def end(self) -> int:
        """The number of the document after its last one."""
        return self.first + self.sizes[0]

    def read(self) -> Encoded:
        """The batch. Raises CorpusError when it is damaged."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset + _HEAD.size)
            fields = [stream.read(size) for size in self.sizes]
        crc = crc32(struct.pack(f"<{1 + len(fields)}Q", self.first, *self.sizes))
        for field in fields:
            crc = crc32(field, crc)
        if crc != self.crc:
            raise _damaged(self.file, f"bytes at {self.offset} with another CRC-32")
        return Encoded(*fields)


def frames(files: Iterable[Path]) -> Iterator[Frame]:
    """The frames of pieces, by their heads alone. A file is open only while it is read. Raises CorpusError."""
    for file in files:
        offset = 0
        size = file.stat().st_size if file.exists() else -1
        while offset != size:
            if size < offset + _HEAD.size:
                raise _damaged(file, f"{max(size, 0)} bytes")
            with file.open("rb") as stream:
                stream.seek(offset)
                magic, crc, first, *sizes = _HEAD.unpack(stream.read(_HEAD.size))
            frame = Frame(file, offset, crc, first, tuple(sizes))
            offset += _HEAD.size + sum(sizes)
            if magic != _MAGIC or offset > size:
                raise _damaged(file, f"no whole batch at {frame.offset}")
            yield frame


def in_order(parts: Iterable[Iterator[Frame]], start: int, end: int) -> Iterator[Encoded]:
    """The documents from ``start`` to ``end``, each once, whichever part has them; each part's frames ascend.

    In memory: one head for each part, one batch. Raises CorpusError when documents are missing or there twice.
    """
    expected = 0
    for frame in heapq.merge(*parts, key=lambda frame: frame.first):
        if frame.first != expected:
            rule = f"document {expected} follows"
            raise CorpusError(str(frame.file), f"document {frame.first}", rule, "Prepare all parts again")
        expected = frame.end
        if frame.end > start:
            encoded = frame.read()
            yield _without(encoded, start - frame.first) if frame.first < start else encoded
    if expected != end:
        raise CorpusError("parts", f"{expected} documents", f"the source has {end}", "Prepare all parts again")


def _without(encoded: Encoded, known: int) -> Encoded:
    """A batch without its first documents; their samples stay in ``data``, where nothing points to them."""
    chunks = np.frombuffer(encoded.chunks, "<u4")
    samples = int(chunks[:known].sum(dtype=np.int64))
    kept, signed = encoded.outcomes.count(KEPT), encoded.outcomes[:known].count(KEPT)
    return encoded._replace(
        outcomes=encoded.outcomes[known:],
        signatures=encoded.signatures[len(encoded.signatures) // max(kept, 1) * signed :],
        hashes=encoded.hashes[16 * known :],
        chunks=encoded.chunks[4 * known :],
        records=encoded.records[samples * RECORD.itemsize :],
    )


def _damaged(file: Path, value: str) -> CorpusError:
    rule = "a piece is a file of whole batches"
    return CorpusError(str(file), value, rule, f"Remove {file.parents[1]} and prepare that part again")
