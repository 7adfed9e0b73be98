"""A file that one process makes while the others wait for it, and that a killed one does not leave locked.

The file that is being made, ``NAME.part``, is its own lock: who holds it makes it and gives it its name. When its holder is
killed, the kernel frees it, and what is left is known by being unlocked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from scaletrain import durable
from scaletrain.errors import StorageError

SUFFIX = ".part"
_POLL_S = 0.05


def part_of(file: Path) -> Path:
    """What a file is called while it is being made."""
    return file.with_name(f"{file.name}{SUFFIX}")


@contextlib.contextmanager
def claimed(file: Path, name: str, deadline: float, waiting: Callable[[], None]) -> Iterator[BinaryIO | None]:
    """The part of a file for who is to make it, locked; None when another one has made the file in the meantime.

    It is removed at the end unless it was published. Who waits calls ``waiting`` from time to time; after ``deadline``, on the
    monotonic clock, StorageError is raised, which calls the file ``name``. Also raises OSError.
    """
    part = part_of(file)
    while (stream := _locked(part)) is None:
        if file.exists():
            yield None
            return
        waiting()
        if time.monotonic() > deadline:
            raise StorageError(f"{name}: another process or thread is fetching it, and was not done in time. It holds {part}")
        time.sleep(_POLL_S)
    with stream:
        try:
            yield stream
        finally:
            unlink_same(part, os.fstat(stream.fileno()))


def publish(part: BinaryIO, file: Path) -> os.stat_result:
    """Brings a claimed part to the disk and gives it its name."""
    part.flush()
    os.fsync(part.fileno())
    state = os.fstat(part.fileno())
    os.replace(part_of(file), file)
    durable.sync(file.parent)
    return state


def is_alive(part: Path) -> bool:
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
        unlink_same(part, os.fstat(stream.fileno()))
        return False


def unlink_same(path: Path, state: os.stat_result) -> None:
    """Removes the file that was looked at, and not what has come into its place."""
    if _is_same(path, state):
        path.unlink(missing_ok=True)


def _locked(part: Path) -> BinaryIO | None:
    """The file, made where it is not there, if nobody else has it locked."""
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


def _made(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _is_same(path: Path, state: os.stat_result) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(follow_symlinks=False), state)
    return False
