"""Folders that are there whole or not at all, and that tell when a file in them is not what was put there.

A sealed folder has a ``MANIFEST.json`` with size and SHA-256 of all its files. Its own digest, that of the manifest's bytes,
stands for all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scaletrain import durable, outside
from scaletrain.errors import CheckpointError

MANIFEST = "MANIFEST.json"
RESTORE = "Restore it from a backup, or roll back to another version"

Files = Mapping[str, Any]
"""Path inside the folder -> {bytes, sha256}."""


def seal(partial: Path, final: Path, check: Callable[[], None] | None = None) -> None:
    """Write the manifest of what is in ``partial``, bring all to the disk, and give the folder its name.

    ``check`` is called right before that, and may raise: then it does not get it.
    Raises OSError, and CheckpointError for what is not a plain file.
    """
    files = {name: _facts(path) for name, path in _found(partial).items()}
    tree = {"format": "scaletrain-version", "version": 1, "name": final.name, "files": files}
    durable.write(partial / MANIFEST, json.dumps(tree, indent=1).encode())
    for path in [*partial.rglob("*"), partial]:
        durable.sync(path)
    if check:
        check()
    partial.rename(final)
    durable.sync(final.parent)


def manifest(folder: Path) -> tuple[str, Files]:
    """The folder's digest, and the files that belong into it. Raises CheckpointError where they cannot be told."""
    try:
        data = outside.read_bytes(outside.plain(folder, MANIFEST))
        files = outside.parse_json(data)["files"]
        if not isinstance(files, dict) or not all(map(outside.is_inside, files)):
            raise ValueError("no list of files in the folder")
    except OSError as error:
        what = MANIFEST if folder.is_dir() else "the version"
        raise CheckpointError(str(folder), error.strerror, f"{what} is missing or cannot be read", RESTORE) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(str(folder / MANIFEST), "another content", "it is no manifest of a version", RESTORE) from None
    return hashlib.sha256(data).hexdigest(), files


def check(folder: Path, files: Files) -> None:
    """Raises CheckpointError, naming the first, where the folder's files are not ``files``."""
    foreign = _found(folder).keys() - files.keys() - {MANIFEST}
    if foreign:
        name = min(foreign)
        raise CheckpointError(str(folder / name), "a file", "it is no part of the version", "Move it out of the folder")
    for name in sorted(files):
        check_file(folder, files, name)


def check_file(folder: Path, files: Files, name: str) -> None:
    """Raises CheckpointError where one file is missing or not the one of the manifest."""
    try:
        path = outside.plain(folder, name)
    except ValueError as error:
        raise CheckpointError(str(folder), str(error), "a version is made of plain files", RESTORE) from None
    if name not in files or not path.is_file():
        raise CheckpointError(str(path), "no such file", "it is part of a version", RESTORE)
    if _facts(path) != files[name]:
        raise CheckpointError(str(path), "another content", "it is not what was committed (SHA-256)", RESTORE)


def _found(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*")):
        # What a link leads to can change, or go, without the folder being touched.
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(str(path), "a link or device", "a version is made of plain files", "Put a copy in its place")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path
    return found


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
