"""What others may have written: files of bounded size, JSON of bounded depth, names that stay in their folder.

A digest says that a file is the one a manifest lists, not that the manifest is friendly: whoever can write one can write both.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES_MAX = 256 << 20
"""No manifest, tokenizer or table of settings comes near it."""


def open_plain(file: Path, bytes_max: int = JSON_BYTES_MAX) -> BinaryIO:
    """A plain file, open for reading. Raises OSError, and ValueError for a pipe, a device, or more than ``bytes_max``."""
    # A FIFO would wait for a writer, and /dev/zero never ends.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= bytes_max:
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    rule = f"at most {bytes_max} are read" if stat.S_ISREG(status.st_mode) else "only plain files are read"
    raise ValueError(f"it has {status.st_size} bytes, and {rule}")


def read_bytes(file: Path, bytes_max: int = JSON_BYTES_MAX) -> bytes:
    """All of a plain file. Raises what `open_plain` does."""
    with open_plain(file, bytes_max) as stream:
        return stream.read()


def read_json(file: Path, bytes_max: int = JSON_BYTES_MAX) -> Any:
    """The JSON value in a plain file. Raises OSError and ValueError."""
    return parse_json(read_bytes(file, bytes_max))


def parse_json(data: bytes | str) -> Any:
    """A JSON value. Raises ValueError, also for one that is nested more deeply than Python follows."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_inside(name: object) -> bool:
    """Whether a name in a list of files leads to a place below the list's folder: relative, no ``..``, nothing unprintable."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() else [""]
    return not any(part in ("", ".", "..") or "\\" in part for part in parts)


def plain(folder: Path, name: object) -> Path:
    """Where the file called ``name`` below ``folder`` is, or would be. Raises ValueError for a name or a link that leads away.

    The folder itself may be reached through links: it is where the user points.
    """
    if not is_inside(name):
        raise ValueError(f"{name!r} is no name of a file in this folder")
    path = folder
    for part in str(name).split("/"):
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{name!r} is a link, and what it leads to can change")
    return path
