"""Tars that others wrote (webdataset, GNU tar, PAX, ustar): an index for each, and with it any sample in one read.

The index lies beside its tar, as ``NAME.tar.stidx``, or in a folder of its own where the tars cannot be written to. It is made on
first sight, or asked for in strict mode. Nothing is ever extracted; what `index.build` refuses is refused here, by name.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from scaletrain.data import index
from scaletrain.data.checksum import crc32
from scaletrain.data.files import Files
from scaletrain.data.shards import storage, write_atomically
from scaletrain.durable import sync
from scaletrain.errors import CorpusError, ScaletrainError, StorageError

SUFFIX = ".stidx"
"""Not ``.idx``: other programs write files of that name beside tars, in formats of their own."""
_FILES_MAX = 64
_REMEDY = f"Restore the tar from a copy. If it was replaced on purpose, delete its {SUFFIX} file: it is made again"


def place(tar: Path, folder: Path | None = None) -> Path:
    """Where the index of ``tar`` is: beside it, or in ``folder`` under a digest of the tar's whole path (base names repeat)."""
    if folder is None:
        return tar.with_name(tar.name + SUFFIX)
    digest = hashlib.sha256(os.fsencode(tar.absolute())).hexdigest()[:16]
    return folder / f"{tar.stem}-{digest}{SUFFIX}"


def indexed(tar: Path, folder: Path | None = None) -> index.Index | None:
    """The index of ``tar``, or None where there is none that fits: damaged, of another size, or older than the tar."""
    file = place(tar, folder)
    try:
        size, written = tar.stat().st_size, tar.stat().st_mtime_ns
        if file.stat().st_mtime_ns < written:
            return None
        return index.load(file, shard_bytes=size)
    except FileNotFoundError:
        if not tar.exists():
            raise CorpusError(str(tar), "no such file", "a tar that can be read", "Check the path") from None
        return None
    except CorpusError:
        return None


def build(tars: Sequence[Path], folder: Path | None = None, processes: int = 1) -> Iterator[tuple[Path, bool]]:
    """Makes the indexes that are missing, in several processes; yields each tar, in order, and whether its index was made now.

    Killed and started again, it goes on: each index is written whole, in one rename. Raises CorpusError for a tar that cannot be
    indexed, naming the member, and StorageError where an index cannot be written.
    """
    if folder is not None:
        _make(folder)
    missing = [tar for tar in tars if indexed(tar, folder) is None]
    if processes == 1 or len(missing) < 2:
        yield from _in_order(tars, missing, map(_build, missing, itertools.repeat(folder)))
        return
    with ProcessPoolExecutor(min(processes, len(missing)), get_context("spawn")) as pool:
        try:
            yield from _in_order(tars, missing, pool.map(_build, missing, itertools.repeat(folder)))
        except BrokenProcessPool:
            problem = "a process that read tars died, most likely killed for want of memory"
            raise ScaletrainError(f"processes: got {processes}; {problem}. Run the same command again: it continues") from None


def _in_order(tars: Sequence[Path], missing: Sequence[Path], made: Iterator[Path]) -> Iterator[tuple[Path, bool]]:
    wanted = set(missing)
    for tar in tars:
        if tar in wanted:
            next(made)
        yield tar, tar in wanted


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"index_folder: got {str(folder)!r}; it cannot be made ({error.strerror}). Name another one"
        ) from error


def _build(tar: Path, folder: Path | None) -> Path:
    file = place(tar, folder)
    _publish(file, index.build(tar))
    return file


def _publish(file: Path, made: index.Index) -> None:
    """Writes an index under a name that no other process uses, then renames: those that build the same one at once do no harm."""
    private = file.with_name(f".{file.name}.{os.urandom(8).hex()}")
    write_atomically(private, made.to_bytes())
    with storage(file.parent):
        private.replace(file)
        sync(file.parent)


@dataclass(frozen=True, slots=True)
class _Tar:
    file: Path
    first: int
    records: index.Records


class Sample(NamedTuple):
    """What the members' names have in common, and the payloads by suffix: what follows the first dot of the base name."""

    key: str
    members: dict[str, bytes]


class TarSet:
    """The samples of some tars, in order, with random access. Made by ``open``; may be read from many threads."""

    def __init__(self, tars: Sequence[tuple[Path, index.Index]]) -> None:
        firsts = list(itertools.accumulate((len(each.records) for _, each in tars), initial=0))
        self._tars = [_Tar(file, first, each.records) for (file, each), first in zip(tars, firsts, strict=False)]
        self._firsts, self.samples = firsts[:-1], firsts[-1]
        self._files = Files(_FILES_MAX)

    @classmethod
    def open(cls, tars: Sequence[Path], index_folder: Path | None = None, *, strict: bool = False) -> TarSet:
        """Opens tars by their indexes.

        One without an index is indexed now, and keeps the index where it can be written. ``strict``: CorpusError instead.
        """
        found = []
        for tar in tars:
            known = indexed(tar, index_folder)
            if known is None and strict:
                remedy = "Make it with `scaletrain index`, which reads every byte once"
                raise CorpusError(str(tar), "no index that fits it", "in strict mode every tar has one", remedy)
            found.append((tar, known or _at_first_sight(tar, index_folder)))
        return cls(found)

    def __len__(self) -> int:
        return self.samples

    def span(self, sample: int) -> bytes:
        """The bytes of a sample as they lie in the tar, headers and padding included.

        Raises CorpusError when they are not those that were indexed, StorageError when the disk fails.
        """
        tar, record = self._record(sample)
        offset, length, expected = int(record["offset"]), int(record["length"]), int(record["crc32"])
        data = self._files.whole(tar.file, offset, length, _REMEDY)
        found = crc32(data)
        if found != expected:
            self._files.close(tar.file)
            raise index.damaged(tar.file, _key(data), offset, expected, found, _REMEDY)
        return data

    def read(self, sample: int) -> Sample:
        """A sample's members; raises what ``span`` raises."""
        data = self.span(sample)
        found = [
            each for each in index.members(lambda at, count: data[at : at + count], len(data), f"sample {sample}") if each.key
        ]
        members = {each.name[len(each.key) + 1 :]: data[each.data : each.data + each.size] for each in found}
        return Sample(found[0].key, members)

    def _record(self, sample: int) -> tuple[_Tar, index.Records]:
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} is outside the {self.samples} samples of the tars")
        tar = self._tars[bisect.bisect_right(self._firsts, sample) - 1]
        record: index.Records = tar.records[sample - tar.first]
        return tar, record


def _at_first_sight(tar: Path, folder: Path | None) -> index.Index:
    made = index.build(tar)
    try:
        if folder is not None:
            _make(folder)
        _publish(place(tar, folder), made)
    except StorageError:  # on storage that cannot be written to it is made again each time
        pass
    return made


def _key(span: bytes) -> str:
    try:
        return next(each.key for each in index.members(lambda at, count: span[at : at + count], len(span), "") if each.key)
    except (CorpusError, StopIteration):
        return "?"
