"""A lineage on disk: what was done to it, its versions, and which of them is published.

::

    LINEAGE/
      ledger.jsonl              what happened; entries are only ever added
      published                 {"version": "0003-NAME", "digest": ...}: replaced in one rename
      versions/0003-NAME/       model/  state/  memory.jsonl  evaluation.json  MANIFEST.json: there whole or not at all
      tasks/NAME/               a task's data, frozen
      work/0004-NAME/           a stage under way
      lease-00000007.json       of the one command that may change any of this

A version is what the ledger says was committed: the digest in that entry is the manifest's, which has those of all files.

Publishing is written into the ledger first, and the pointer follows. A kill between the two leaves the version before published,
whole, and whoever holds the lineage next lets the pointer follow. A pointer that says anything else was changed by hand.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaletrain import durable, lease
from scaletrain.continual import sealed
from scaletrain.continual.ledger import Entry, Ledger, parsed, writing
from scaletrain.continual.sealed import MANIFEST, RESTORE
from scaletrain.errors import CheckpointError, ConfigError, InputError, ScaletrainError
from scaletrain.lease import Lease

LEDGER, POINTER, EVALUATION = "ledger.jsonl", "published", "evaluation.json"
COMMITTED, PUBLISHED, ROLLED_BACK = "committed", "published", "rolled back"
"""Events that only the store writes; their entries have ``version`` and ``digest``."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(rf"\d{{4,}}-{_NAME.pattern}")


class Store:
    """One lineage. Making the object reads nothing, and whatever changes the lineage needs ``hold``.

    Every method may raise CheckpointError, naming the file, for what is missing or altered, and those that write StorageError;
    what was there before then still is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ledger = Ledger(folder / LEDGER)
        self._lease: Lease | None = None

    def check(self) -> None:
        """Raises ConfigError where the folder is no lineage, CheckpointError where its ledger was altered."""
        if not self.entries():
            rule = f"a lineage is a folder with a {LEDGER}"
            raise ConfigError("lineage", str(self.folder), rule, "Name the output of a stream, or begin one")

    def task_folder(self, task: str) -> Path:
        """Where a task's data is frozen. Raises ConfigError for what cannot be the name of a folder."""
        return self.folder / "tasks" / _named(_NAME, task, "task")

    def work_folder(self, version: str) -> Path:
        """Where the stage that becomes a version is under way."""
        return self.folder / "work" / _named(_VERSION, version, "version")

    def version_folder(self, version: str) -> Path:
        """Where a version is; whether it is there and whole, ``verify`` says."""
        return self.folder / "versions" / _named(_VERSION, version, "version")

    # ------------------------------------------------------------------------------------------------------ lock and ledger

    @contextlib.contextmanager
    def hold(self, own: Lease | None = None) -> Iterator[None]:
        """Keep other commands from changing the lineage, whose folder is made if need be. A killed holder lets go by itself.

        ``own``: the lease of the folder, where this job has it already. Raises OccupiedError where somebody else holds it, with
        who and since when; and inside, before anything is changed, LeaseLostError where somebody else took it over.
        """
        with writing(self.folder):
            held = own or lease.claim(self.folder, field="lineage")
        self._lease = held
        try:
            self._let_pointer_follow()
            yield
        finally:
            self._lease = None
            if own is None:
                held.release()

    def entries(self) -> list[Entry]:
        """The ledger, oldest first; empty before the first entry."""
        return self._ledger.entries()

    def append(self, event: str, **facts: Any) -> Entry:
        """Add an entry to the ledger. ``facts`` are plain JSON values. Raises ValueError for an event that is the store's own."""
        if event in (COMMITTED, PUBLISHED, ROLLED_BACK):
            raise ValueError(f"{event!r} is written by the store itself")
        return self._append(event, facts)

    def _append(self, event: str, facts: Mapping[str, Any]) -> Entry:
        self._require_held()
        return self._ledger.append(event, facts)

    def _require_held(self) -> None:
        if self._lease is None:
            raise ScaletrainError(f"lineage: got {str(self.folder)!r}; it is changed only while it is held, by Store.hold")
        self._lease.check()

    # ------------------------------------------------------------------------------------------------------------- versions

    def partial_version(self, version: str) -> Path:
        """An empty folder, to be filled with what becomes ``version``. Whatever was filled earlier and not committed goes."""
        self._require_held()
        final = self.version_folder(version)
        with writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            for left in final.parent.glob(".*.partial"):
                shutil.rmtree(left)
            _partial(final).mkdir()
        return _partial(final)

    def commit_version(self, version: str) -> str:
        """Make of ``partial_version`` the version itself, for good; returns its digest.

        A version that is already there stays as it is: a command that was killed can be repeated.
        """
        self._require_held()
        final = self.version_folder(version)
        if not final.exists():
            with writing(final):
                sealed.seal(_partial(final), final, self._require_held)
        digest, files = sealed.manifest(final)
        sealed.check(final, files)
        known = self._committed(version)
        if known is None:
            self._append(COMMITTED, {"version": version, "digest": digest})
        elif known != digest:
            raise _altered(final, known)
        with writing(final):
            if _partial(final).exists():  # filled once more by a command that was killed right after the version got its name
                shutil.rmtree(_partial(final))
        return digest

    def verify(self, version: str) -> str:
        """Read all of a version; returns its digest. Raises CheckpointError where it is not what was committed."""
        digest, files = self._manifest(version)
        sealed.check(self.version_folder(version), files)
        return digest

    def evaluation(self, version: str) -> dict[str, Any]:
        """What was measured of a version; of its files only this one is read."""
        _, files = self._manifest(version)
        folder = self.version_folder(version)
        sealed.check_file(folder, files, EVALUATION)
        tree: dict[str, Any] = json.loads((folder / EVALUATION).read_bytes())
        return tree

    def _manifest(self, version: str) -> tuple[str, sealed.Files]:
        """Digest and files of a version, as they were committed."""
        folder, known = self.version_folder(version), self._committed(version)
        if known is None:
            raise CheckpointError(
                str(folder), version, "the ledger does not know this version", "Name one that is in its history"
            )
        digest, files = sealed.manifest(folder)
        if digest != known:
            raise _altered(folder, known)
        return digest, files

    def _committed(self, version: str) -> str | None:
        """The digest that a version was committed with."""
        found = (entry["digest"] for entry in self.entries() if entry["event"] == COMMITTED and entry["version"] == version)
        return next(found, None)

    # ---------------------------------------------------------------------------------------------------------- publication

    def published(self) -> str | None:
        """The published version, verified; None as long as there is none."""
        pointer, now, before = self._publication()
        if pointer not in (now, before):
            value = "no such file" if pointer is None else pointer
            rule = f"the ledger says that {now['version'] if now else 'nothing'} is published"
            remedy = f"Roll back to {now['version']}: the pointer is then written again" if now else "Remove it"
            raise CheckpointError(str(self.folder / POINTER), value, rule, remedy)
        if pointer is None:
            return None
        self.verify(pointer["version"])
        return str(pointer["version"])

    def publish(self, version: str, **facts: Any) -> None:
        """Put a version in the place of the published one; ``facts`` go into the ledger's entry. Twice is the same as once.

        Raises InputError for a version that was published before and is no longer.
        """
        self._require_held()
        target = {"version": version, "digest": self.verify(version)}
        if target != self._publication()[1]:
            if version in self._ever_published():
                rule = "it was published before, and another version took its place"
                raise InputError("version", version, rule, "Roll back to it, if it shall be published again")
            self._append(PUBLISHED, facts | target)
        self._point(target)

    def rollback(self, version: str | None = None, **facts: Any) -> str:
        """Publish again what was published before; returns the version. Also mends a pointer that was altered.

        Without ``version``: the one that was published before the present one. Raises InputError for a version that was never
        published.
        """
        self._require_held()
        now, ever = self._publication()[1], self._ever_published()
        if version is None and now is not None and ever.index(now["version"]):
            version = ever[ever.index(now["version"]) - 1]
        if version is None or version not in ever:
            listed = ", ".join(ever) or "no version"
            value = version or "none before the present one"
            raise InputError("version", value, "it must have been published before", f"{listed} has been")
        target = {"version": version, "digest": self.verify(version)}
        if target != now:
            self._append(ROLLED_BACK, facts | target)
        self._point(target)
        return version

    def _ever_published(self) -> list[str]:
        return [entry["version"] for entry in self.entries() if entry["event"] == PUBLISHED]

    def _publication(self) -> tuple[Any, Entry | None, Entry | None]:
        """What the pointer holds, what it should, and what it may hold instead: that of before, until another entry follows."""
        while True:
            pointer, entries = self._pointer(), self.entries()
            changes = [entry for entry in entries if entry["event"] in (PUBLISHED, ROLLED_BACK)]
            targets = [None, *({"version": entry["version"], "digest": entry["digest"]} for entry in changes)]
            lagging = targets[-2] if changes and changes[-1] is entries[-1] else targets[-1]
            # Another process may have published between the two readings.
            if pointer in (targets[-1], lagging) or pointer == self._pointer():
                return pointer, targets[-1], lagging

    def _pointer(self) -> Any:
        """What the pointer holds; None where there is none, and text where it is not JSON."""
        try:
            data = (self.folder / POINTER).read_bytes()
        except FileNotFoundError:
            return None
        return parsed(data) or data[:80].decode(errors="replace")

    def _point(self, target: Entry) -> None:
        if self._pointer() != target:
            self._require_held()
            with writing(self.folder / POINTER):
                durable.write(self.folder / POINTER, json.dumps(target).encode() + b"\n")

    def _let_pointer_follow(self) -> None:
        """Completes a change that was killed after its entry."""
        pointer, now, before = self._publication()
        if now is not None and pointer == before:
            self._point(now)


def published_model(folder: Path) -> Path:
    """The model folder of what the lineage in ``folder`` has published, verified.

    Raises ConfigError where there is no lineage, CheckpointError where nothing is published or what is was altered.
    """
    store = Store(folder)
    store.check()
    version = store.published()
    if version is None:
        raise CheckpointError(str(folder), "nothing published", "no version has passed the gate yet", "Its history says why")
    return store.version_folder(version) / "model"


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _altered(version: Path, known: str) -> CheckpointError:
    rule = f"the ledger says that the version was committed with {known[:12]}"
    return CheckpointError(str(version / MANIFEST), "another digest", rule, RESTORE)


def _named(pattern: re.Pattern[str], name: str, what: str) -> str:
    """A name that is safe for a folder. Raises ConfigError."""
    if not pattern.fullmatch(name):
        number = "a number like 0001- and then " if what == "version" else ""
        raise ConfigError(what, name, f"it is {number}letters, digits, dots, dashes and underscores", "Use another name")
    return name
