"""One rank's files: hashed while they are written, and brought to the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.commit.boundary import Boundary, Hook, passed

Entry = dict[str, Any]
"""What a manifest says of a file: ``name``, ``bytes``, ``sha256``."""

CHUNK = 2**23
"""Bytes that are hashed and written at a time. Both let go of the interpreter lock."""


@dataclass(frozen=True, slots=True)
class File:
    """A file that is to be written."""

    name: str
    size: int
    """Bytes of all ``parts`` together."""
    parts: Iterable[Any]
    """What it holds, in order: objects of bytes (bytes, flat arrays of uint8). Made one at a time, where it is a generator."""


def write_file(folder: Path, file: File, at: Hook = passed) -> Entry:
    """Writes and syncs ``file``. Its digest is that of the bytes handed to the system, never of what was read back."""
    digest, written, half = hashlib.sha256(), 0, file.size // 2
    with open(folder / file.name, "xb", buffering=0) as stream:
        at(Boundary.FILE_OPENED)
        for part in file.parts:
            left = memoryview(part).cast("B")
            while left:
                chunk = left[: min(CHUNK, half - written) if written < half else CHUNK]
                digest.update(chunk)
                _write(stream.fileno(), chunk)
                written += len(chunk)
                left = left[len(chunk) :]
                if written == half:
                    at(Boundary.FILE_HALF_WRITTEN)
        at(Boundary.FILE_WRITTEN)
        os.fsync(stream.fileno())
    at(Boundary.FILE_SYNCED)
    if written != file.size:
        raise OSError(f"{file.name}: {written} bytes were given where {file.size} were announced")
    return {"name": file.name, "bytes": written, "sha256": digest.hexdigest()}


def _write(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
