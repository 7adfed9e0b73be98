"""Writing tar shards: samples as bytes, whole shards through a temporary name, and disk trouble as one kind of error.

The tars are plain ustar (POSIX.1-2017, "ustar Interchange Format") with every field that could differ between two writings set to
zero, so that the same chunks are the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from scaletrain import durable
from scaletrain.data import npy
from scaletrain.data.checksum import crc32
from scaletrain.data.index import BLOCK, RECORD, Index, Records
from scaletrain.errors import StorageError

_END = bytes(2 * BLOCK)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextlib.contextmanager
def storage(folder: Path, needed: int = 0) -> Iterator[None]:
    """Raise StorageError for a full, read-only or failing disk; ``needed`` is how many bytes were about to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise StorageError(_explain(folder, error, needed)) from error


def _explain(folder: Path, error: OSError, needed: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        problem = f"the disk is full: at least {needed:,} more bytes were needed, {free:,} are free"
        return (
            f"output: got {str(folder)!r}; {problem}. Free space and run the same command: it continues from the last whole shard"
        )
    reason = {errno.EROFS: "the file system is read-only", errno.EIO: "the disk reports an input/output error"}.get(
        error.errno or 0, f"writing is not allowed ({error.strerror})"
    )
    return f"output: got {str(folder)!r}; {reason}. Use a folder that can be written, or make this one writable"


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises StorageError."""
    with storage(file.parent, len(data)):
        durable.write(file, data)


def write_json(file: Path, tree: Any) -> None:
    """``write_atomically`` for a plain tree."""
    write_atomically(file, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())


def sample(key: str, ids: npt.NDArray[np.integer[Any]]) -> bytes:
    """One chunk as the member ``KEY.npy`` of a tar: header, array (its own dtype, little endian), padding to a block."""
    name, array = f"{key}.npy".encode(), npy.header(len(ids), ids.dtype.str)
    size = len(array) + ids.nbytes
    before, after, total = _tar_fields(size)
    checksum = b"%06o\0 " % (total + sum(name))
    return b"".join((name.ljust(100, b"\0"), before, checksum, after, array, ids.tobytes(), bytes(-size % BLOCK)))


@functools.lru_cache(maxsize=8192)
def _tar_fields(size: int) -> tuple[bytes, bytes, int]:
    """A ustar header of a plain file without its name: what lies before and after the checksum, and the sum of all.

    Mode 644, owner, group and time zero.
    """
    before = b"0000644\x000000000\x000000000\x00" + f"{size:011o}\0{0:011o}\0".encode()
    after = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(72, b"\0") + b"0000000\x000000000\x00"
    return before, after.ljust(BLOCK - 100 - len(before) - 8, b"\0"), sum(before) + sum(after) + 8 * 0x20


def crc(data: bytes) -> int:
    """The CRC-32 that the index holds of a sample's span."""
    return crc32(data)


@dataclass(frozen=True, slots=True)
class Written:
    """What the manifest says of a finished shard."""

    file: str
    bytes: int
    sha256: str
    chunks: int
    tokens: int
    index_sha256: str


class ShardWriter:
    """One tar shard and its index; they get their names when both are whole and on the disk.

    Every method but ``discard``, which is owed to a shard that is not finished, raises StorageError.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """``name`` is the shard's path under ``folder``, without the suffix: 'train/000000'."""
        self._folder, self._name = folder, name
        self._tar = folder / f"{name}.tar"
        self._temporary = self._tar.with_name(f".{self._tar.name}.tmp")
        self._hash, self._bytes, self.chunks = hashlib.sha256(), 0, 0
        self._records: list[Records] = []
        with storage(folder):
            self._tar.parent.mkdir(parents=True, exist_ok=True)
            self._stream: BinaryIO = open(self._temporary, "wb", buffering=1 << 20, opener=durable.own)  # noqa: SIM115

    def add(self, data: bytes | memoryview, records: Records) -> None:
        """Append samples as they lie in ``data``; ``records`` describes them with offsets relative to it."""
        with storage(self._folder, len(data)):
            self._stream.write(data)
        self._hash.update(data)
        moved = records.copy()
        moved["offset"] += np.uint64(self._bytes)
        self._records.append(moved)
        self._bytes += len(data)
        self.chunks += len(records)

    def finish(self) -> Written:
        """Close the archive, write the index, rename both into place."""
        with storage(self._folder, len(_END)):
            self._stream.write(_END)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        self._hash.update(_END)
        index = Index(self._bytes + len(_END), np.concatenate(self._records) if self._records else np.empty(0, RECORD))
        content = index.to_bytes()
        write_atomically(self._tar.with_suffix(".idx"), content)
        with storage(self._folder):
            self._temporary.replace(self._tar)
            durable.sync(self._tar.parent)
        digests = self._hash.hexdigest(), hashlib.sha256(content).hexdigest()
        return Written(f"{self._name}.tar", index.shard_bytes, digests[0], len(index.records), index.tokens, digests[1])

    def discard(self) -> None:
        """Leave nothing behind of a shard that was not finished."""
        with contextlib.suppress(OSError):  # closing flushes, which on a full disk fails once more
            self._stream.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
