"""Files that many threads read at once, a few of them open at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path


class _Open:
    """A file descriptor that closes when the last reader lets go of it: one evicted in mid-read stays valid until then."""

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if number := getattr(self, "number", None):
            os.close(number)


class Files:
    """The files read last, opened on first use; at most ``limit`` at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[Path, _Open] = OrderedDict()

    def read(self, file: Path, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, fewer at the end of the file; ``pread`` shares no position between threads."""
        with self._lock:
            handle = self._open.pop(file, None)
        handle = handle or _Open(file)  # not under the lock: a file server that hangs here would hold up all threads
        with self._lock:
            self._open[file] = handle
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return os.pread(handle.number, length, offset)

    def close(self, file: Path) -> None:
        """Opens the file again for the next read: what failed may be the handle, of a file that was restored since."""
        with self._lock:
            self._open.pop(file, None)
