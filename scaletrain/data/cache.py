"""Whole local copies of shards that lie elsewhere: shared by the processes of a machine, verified, bounded in size.

::

    FOLDER/shards/KEY        a whole copy; KEY is a digest of the full URL and of the bytes that it must have
    FOLDER/shards/KEY.part   one that is being made, locked by the process that makes it
    FOLDER/shards/.lock      held for a moment, to make room

A copy is written under its ``.part`` and renamed when its digest is right and it is on the disk. The lock is on that same file:
others that want the shard wait for it, and when its holder is killed the kernel frees it, so that what a kill leaves behind is
known by being unlocked. A ``.part`` has its full length from the start, which is how the others see the room that it will take.

Copies go in the order of their last use, which is their access time. A process that reads one that goes keeps its open file.
The folder must be on a disk of the machine, or on a file system whose locks hold between machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field

from scaletrain import durable
from scaletrain.data import transfer, urls
from scaletrain.data.transfer import TransferConfig, Wanted
from scaletrain.errors import ConfigError, CorpusError, StorageError

WRONG_FOR_S = 300.0
"""What was found wrong at its source is asked for again after this time, not for each of its chunks."""
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
    """When a transfer is given up."""


class Cache:
    """The copies in one folder. May be used by many threads, and with others on the same folder in many processes."""

    def __init__(self, config: CacheConfig) -> None:
        """Raises StorageError where the folder cannot be made."""
        self.folder = config.folder.expanduser()
        self._shards, self._bytes_max, self._config = self.folder / "shards", int(config.size_gb * 1e9), config.transfer
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._wrong: dict[str, tuple[CorpusError, float]] = {}
        with _storage(self.folder):
            self._shards.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fetch(self, url: str, size: int, sha256: str) -> Path:
        """The local copy of a shard of ``size`` bytes, verified; it may be evicted before it is opened: then fetch it again.

        Raises ConfigError where the cache is smaller than the shard, CorpusError where the source has no such file or another
        one, and StorageError where the source does not answer in time or the disk is full or fails.
        """
        wanted, deadline = Wanted(url, size, sha256), time.monotonic() + self._config.timeout_s
        copy = self._shards / hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()
        self._check(copy.name, wanted)
        with _storage(self.folder, size):
            while not self._holds(copy, wanted):
                with self._claimed(copy, wanted, deadline) as part:
                    if part is not None and not copy.exists():
                        self._fill(part, copy, wanted, deadline)
        return copy

    def doubt(self, copy: Path) -> None:
        """A copy has given bytes that it should not have: it is verified again when it is fetched next."""
        self._verified.pop(copy.name, None)

    def _check(self, key: str, wanted: Wanted) -> None:
        if wanted.bytes > self._bytes_max:
            rule = f"{urls.shown(wanted.url)} alone has {wanted.bytes / 1e9:.3g} GB"
            raise ConfigError("data.cache.size_gb", self._bytes_max / 1e9, rule, "Give the cache room for several shards")
        error, until = self._wrong.get(key, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise CorpusError(error.field, error.value, error.rule, error.remedy)

    def _holds(self, copy: Path, wanted: Wanted) -> bool:
        """Whether there is a copy with the right bytes, read once by each process; one with others is removed."""
        try:
            stream = open(copy, "rb", opener=durable.own)  # noqa: SIM115
        except FileNotFoundError:
            return False
        with stream:
            state = os.fstat(stream.fileno())
            if self._verified.get(copy.name) != _identity(state):
                if state.st_size != wanted.bytes or _digest(stream) != wanted.sha256:
                    warnings.warn(
                        f"the cached copy of {urls.shown(wanted.url)} was damaged ({copy}); it is fetched again", stacklevel=3
                    )
                    _unlink_same(copy, state)
                    return False
                self._verified[copy.name] = _identity(state)
            if time.time() - state.st_atime > _TOUCH_S:
                os.utime(stream.fileno(), ns=(time.time_ns(), state.st_mtime_ns))
        return True

    @contextlib.contextmanager
    def _claimed(self, copy: Path, wanted: Wanted, deadline: float) -> Iterator[BinaryIO | None]:
        """The part of a copy, locked, for who is to make it; None when another one has made it in the meantime."""
        part = copy.with_suffix(".part")
        stream = _locked(part)
        while stream is None:
            if copy.exists():
                break
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{urls.shown(wanted.url)}: another process of this machine has been fetching it ({part}), and was not done "
                    f"after {self._config.timeout_s:g} s (data.cache.transfer.timeout_s). The same command continues"
                )
            time.sleep(_POLL_S)
            stream = _locked(part)
        if stream is None:
            yield None
            return
        with stream:
            try:
                yield stream
            finally:
                _unlink_same(part, os.fstat(stream.fileno()))  # still locked; it has another name when it is whole

    def _fill(self, part: BinaryIO, copy: Path, wanted: Wanted, deadline: float) -> None:
        while not self._reserved(part, wanted.bytes):
            if time.monotonic() > deadline:
                rule = "copies that are being made take all of it"
                raise ConfigError(
                    "data.cache.size_gb", self._bytes_max / 1e9, rule, "Give the cache room for some shards for each rank"
                )
            time.sleep(_POLL_S)
        try:
            transfer.fetch(wanted, part, self._config, deadline)
        except CorpusError as error:
            self._wrong[copy.name] = error, time.monotonic() + WRONG_FOR_S
            raise
        part.flush()
        os.fsync(part.fileno())
        state = os.fstat(part.fileno())
        os.replace(copy.with_suffix(".part"), copy)
        durable.sync(self._shards)
        self._verified[copy.name] = _identity(state)

    def _reserved(self, part: BinaryIO, size: int) -> bool:
        """Whether there was room for a part of ``size`` bytes, which it now takes; what was used longest ago went for it."""
        with open(self._shards / ".lock", "wb", opener=durable.own) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies, taken = [], size
            for entry in list(os.scandir(self._shards)):
                path = Path(entry.path)
                if path.suffix == ".part" and not _alive(path):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    taken += 0 if state.st_ino == os.fstat(part.fileno()).st_ino else state.st_size
                    if path.suffix != ".part" and path.name != ".lock":
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


def _locked(part: Path) -> BinaryIO | None:
    """The file, made where it is not there, if no other process has it locked."""
    stream = open(part, "r+b", opener=_made)  # noqa: SIM115 - the lock lasts as long as it is open
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same(part, os.fstat(stream.fileno())):  # who had it may have given it another name, or have removed it
            return stream
    except BlockingIOError:
        pass
    except BaseException:
        stream.close()
        raise
    stream.close()
    return None


def _alive(part: Path) -> bool:
    """Whether a process is making it. What a killed one has left is removed."""
    try:
        stream = open(part, "rb", opener=durable.own)  # noqa: SIM115
    except FileNotFoundError:
        return False
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        _unlink_same(part, os.fstat(stream.fileno()))
        return False


def _made(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _is_same(path: Path, state: os.stat_result) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(follow_symlinks=False), state)
    return False


def _unlink_same(path: Path, state: os.stat_result) -> None:
    """Removes what was looked at, and not what has come into its place."""
    if _is_same(path, state):
        path.unlink(missing_ok=True)


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
