"""What a rank is at, and since when, where another process can read it at any time.

A rank that hangs cannot say so, and a thread of its own may hang with it. So every rank writes, at each section of its work, a
few bytes into a file in memory, and whoever started it (`launcher/watch.py`) reads them. Where nobody watches, nothing is
written.

::

    with heartbeat.section("forward"):
        ...

The launcher says where to write by a variable beside the rank's own; that is all there is to set.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from types import TracebackType

VARIABLE = "SCALETRAIN_HEARTBEAT"
"""Two open descriptors: of the file for beats, and of that for stacks. They have no names, and go with the last process."""
SECTIONS = ("other", "start", "data", "forward", "backward", "reduce", "step", "evaluation", "load", "save", "end")
DUMP = signal.SIGUSR2
"""Asks a rank for the stacks of all its threads. Its handler is C, and needs no interpreter lock."""
_LAYOUT = struct.Struct("<QQI")  # beats so far, CLOCK_MONOTONIC in ns, number of the section
SIZE = _LAYOUT.size
"""Bytes of the file for the beats."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The last sign of life of a rank."""

    count: int
    """Beats so far. Ranks do the same in the same order: the one with the fewest is the one that the others wait for."""
    at_s: float
    """On the monotonic clock, which all processes of a machine share."""
    section: str


class _Section:
    """A context manager that is made once: sections are entered thousands of times a second."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        if _file is not None:
            _within.append(self._number)
            _beat(self._number)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if _file is not None and len(_within) > 1:
            _within.pop()
            _beat(_within[-1])


_file: mmap.mmap | None = None
_count = 0
_within: list[int] = [0]
"""The sections that this rank is in, the innermost last."""
_ALL = {name: _Section(number) for number, name in enumerate(SECTIONS)}


def section(name: str) -> _Section:
    """What is done inside belongs to this section (one of ``SECTIONS``). For the main thread: a rank has one place."""
    return _ALL[name]


def begin() -> None:
    """Beats from now on, if the launcher asked for it; call it as early as possible. What is not in a section is ``other``."""
    global _file, _count, _within
    given = os.environ.get(VARIABLE)
    if given is None or _file is not None:
        return
    beat, stack = map(int, given.split(","))
    _file, _count, _within = mmap.mmap(beat, SIZE), 0, [0]
    faulthandler.register(DUMP, file=stack, all_threads=True)
    _beat(SECTIONS.index("start"))


def _beat(number: int) -> None:
    global _count
    assert _file is not None
    _count += 1
    _LAYOUT.pack_into(_file, 0, _count, time.monotonic_ns(), number)


def read(beat: int) -> Beat | None:
    """The last beat in the file behind a descriptor; None before the first."""
    count, at_ns, number = _LAYOUT.unpack(os.pread(beat, SIZE, 0))
    return Beat(count, at_ns / 1e9, SECTIONS[number]) if count and number < len(SECTIONS) else None
