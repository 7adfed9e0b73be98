"""Files that are there whole or not at all, and stay there when the power goes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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
