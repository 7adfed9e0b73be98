"""The commit itself: two phases, after each of which every rank knows how the others fared."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain import durable
from scaletrain.commit.boundary import Boundary, Hook, passed
from scaletrain.commit.files import Entry, File, write_file
from scaletrain.commit.finding import Found, find, put_aside
from scaletrain.commit.manifest import read, write
from scaletrain.commit.peers import Peers, phase
from scaletrain.errors import ScaletrainError, StorageError


@dataclass(frozen=True, slots=True)
class Retention:
    """Which of the older steps stay. The newest always does."""

    keep: int
    """How many of the newest."""
    every_steps: int = 0
    """Those whose step is a multiple of it stay too; 0: none."""
    protected: Collection[int] = ()
    """Further steps that stay, such as the best so far."""

    def drops(self, step: int) -> bool:
        """Whether a step that is not among the newest goes."""
        return step not in self.protected and not (self.every_steps and step % self.every_steps == 0)


def commit(
    final: Path,
    peers: Peers,
    files: Iterable[File],
    manifest: Callable[[list[Entry]], Mapping[str, Any]],
    retention: Retention | None = None,
    at: Hook = passed,
    check: Callable[[], None] | None = None,
) -> list[Entry]:
    """Writes every rank's ``files`` to the folder ``final``, and rank 0's ``manifest`` of them. Collective.

    What stood at ``final`` before is replaced. ``retention`` is for a folder among others that are called by their step: the
    pointer is set to it, older ones go, and what it replaces was damaged and is kept aside. ``check`` is called on rank 0 before
    anything is published, and raises where it may not be. Returns the entries of all files, alike on every rank.

    Raises StorageError on every rank where any rank could not write; what was written is then removed, and what there was before
    untouched.
    """
    partial = final.with_name(f".{final.name}.partial")
    at(Boundary.BEGUN)
    try:
        phase(peers, lambda: _make_room(partial, at) if peers.rank == 0 else None, f"making room for {final}")
        at(Boundary.ROOM_AGREED)
        mine = phase(peers, lambda: _write_files(partial, files, at), f"writing {final}")
        entries = [entry for own in peers.gather(mine) for entry in own]
        at(Boundary.REPORTED)

        def publish() -> None:
            if peers.rank == 0:
                _publish(final, partial, manifest(entries), at, check, put_aside if retention else _to_trash)
                if retention is not None:
                    _settle(final, retention, at)

        phase(peers, publish, f"publishing {final}")
    except ScaletrainError as failure:
        if failure.exit_code == StorageError.exit_code and peers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # no rank writes into it any more: all of them have left the phase
        raise
    at(Boundary.PUBLISHED)
    return entries


def _make_room(partial: Path, at: Hook) -> None:
    """Sweeps what killed commits of the same kind left behind, and makes the folder for this one."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    kind = partial.name.removesuffix(".partial").partition("-")[0]  # all of ".step-00000400", ".step-00000800", ...
    for left in [*partial.parent.glob(f"{kind}*.partial"), *partial.parent.glob(f"{kind}*.trash")]:
        shutil.rmtree(left)
    at(Boundary.SWEPT)
    partial.mkdir()
    at(Boundary.PARTIAL_MADE)


def _write_files(partial: Path, files: Iterable[File], at: Hook) -> list[Entry]:
    entries = [write_file(partial, file, at) for file in files]
    durable.sync(partial)
    at(Boundary.FILES_SYNCED)
    return entries


def _publish(
    final: Path,
    partial: Path,
    manifest: Mapping[str, Any],
    at: Hook,
    check: Callable[[], None] | None,
    move: Callable[[Path], Path],
) -> None:
    write(partial, manifest, at)
    if check is not None:
        check()
    old = read(final)
    if old is not None and Found(final, old).sizes_fit() and durable.exchange(partial, final):
        # A whole one has its place until the new one has it.
        before: Path | None = partial.rename(final.with_name(f".{final.name}.trash"))
    else:
        before = move(final) if final.exists() else None
        partial.rename(final)
    at(Boundary.FOLDER_NAMED)
    durable.sync(final.parent)
    at(Boundary.FOLDER_SYNCED)
    if before is not None and before.suffix == ".trash":
        shutil.rmtree(before)


def _settle(final: Path, retention: Retention, at: Hook) -> None:
    """What follows once ``final`` is there: that it cannot be pointed to, or an old one not deleted, does not undo that."""
    try:
        durable.write(final.parent / "latest", f"{final.name}\n".encode())
        at(Boundary.POINTER_WRITTEN)
        _retain(final, retention, at)
    except OSError as error:
        warnings.warn(f"{final} is saved, but its folder could not be tidied: {error}", stacklevel=2)


def _retain(final: Path, retention: Retention, at: Hook) -> None:
    """Drops the older ones, never ``final``, whatever its step. One with files missing or cut counts for nothing: it neither goes
    nor takes a whole one's place."""
    others = [found for found in find(final.parent) if found.sizes_fit() and found.folder != final]
    for old in others[max(0, retention.keep - 1) :]:
        if retention.drops(old.step):
            _unlink(_to_trash(old.folder, at), at)


def discard(folder: Path) -> None:
    """Deletes a committed folder: renamed first, then unlinked."""
    _unlink(_to_trash(folder), passed)


def _to_trash(folder: Path, at: Hook = passed) -> Path:
    # Renamed first: a kill in the middle of unlinking leaves no folder that looks whole.
    trash = folder.with_name(f".{folder.name}.trash")
    folder.rename(trash)
    at(Boundary.TRASH_NAMED)
    return trash


def _unlink(trash: Path, at: Hook) -> None:
    files = sorted(trash.iterdir())
    for file in files[: len(files) // 2]:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
    at(Boundary.TRASH_HALF_UNLINKED)
    shutil.rmtree(trash)
    at(Boundary.TRASH_UNLINKED)
