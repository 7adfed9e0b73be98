"""Files that are there whole or not at all, and stay there when the power goes."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write(path: Path, data: bytes) -> None:
    """Writes under another name in the same folder, syncs, and renames. Raises OSError; ``path`` is then as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # A leftover of a killed write goes; a link that somebody puts there instead is not followed.
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb", opener=own) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def own(path: str, flags: int) -> int:
    """For ``open(..., opener=own)``: does not follow a link in the place of the file."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def sync(path: Path) -> None:
    """Brings a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Gives each of two files or folders the other's name, in one step (renameat2(2)); False where that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
