"""A flat binary index of a tar shard: where each sample lies, and the CRC-32 it must have.

A sample is a run of consecutive members whose names agree up to the first dot of the base name (webdataset's rule). Its span
goes from the first member's header (extended headers included) to the end of the last member's padded data, so that one
``pread`` fetches it whole and one CRC covers names, sizes and payloads alike. The tar format itself protects its headers only
weakly and its data not at all: a flipped payload bit or a file cut at a header goes unnoticed by readers that stream.

File layout, little endian: a 40-byte header (magic, version, samples, shard bytes, tokens, CRC-32 of the records), then one
20-byte record per sample: ``offset u64, length u32, crc32 u32, tokens u32``.

Tar headers are parsed here instead of by ``tarfile``, with a bound on everything that a hostile file could make large. Nothing is
ever extracted. Format: POSIX.1-2017 ``pax``, "ustar Interchange Format", and the GNU long-name extension.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from scaletrain.data import npy
from scaletrain.data.checksum import crc32
from scaletrain.errors import CorpusError

BLOCK = 512
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4"), ("tokens", "<u4")])
Records = npt.NDArray[np.void]
Read = Callable[[int, int], bytes]
"""``read(offset, count)`` -> the bytes there; fewer at the end."""

_HEADER = struct.Struct("<8sIQQQI")
_MAGIC, _VERSION = b"stindex\0", 1
_NAME_BYTES_MAX = 4096
_PAX_BYTES_MAX = 1 << 20
_SAMPLES_MAX = 1 << 24
_SPAN_BYTES_MAX = (1 << 32) - 1
_PIECE = 1 << 20
_RESTORE = "The shard is damaged: restore it from a copy, or prepare the folder again with --fresh"
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device", b"6": "a FIFO",
          b"K": "a link with a long target", b"S": "a sparse file"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file in a tar: ``start`` of its first header, ``data`` and ``size`` of its payload."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """The first byte after the member's padded data."""
        return self.data + _padded(self.size)

    @property
    def key(self) -> str:
        """The sample that the member belongs to; empty for a name without a key, which readers of shards pass over."""
        base = self.name.rfind("/") + 1
        dot = self.name.find(".", base)
        return self.name[:dot] if dot > base else ""


@dataclass(frozen=True, slots=True)
class Index:
    """The samples of one shard, in the order of the file; ``records`` has the dtype ``RECORD``."""

    shard_bytes: int
    records: Records

    @property
    def tokens(self) -> int:
        """Tokens in the shard: the elements of its ``.npy`` members (0 for a shard of something else)."""
        return int(self.records["tokens"].sum(dtype=np.int64))

    def to_bytes(self) -> bytes:
        """The index as it is stored."""
        body = self.records.tobytes()
        return _HEADER.pack(_MAGIC, _VERSION, len(self.records), self.shard_bytes, self.tokens, crc32(body)) + body


def file_bytes(samples: int) -> int:
    """The bytes of an index of so many samples."""
    return _HEADER.size + samples * RECORD.itemsize


def build(tar: Path) -> Index:
    """Index a tar by its headers, in time and memory proportional to its members.

    Raises CorpusError for a tar that is cut short or damaged, and for links, devices, absolute names, ``..``, a key that comes
    back after another one, or a name that comes twice: each by name.
    """
    with tar.open("rb") as file:
        size = _regular_size(tar, file.fileno())

        def read(offset: int, count: int) -> bytes:
            return os.pread(file.fileno(), count, offset)

        spans = list(_spans(tar, members(read, size, str(tar), ends=True), read))
        records = np.array([(start, end - start, 0, tokens) for start, end, tokens in spans], RECORD)
        for record in records:
            record["crc32"] = _crc(read, int(record["offset"]), int(record["length"]))
    return Index(size, records)


def load(file: Path, *, shard_bytes: int | None = None) -> Index:
    """Read an index written by ``Index.to_bytes``; its records are memory-mapped.

    Raises CorpusError when the file is missing or damaged, or was made for a shard of another size than ``shard_bytes``.
    """
    remedy = "Build the index again from the shard, or prepare the folder again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(_HEADER.size)
    except FileNotFoundError:
        raise CorpusError(str(file), "no such file", "every shard has an index beside it", remedy) from None
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise CorpusError(str(file), head[:8], f"an index starts with {_MAGIC!r}", remedy)
    _, version, count, recorded, tokens, crc = _HEADER.unpack(head)
    if version != _VERSION:
        raise CorpusError(str(file), f"version {version}", f"this program reads version {_VERSION}", remedy)
    if size != _HEADER.size + count * RECORD.itemsize:
        raise CorpusError(str(file), f"{size} bytes", f"{count} samples take {_HEADER.size + count * RECORD.itemsize}", remedy)
    records: Records = np.memmap(file, RECORD, "r", _HEADER.size, (count,)) if count else np.empty(0, RECORD)
    if crc32(records.tobytes()) != crc or int(records["tokens"].sum(dtype=np.int64)) != tokens:
        raise CorpusError(str(file), "other records", "the records match the CRC-32 in the header", remedy)
    if shard_bytes is not None and recorded != shard_bytes:
        raise CorpusError(str(file), f"an index of {recorded} bytes", f"the shard has {shard_bytes} bytes", remedy)
    return Index(recorded, records)


def verify(index: Index, tar: Path) -> None:
    """Read the whole shard and compare every span's CRC-32; raises CorpusError at the first that differs."""
    with tar.open("rb") as file:
        size = _regular_size(tar, file.fileno())
        if size != index.shard_bytes:
            raise CorpusError(str(tar), f"{size} bytes", f"its index was made for {index.shard_bytes} bytes", "Restore the shard")

        def read(offset: int, count: int) -> bytes:
            return os.pread(file.fileno(), count, offset)

        for record in index.records:
            offset, expected = int(record["offset"]), int(record["crc32"])
            found = _crc(read, offset, int(record["length"]))
            if found != expected:
                raise damaged(tar, _key_at(read, offset, size, str(tar)), offset, expected, found)


def damaged(tar: Path, key: str, offset: int, expected: int, found: int, remedy: str = _RESTORE) -> CorpusError:
    """The error for a span whose CRC-32 is not the one in the index."""
    said = f"CRC-32 {found:#010x} of sample {key!r} at byte {offset}"
    return CorpusError(str(tar), said, f"its index says {expected:#010x}", remedy)


def members(read: Read, size: int, label: str, *, ends: bool = False) -> Iterator[Member]:
    """The regular files of a tar (or of one span of it) of ``size`` bytes, by its headers; directories are passed over.

    ``ends``: an end-of-archive block must follow the last member, which tells a whole file from one cut at a header. Raises
    CorpusError, naming ``label`` and the member, for whatever is not a plain file with a harmless relative name.
    """
    offset = start = 0
    long_name: str | None = None
    while offset < size:
        header = read(offset, BLOCK)
        if header == bytes(BLOCK):
            _require_zeros(read, offset, size, label)
            return
        kind, length, name = _parse(header, offset, label)
        data = offset + BLOCK
        end = data if kind == b"5" else data + _padded(length)  # a directory has no data, whatever its size field says
        if end > size:
            _refuse(label, name, offset, f"a member that ends at byte {end}", f"the file has {size} bytes: it was cut short")
        if kind in (b"L", b"x", b"g"):
            extended = _extended_name(kind, read, data, length, label)
            if extended is not None and long_name is not None:
                _refuse(
                    label, extended[:100], offset, "a second long name for one member", "readers do not agree on which counts"
                )
            long_name = extended if extended is not None else long_name
            offset = end
            continue
        name, long_name = name if long_name is None else long_name, None
        _check_name(name, offset, label)
        if kind in (b"0", b"\0"):
            yield Member(name, start, data, length)
        elif kind != b"5":
            what = _KINDS.get(kind, f"a member of type {kind!r}")
            _refuse(label, name, offset, what, "only plain files and directories are read from a shard")
        offset = start = end
    if ends or long_name is not None:
        raise CorpusError(label, f"{size} bytes without an end-of-archive block", "a whole tar ends with one: it was cut short",
                          "Restore the shard from a copy, or write it again")  # fmt: skip


def _spans(tar: Path, found: Iterator[Member], read: Read) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of each sample; refuses keys that come back and names that come twice."""
    keys: set[str] = set()
    names: set[str] = set()
    key, start, end, tokens = "", 0, 0, 0
    for member in found:
        if not member.key:
            continue
        if member.key != key:
            if key:
                yield start, end, tokens
            key, start, tokens = member.key, member.start, 0
            names.clear()
            if key in keys:
                _refuse(str(tar), member.name, start, "a key that came before", "the members of a sample follow one another")
            keys.add(key)
            if len(keys) > _SAMPLES_MAX:
                _refuse(str(tar), member.name, start, f"more than {_SAMPLES_MAX} samples", "split the shard")
        if member.name in names:
            _refuse(str(tar), member.name, member.start, "a name that came before", "every name comes once")
        names.add(member.name)
        end = member.end
        if end - start > _SPAN_BYTES_MAX:
            _refuse(str(tar), member.name, start, f"a sample of {end - start} bytes", f"at most {_SPAN_BYTES_MAX}")
        if member.name.endswith(".npy"):
            tokens += npy.length(read(member.data, min(member.size, npy.HEADER_BYTES_MAX)))
    if key:
        yield start, end, tokens


def _parse(header: bytes, offset: int, label: str) -> tuple[bytes, int, str]:
    """(type, size of the data, name) of one header block whose checksum holds."""
    packed = next((name for magic, name in _PACKED.items() if header.startswith(magic)), None)
    if packed and not offset:
        _refuse(label, "", offset, f"a file packed by {packed}", "a plain tar: unpack it first, for random access")
    if len(header) < BLOCK:
        _refuse(label, "", offset, f"a header of {len(header)} bytes", f"a header has {BLOCK}: the file was cut short")
    try:
        expected = int(header[148:156].strip(b" \0") or b"0", 8)
        size = _size(header[124:136])
        name = header[:100].split(b"\0", 1)[0].decode()
        prefix = header[345:500].split(b"\0", 1)[0].decode() if header[257:263] == b"ustar\0" else ""
    except ValueError:
        _refuse(label, repr(header[:100].rstrip(b"\0"))[2:-1], offset, "a header that cannot be read", "a tar header in UTF-8")
    if expected != sum(header) - sum(header[148:156]) + 8 * 0x20:
        _refuse(
            label,
            name,
            offset,
            "a header with a wrong checksum",
            "the file is damaged here, or is not a plain (uncompressed) tar",
        )
    return header[156:157], size, f"{prefix}/{name}" if prefix else name


def _size(field: bytes) -> int:
    """The size field: octal digits, or GNU's big-endian binary form for what octal cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if not set(field) <= set(b"01234567 \0"):  # int() alone would take signs and underscores
        raise ValueError("not an octal number")
    return int(field.strip(b" \0") or b"0", 8)


def _extended_name(kind: bytes, read: Read, data: int, size: int, label: str) -> str | None:
    """The name in a GNU long-name record or a PAX header; None where it holds none."""
    limit = _NAME_BYTES_MAX if kind == b"L" else _PAX_BYTES_MAX
    if size > limit:
        _refuse(label, "", data - BLOCK, f"an extended header of {size} bytes", f"at most {limit}")
    body = read(data, size)
    try:
        if kind == b"L":
            if not body.endswith(b"\0"):
                raise ValueError("a name that goes on")  # beyond its size, where some readers look and others do not
            return body.rstrip(b"\0").decode()
        fields = dict(_pax_fields(body))
    except (ValueError, IndexError):
        _refuse(label, "", data - BLOCK, "an extended header that cannot be read", "'LENGTH KEY=VALUE' lines in UTF-8")
    # A size (files over 8 GiB), sparse maps and global names would each change what the headers after this one mean.
    strange = [key for key in fields if key == "size" or key.startswith("GNU.sparse") or (kind == b"g" and key == "path")]
    if strange:
        _refuse(
            label, fields.get("path", ""), data - BLOCK, f"an extended header with {strange[0]!r}", "only 'path' is supported"
        )
    return fields.get("path")


def _pax_fields(body: bytes) -> Iterator[tuple[str, str]]:
    """The ``key=value`` records of a PAX header."""
    at = 0
    while at < len(body):  # by an offset: a header of many short records is not to be copied once for each of them
        space = body.index(b" ", at, at + 20)
        end = at + int(body[at:space])
        if not space < end <= len(body) or body[end - 1 : end] != b"\n":
            raise ValueError("a record of another length")
        key, value = body[space + 1 : end - 1].split(b"=", 1)
        at = end
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            yield key.decode(), value.decode()


def _check_name(name: str, offset: int, label: str) -> None:
    if not name or len(name) > _NAME_BYTES_MAX or "\0" in name:
        _refuse(label, name[:100], offset, "an empty or over-long name", f"1 to {_NAME_BYTES_MAX} characters")
    if name.startswith("/"):
        _refuse(label, name, offset, "an absolute name", "names in a shard are relative")
    if ".." in name.split("/"):
        _refuse(label, name, offset, "a name with '..'", "names in a shard stay inside it")


def _require_zeros(read: Read, offset: int, size: int, label: str) -> None:
    """Everything after the first zero block is zero: a second archive behind it would be passed over in silence."""
    for at in range(offset, size, _PIECE):
        if any(read(at, min(_PIECE, size - at))):
            raise CorpusError(label, f"data after the end of the archive at byte {offset}", "one archive per file",
                              "Write the shard again: joined or overwritten tars lose samples silently")  # fmt: skip


def _key_at(read: Read, offset: int, size: int, label: str) -> str:
    """The key of the sample at ``offset``, or '?' where its header cannot be read any more."""
    try:
        return next(members(lambda at, count: read(offset + at, count), size - offset, label)).key
    except (CorpusError, StopIteration):
        return "?"


def _crc(read: Read, offset: int, length: int) -> int:
    crc = 0
    for at in range(offset, offset + length, _PIECE):
        crc = crc32(read(at, min(_PIECE, offset + length - at)), crc)
    return crc


def _regular_size(tar: Path, descriptor: int) -> int:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CorpusError(str(tar), "not a plain file", "a shard is a plain file", "Copy the stream into a file first")
    return status.st_size


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _refuse(label: str, name: str, offset: int, value: str, rule: str) -> NoReturn:
    raise CorpusError(label, f"{value}, {name!r} at byte {offset}", rule, "Write the shard again without it")
