"""Whole local copies of shards that lie elsewhere: shared by the processes of a machine, verified, bounded in size.

::

    FOLDER/shards/KEY        a whole copy; KEY is a digest of the full URL and of the bytes that it must have
    FOLDER/shards/KEY.part   one that is being made, locked by the process that makes it
    FOLDER/shards/.lock      held for a moment, to make room
    FOLDER/corpora/...       manifests, tokenizers and indexes, which stay

A copy is written under its ``.part`` and renamed when its digest is right and it is on the disk (`claims`). A ``.part`` has its
full length from the start, which is how the others see the room that it will take.

Copies go in the order of their last use, which is their access time. A process that reads one that goes keeps its open file.
The folder must be on a disk of the machine, or on a file system whose locks hold between machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field

from scaletrain import durable
from scaletrain.data import claims, transfer, urls
from scaletrain.data.transfer import TransferConfig, Wanted
from scaletrain.errors import ConfigError, CorpusError, StorageError

WRONG_FOR_S = 300.0
"""What was found wrong at its source is asked for again after this time, not for each of its chunks."""
_AWAY_FOR_S = 2.0
_GRACE_S = 1.0
"""Who waits for another one gives up this much later, so that the reason is known."""
_POLL_S = 0.05
_TOUCH_S = 1.0
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Where copies of data that lies elsewhere are kept (corpora whose path is a URL)."""

    folder: Path = Path("~/.cache/scaletrain")
    """A folder on a disk of this machine. Ranks and jobs may share it."""
    size_gb: Annotated[float, Field(gt=0)] = 100.0
    """Most that the shards take, in 10^9 bytes; those used longest ago go first. Indexes and tokenizers are kept beside them."""
    transfer: TransferConfig = field(default_factory=TransferConfig)
    """When a transfer is given up. Each thread of the loader has one under way: more `data.loader.workers`, more at once."""


class Cache:
    """The copies in one folder. May be used by many threads, and with others on the same folder in many processes."""

    def __init__(self, config: CacheConfig) -> None:
        """Raises StorageError where the folder cannot be made."""
        self.folder = config.folder.expanduser()
        self._shards, self._bytes_max, self._config = self.folder / "shards", int(config.size_gb * 1e9), config.transfer
        self._verified: dict[Path, tuple[int, int, int]] = {}
        self._failed: dict[Path, tuple[CorpusError | StorageError, float]] = {}
        with _storage(self.folder):
            self._shards.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fetch(self, url: str, size: int, sha256: str) -> Path:
        """The local copy of a shard of ``size`` bytes, verified; it may be evicted before it is opened: then fetch it again.

        Raises ConfigError where the cache is smaller than the shard, CorpusError where the source has no such file or another
        one, and StorageError where the source does not answer in time or the disk is full or fails.
        """
        if size > self._bytes_max:
            rule = f"{urls.shown(url)} alone has {size / 1e9:.3g} GB"
            raise ConfigError("data.cache.size_gb", self._bytes_max / 1e9, rule, "Give the cache room for several shards")
        return self._brought(self._copy(url, sha256), Wanted(url, size, sha256), self._reserve)

    def keep(self, place: str, url: str, size: int, sha256: str) -> Path:
        """The same for a small file that is kept: it is called ``place`` below the cache's folder, and does not go for shards."""
        return self._brought(self.folder / place, Wanted(url, size, sha256), lambda *_: None)

    def read(self, url: str, bytes_max: int) -> bytes:
        """A file whose digest is not known: fetched each time. Raises CorpusError for more than ``bytes_max``, and as `fetch`."""
        stream = io.BytesIO()
        transfer.fetch(Wanted(url, bytes_max), stream, self._config)
        return stream.getvalue()

    def put(self, place: str, data: bytes) -> Path:
        """Keeps bytes that are already here, called ``place`` below the cache's folder."""
        copy, deadline = self.folder / place, time.monotonic() + self._config.timeout_s
        with _storage(self.folder, len(data)):
            while not copy.exists() or copy.read_bytes() != data:
                with claims.claimed(copy, place, deadline, lambda: None) as part:
                    if part is not None:
                        part.truncate(0)
                        part.write(data)
                        claims.publish(part, copy)
        return copy

    def doubt(self, url: str, size: int, sha256: str) -> None:
        """The copy of a shard has given bytes that it should not have: it is verified again when it is fetched next."""
        self._verified.pop(self._copy(url, sha256), None)

    def touch(self, descriptor: int) -> None:
        """An open copy is in use."""
        state = os.fstat(descriptor)
        if time.time() - state.st_atime > _TOUCH_S:
            os.utime(descriptor, ns=(time.time_ns(), state.st_mtime_ns))

    def _copy(self, url: str, sha256: str) -> Path:
        return self._shards / hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()

    def _brought(self, copy: Path, wanted: Wanted, reserve: Callable[[BinaryIO, int, float], None]) -> Path:
        """Makes sure of a copy. Who waits for another one to fetch it learns of its failure, where that is in this process."""
        deadline = time.monotonic() + self._config.timeout_s
        check = partial(self._raise_known, copy)
        check()
        with _storage(self.folder, wanted.bytes):
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            while not self._holds(copy, wanted):
                with claims.claimed(copy, urls.shown(wanted.url), deadline + _GRACE_S, check) as part:
                    if part is None or copy.exists():
                        continue
                    check()
                    try:
                        reserve(part, wanted.bytes, deadline)
                        transfer.fetch(wanted, part, self._config, max(deadline, time.monotonic() + _GRACE_S))
                    except (CorpusError, StorageError) as error:
                        seconds = WRONG_FOR_S if isinstance(error, CorpusError) else _AWAY_FOR_S
                        self._failed[copy] = error, time.monotonic() + seconds
                        raise
                    self._verified[copy] = _identity(claims.publish(part, copy))
        return copy

    def _raise_known(self, copy: Path) -> None:
        error, until = self._failed.get(copy, (None, 0.0))
        if isinstance(error, CorpusError) and time.monotonic() < until:
            raise CorpusError(error.field, error.value, error.rule, error.remedy)
        if error is not None and time.monotonic() < until:
            raise StorageError(*error.args)

    def _holds(self, copy: Path, wanted: Wanted) -> bool:
        """Whether there is a copy with the right bytes, read once by each process; one with others is removed."""
        try:
            stream = open(copy, "rb", opener=durable.own)  # noqa: SIM115
        except FileNotFoundError:
            return False
        with stream:
            state = os.fstat(stream.fileno())
            if self._verified.get(copy) != _identity(state):
                if state.st_size != wanted.bytes or _digest(stream) != wanted.sha256:
                    warnings.warn(
                        f"the cached copy of {urls.shown(wanted.url)} was damaged ({copy}); it is fetched again", stacklevel=3
                    )
                    claims.unlink_same(copy, state)
                    return False
                self._verified[copy] = _identity(state)
            self.touch(stream.fileno())
        return True

    def _reserve(self, part: BinaryIO, size: int, deadline: float) -> None:
        while not self._reserved(part, size):
            if time.monotonic() > deadline:
                rule = "copies that are being made take all of it"
                raise ConfigError(
                    "data.cache.size_gb", self._bytes_max / 1e9, rule, "Give the cache room for some shards for each rank"
                )
            time.sleep(_POLL_S)

    def _reserved(self, part: BinaryIO, size: int) -> bool:
        """Whether there was room for a part of ``size`` bytes, which it now takes; what was used longest ago went for it."""
        with open(self._shards / ".lock", "wb", opener=durable.own) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies, taken = [], size
            for entry in list(os.scandir(self._shards)):
                path = Path(entry.path)
                if path.suffix == claims.SUFFIX and not claims.is_alive(path):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    taken += 0 if state.st_ino == os.fstat(part.fileno()).st_ino else state.st_size
                    if path.suffix != claims.SUFFIX and path.name != ".lock":
                        copies.append((state.st_atime_ns, path, state.st_size))
            for _, path, its_size in sorted(copies):
                if taken <= self._bytes_max:
                    break
                path.unlink(missing_ok=True)
                taken -= its_size
            if taken > self._bytes_max:
                return False
            _allocate(part, size)
            return True


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns


def _digest(stream: BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _allocate(part: BinaryIO, size: int) -> None:
    try:
        if size:
            os.posix_fallocate(part.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(part.fileno(), size)


@contextlib.contextmanager
def _storage(folder: Path, needed: int = 0) -> Iterator[None]:
    """Raises StorageError where the cache's disk is full or fails."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = f"the disk is full: {needed:,} bytes were needed" if full else str(error.strerror)
        remedy = "Free space, or set a smaller data.cache.size_gb" if full else "Use a folder that can be written and locked"
        raise StorageError(f"data.cache.folder: got {str(folder)!r}; {problem}. {remedy}; the same command continues") from error
