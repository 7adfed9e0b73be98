"""One-dimensional arrays of token ids in NumPy's ``.npy`` format, version 1.0, without NumPy's general reader.

The general reader evaluates the header as a Python literal and can be asked to unpickle. A token chunk needs neither: its header
is a dtype and a length, which a pattern reads several times faster. ``numpy.load`` and webdataset read what is written here.
Source: NumPy's documentation, "numpy.lib.format".
"""

from __future__ import annotations

import functools
import re
import struct

import numpy as np
import numpy.typing as npt

HEADER_BYTES_MAX = 256
"""The headers of such arrays take 128 bytes; another writer may pad them differently."""

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(rb"\{'descr': '<(u[24]|i[248])', 'fortran_order': False, 'shape': \((\d{1,10}),\), \} *\n")


@functools.lru_cache(maxsize=8192)
def header(tokens: int, dtype: str) -> bytes:
    """The bytes before the data of an array of ``tokens`` items of ``dtype`` (``<u2``, ``<u4``, or signed)."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({tokens},), }}".encode()
    room = -(len(_MAGIC) + 2 + len(text) + 1) % 64  # the format aligns the data to 64 bytes
    return _MAGIC + struct.pack("<H", len(text) + room + 1) + text + b" " * room + b"\n"


def length(head: bytes) -> int:
    """How many items the array has whose file starts with ``head``; 0 when it is not a flat array of integers."""
    found = _parse(head)
    return found[1] if found else 0


def decode(data: bytes | memoryview) -> npt.NDArray[np.int32]:
    """The array in the file ``data`` as int32, shape [items]; ValueError when it is not a flat array of integers."""
    found = _parse(bytes(data[:HEADER_BYTES_MAX]))
    if found is None:
        raise ValueError("not a flat array of integers in .npy format 1.0")
    dtype, items, start = found
    return np.frombuffer(data, f"<{dtype}", items, start).astype(np.int32)


def _parse(head: bytes) -> tuple[str, int, int] | None:
    """(dtype, items, offset of the data)."""
    if not head.startswith(_MAGIC) or len(head) < 10:
        return None
    end = 10 + int.from_bytes(head[8:10], "little")
    found = _HEADER.fullmatch(head, 10, end) if end <= len(head) else None
    return (found[1].decode(), int(found[2]), end) if found else None
