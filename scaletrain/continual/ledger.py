"""An append-only ledger: one JSON object per line, each saying which one it follows.

An entry has ``n`` (from 1), ``event``, its facts, ``previous`` (the digest of the entry before), ``sha256`` (its own digest), and
``at`` (UTC), which is in no digest: the same commands give the same digests at any time. No line can be changed, put in or taken
out without a trace, except at the end.

A line counts once its line break is on the disk. One that a kill or a power cut has torn is passed over, and overwritten by the
next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaletrain import durable, outside
from scaletrain.errors import CheckpointError, StorageError

Entry = dict[str, Any]

_ORIGIN = "scaletrain-ledger-1"
"""What the first entry follows; names the format."""
_OWN_FIELDS = {"n", "event", "previous", "sha256", "at"}


class Ledger:
    """The entries of one file, which need not be there yet. Only one process at a time may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """All entries, oldest first. Raises CheckpointError, naming the line, for a ledger that was altered."""
        return self._read()[0]

    def append(self, event: str, facts: Mapping[str, Any]) -> Entry:
        """Add an entry, durably. ``facts`` are plain JSON values.

        Raises ValueError for facts that are not, or that have the name of a field of every entry, and StorageError.
        """
        if _OWN_FIELDS & facts.keys():
            raise ValueError(f"{sorted(_OWN_FIELDS & facts.keys())} are fields of every entry, not facts of one")
        entries, size = self._read()
        previous = entries[-1]["sha256"] if entries else _ORIGIN
        tree = {"n": len(entries) + 1, "event": event, **facts, "previous": previous}
        entry: Entry = json.loads(json.dumps(tree, allow_nan=False))  # as it will be read: a digest of tuples would differ
        entry |= {"sha256": _digest(entry), "at": utc_now()}
        with writing(self.path):
            self._write_at(size, json.dumps(entry).encode() + b"\n")
            if not entries:
                durable.sync(self.path.parent)
        return entry

    def _write_at(self, position: int, data: bytes) -> None:
        """Makes ``data`` all that there is from ``position`` on."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(descriptor, position)
            os.lseek(descriptor, position, os.SEEK_SET)
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self) -> tuple[list[Entry], int]:
        """The entries, and how many bytes they take."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise CheckpointError(str(self.path), error.strerror, "a ledger is a file that this user can read") from None
        *lines, torn = data.split(b"\n")
        entries: list[Entry] = []
        previous = _ORIGIN
        for number, line in enumerate(lines, start=1):
            entry = parsed(line)
            if not isinstance(entry, dict) or entry.get("sha256") != _digest(entry) or entry.get("previous") != previous:
                rule = "the line is not the one that was written here, after the one before it: entries are only ever added"
                raise CheckpointError(f"{self.path}:{number}", line[:80].decode(errors="replace"), rule, "Restore a backup of it")
            entries.append(entry)
            previous = entry["sha256"]
        if torn:
            warnings.warn(
                f"{self.path}:{len(lines) + 1}: the line was torn while it was written and does not count", stacklevel=3
            )
        return entries, len(data) - len(torn)


def parsed(data: bytes) -> Any:
    """The JSON value; None where there is none."""
    with contextlib.suppress(ValueError):
        return outside.parse_json(data)
    return None


def utc_now() -> str:
    """To the second, as in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises StorageError, naming ``path``, for a disk that is full, read-only or failing."""
    try:
        yield
    except OSError as error:
        problem = f"it cannot be written ({error.strerror or error}); what was there before is untouched"
        raise StorageError(f"lineage: got {str(path)!r}; {problem}. Mend that and run the same command: it continues") from error


def _digest(entry: Mapping[str, Any]) -> str:
    content = {key: value for key, value in entry.items() if key not in ("sha256", "at")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
