"""Files that many threads read at once, a few of them open at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from scaletrain.errors import CorpusError, StorageError


class _Open:
    """A file descriptor that closes when the last reader lets go of it: one evicted in mid-read stays valid until then."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class Files:
    """The files read last, opened on first use; at most ``limit`` at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[Path, _Open] = OrderedDict()

    def read(self, file: Path, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, fewer at the end of the file; ``pread`` shares no position between threads."""
        handle = self._held(file)  # held until it is read: another thread may let go of it
        return os.pread(handle.number, length, offset)

    def fetch(self, file: Path) -> None:
        """Brings a file from where it lies, which may take minutes. Here it does not: files of this machine are just read."""

    def local(self, file: Path) -> Path:
        """Where the bytes of a file are on this machine."""
        return file

    def whole(self, file: Path, offset: int, length: int, remedy: str) -> bytes:
        """``length`` bytes at ``offset``. Raises CorpusError where there are fewer, StorageError when the disk fails."""
        try:
            data = self.read(file, offset, length)
        except OSError as error:
            self.close(file)
            raise StorageError(f"{file}: reading byte {offset} failed: {error.strerror}. {remedy}") from error
        if len(data) < length:
            self.close(file)
            said = f"{len(data)} bytes at byte {offset}"
            raise CorpusError(str(file), said, f"its index says {length}: the file was cut short", remedy)
        return data

    def close(self, file: Path) -> None:
        """Opens the file again for the next read: what failed may be the handle, of a file that was restored since."""
        with self._lock:
            self._open.pop(file, None)

    def _held(self, file: Path) -> _Open:
        with self._lock:
            handle = self._open.pop(file, None)
        # Not under the lock: a file server that hangs here would hold up all threads.
        handle = handle or _Open(self._descriptor(file))
        with self._lock:
            self._open[file] = handle
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return handle

    def _descriptor(self, file: Path) -> int:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
