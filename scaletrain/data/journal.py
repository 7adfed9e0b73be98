"""What an unfinished prepared folder remembers between one run and the next.

``progress.json`` is replaced after every finished shard and says how far the source was read. Beside it three files grow:
``seen.bin`` and ``signatures.bin``, by which a document is found to repeat an earlier one, and ``dropped.jsonl``, what was not
used and why. A run that was killed continues from the last whole shard; what lies behind it is written again, with the same
bytes. Only ``dropped.jsonl`` stays when the manifest is written.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from scaletrain import durable, outside
from scaletrain.data.shards import Written, storage, write_json
from scaletrain.errors import ConfigError, CorpusError, StorageError

FORMAT = 2
_WRITE_BYTES = 1 << 20
LOGS = ("seen.bin", "signatures.bin", "dropped.jsonl")
_LOCK = ".prepare.lock"
SPLITS = ("train", "validation")
_OURS = ("manifest.json", "progress.json", _LOCK)


@dataclasses.dataclass(slots=True)
class SplitState:
    """How far one split has come: everything up to and with the last document of its last whole shard."""

    documents: int = 0
    """Documents of the source that were dealt with."""
    source_hash: str = ""
    """A running hash of those documents as they came, which shows whether the source is still the same."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """What became of them: 'kept', 'held_out', or why they were dropped."""
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    done: bool = False


class Log:
    """A file that grows; what lies beyond the size that the journal remembers does not count. Methods raise StorageError."""

    def __init__(self, file: Path, size: int = 0) -> None:
        self.file, self.size = file, size
        self._stream: FileIO | None = None
        self._waiting = bytearray()

    def read(self, record_bytes: int) -> Iterator[bytes]:
        """What counts, some whole records at a time."""
        at_once = max((1 << 24) // record_bytes, 1) * record_bytes
        with self.file.open("rb") as stream:
            for at in range(0, self.size, at_once):
                yield stream.read(min(at_once, self.size - at))

    def add(self, data: bytes) -> None:
        """Append; durable after ``sync``."""
        self._waiting += data
        self.size += len(data)
        if len(self._waiting) >= _WRITE_BYTES:
            self._write()

    def sync(self) -> None:
        """Make durable what was added."""
        self._write()
        with storage(self.file.parent):
            os.fsync(self._open().fileno())

    def _write(self) -> None:
        with storage(self.file.parent, len(self._waiting)):
            while self._waiting:
                del self._waiting[: self._open().write(self._waiting)]

    def close(self) -> None:
        """Let go of the file; what was not synced does not count."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _open(self) -> FileIO:
        if self._stream is None:
            self._stream = open(self.file, "ab", buffering=0, opener=durable.own)  # noqa: SIM115
            self._stream.truncate(self.size - len(self._waiting))  # beyond lies what a kill left unaccounted for
        return self._stream


class Journal:
    """The state of a folder that is being prepared; ``save`` makes it durable."""

    def __init__(self, folder: Path, config: Mapping[str, Any], parts: int | None = None) -> None:
        """``config`` is the plain tree of what decides the folder's bytes, ``parts`` how many jobs share the work."""
        self.folder, self.config, self.parts = folder, config, parts
        self.tokenizer: str | None = None
        self.documents: int | None = None
        """Documents in the source of train, known once the tokenizer was trained on it; for the progress bar."""
        self.splits: dict[str, SplitState] = {}
        self.logs = {name: Log(folder / name) for name in LOGS}

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any], parts: int | None = None) -> Journal:
        """Continue the journal in ``folder``, or begin one for so many ``parts`` (None: the work is not split).

        Raises ConfigError when the folder was begun with another configuration. A journal that is continued keeps its ``parts``.
        """
        journal = cls(folder, config, parts)
        if not (folder / "progress.json").exists():
            journal.save()
            return journal
        try:
            tree = outside.read_json(folder / "progress.json")
            require_same(folder, tree["config"], config)
            journal.parts, journal.tokenizer, journal.documents = tree.get("parts"), tree["tokenizer"], tree["documents"]
            journal.splits = {name: SplitState(**state) for name, state in tree["splits"].items()}
            journal.logs = {name: Log(folder / name, int(tree["logs"][name])) for name in LOGS}
        except (ValueError, TypeError, KeyError, AttributeError):
            rule = "it says how far an interrupted prepare has come"
            raise CorpusError(str(folder / "progress.json"), "another content", rule, "Prepare again with --fresh") from None
        for name, log in journal.logs.items():
            size = (folder / name).stat().st_size if (folder / name).exists() else 0
            if size < log.size:
                rule = f"progress.json says {log.size}"
                raise ConfigError(str(folder / name), f"{size} bytes", rule, "Prepare again with --fresh")
        return journal

    def finish_shard(self, split: str, written: Written | None, *, done: bool) -> None:
        """Add a shard to a split and make everything up to it durable."""
        if written is not None:
            self.splits[split].shards.append(dataclasses.asdict(written))
        self.splits[split].done = done
        self.save()

    def save(self) -> None:
        """Write the journal; the logs first, since ``progress.json`` says how much of them counts. Raises StorageError."""
        for log in self.logs.values():
            log.sync()
        tree = {
            "format": FORMAT,
            "config": self.config,
            "parts": self.parts,
            "tokenizer": self.tokenizer,
            "documents": self.documents,
            "logs": {name: log.size for name, log in self.logs.items()},
            "splits": {name: dataclasses.asdict(state) for name, state in self.splits.items()},
        }
        write_json(self.folder / "progress.json", tree)

    def restart(self) -> None:
        """Forget all shards, and remove them; the tokenizer stays."""
        self.close()
        self.splits.clear()
        self.logs = {name: Log(self.folder / name) for name in LOGS}
        self.save()
        clear_shards(self.folder)

    def close(self) -> None:
        """Let go of the logs; what was not saved does not count."""
        for log in self.logs.values():
            log.close()

    def remove(self) -> None:
        """Drop the journal of a finished folder."""
        self.close()
        with storage(self.folder):
            for name in ("progress.json", "seen.bin", "signatures.bin"):
                (self.folder / name).unlink(missing_ok=True)


def require_ours(folder: Path) -> None:
    """Raise ConfigError for a folder with contents that no prepare made: nothing of the user's is written over or removed."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError("output", str(folder), "the output is a folder; this is a file", "Use a new folder")
    foreign = [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")] if folder.is_dir() else []
    if foreign and not any((folder / name).exists() for name in _OURS):
        rule = f"the folder is new, empty or a prepared one; this one holds {foreign[0]!r}"
        raise ConfigError("output", str(folder), rule, "Use a new folder")


def require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming a setting that differs, when a folder was made with another configuration."""
    first, second = dict(_flat(before)), dict(_flat(now))
    for path in sorted(first.keys() | second.keys()):
        if first.get(path) != second.get(path):
            rule = f"the folder {folder} was begun with {first.get(path)!r}"
            raise ConfigError(
                path, second.get(path), rule, "Use a new output folder, or --fresh to prepare this one from the start"
            )


def clear(folder: Path) -> None:
    """Remove what prepare wrote, and only that; the manifest first, so that what remains never counts as prepared."""
    require_ours(folder)
    with storage(folder):
        for name in ("manifest.json", "progress.json", "report.json", *LOGS):
            (folder / name).unlink(missing_ok=True)
        clear_shards(folder)
        for file in (folder / "tokenizer").glob("*"):
            file.unlink()
    clear_parts(folder)


def clear_shards(folder: Path) -> None:
    """Remove the shards of a folder, and what a killed run left of one."""
    with storage(folder):
        for split in SPLITS:
            for file in (folder / split).glob("*[0-9].*"):
                if file.suffix in (".tar", ".idx", ".tmp"):
                    file.unlink()


def clear_parts(folder: Path, *, waiting: str | None = None) -> None:
    """Remove what the parts of a folder have left; files that are not theirs stay. ``waiting``: as for ``locked``."""
    for part in sorted((folder / "parts").glob("*-of-*")):
        with locked(part, what="part", waiting=waiting):
            clear_pieces(part)
            (part / _LOCK).unlink()
        with suppress(OSError):
            part.rmdir()
    with suppress(OSError):
        (folder / "parts").rmdir()


def clear_pieces(part: Path) -> None:
    """Remove what one part has encoded; the account of it first."""
    with storage(part):
        (part / "progress.json").unlink(missing_ok=True)
        for split in SPLITS:
            for file in (*part.glob(f"{split}/*.piece"), *part.glob(f"{split}/.*.piece.tmp")):
                file.unlink()
            with suppress(OSError):
                (part / split).rmdir()


@contextmanager
def locked(folder: Path, *, what: str = "folder", waiting: str | None = None) -> Iterator[None]:
    """Hold the folder for one prepare at a time; a killed one lets go by itself.

    When another one holds it: prints ``waiting`` and waits, or, without it, raises ConfigError. ``what`` the folder is, for
    messages. Raises StorageError where files cannot be locked.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / _LOCK).open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                rule = f"another prepare is writing this {what}"
                raise ConfigError("output", str(folder), rule, "Wait for it to end, or use another one") from None
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            problem = f"the file system cannot lock files ({error.strerror}), so that two jobs could write it at once"
            raise StorageError(f"output: got {str(folder)!r}; {problem}. Mount it with locks, or use another one") from error
        yield


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; a list is one value."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
