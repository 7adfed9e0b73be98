"""Tars for tests, written by the standard library: a reference that shares nothing with the code under test."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np


def npy_bytes(length: int) -> bytes:
    """A ``.npy`` file of ``length`` 16-bit numbers."""
    stream = io.BytesIO()
    np.save(stream, np.arange(length, dtype=np.uint16))
    return stream.getvalue()


def make_tar(file: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar with these members, in this order."""
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def make_special(file: Path, **fields: object) -> Path:
    """A tar with a good sample and one member with other header fields."""
    with tarfile.open(file, "w") as tar:
        tar.addfile(tarfile.TarInfo("good.txt"))
        info = tarfile.TarInfo("bad.txt")
        for name, value in fields.items():
            setattr(info, name, value)
        tar.addfile(info)
    return file
