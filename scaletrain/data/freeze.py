"""A task's examples as a folder of canonical files: read once, and never differently again.

::

    FOLDER/train.jsonl, validation.jsonl, gate.jsonl, test.jsonl     an example a line: key, text, pair, label
    FOLDER/task.json                                                 written last: labels, report, size and SHA-256 of each file
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaletrain import durable
from scaletrain.data.labelled import SPLITS, Labelled
from scaletrain.data.tables import Example
from scaletrain.errors import CorpusError, StorageError

MANIFEST = "task.json"
_FORMAT = {"format": "scaletrain-task", "version": 1}


def freeze(labelled: Labelled, folder: Path) -> str:
    """Writes ``folder`` whole or not at all, and returns its digest. Doing it again is nothing.

    Raises CorpusError where other examples are frozen there, naming the first split that differs, and StorageError.
    """
    files = {split: _lines(labelled.splits[split]) for split in SPLITS}
    entries = {split: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for split, data in files.items()}
    manifest = {
        **_FORMAT,
        "labels": list(labelled.labels),
        "files": entries,
        "report": {k: dict(v) for k, v in labelled.report.items()},
    }
    if (folder / MANIFEST).exists():
        before = _manifest(folder)
        for split in SPLITS:
            if before["files"][split] != entries[split]:
                rule = f"other examples are frozen in {folder}"
                raise CorpusError(f"data.{split}", f"{len(labelled.splits[split])} examples", rule, "Use another name or folder")
        return frozen_digest(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for split, data in files.items():
            durable.write(partial / f"{split}.jsonl", data)
        durable.write(partial / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        durable.sync(partial)
        partial.rename(folder)
        durable.sync(folder.parent)
    except OSError as error:
        raise StorageError(
            f"{folder}: got {error}; the task's examples are kept there. Free space or choose another folder"
        ) from error
    return frozen_digest(folder)


def thaw(folder: Path) -> Labelled:
    """The examples in ``folder``. Raises CorpusError, which names the file, where one is missing or altered."""
    manifest, splits = _manifest(folder), {}
    for split in SPLITS:
        file, entry = folder / f"{split}.jsonl", manifest["files"][split]
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CorpusError(str(file), "missing", f"it is part of a frozen task ({error.strerror})", _RESTORE) from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorpusError(str(file), "altered", f"{MANIFEST} lists another content (SHA-256)", _RESTORE)
        splits[split] = tuple(Example(**json.loads(line)) for line in data.decode().split("\n")[:-1])
    return Labelled(splits, tuple(manifest["labels"]), manifest["report"])


def frozen_digest(folder: Path) -> str:
    """SHA-256 of what is frozen in ``folder``: labels and examples, not how many were dropped on the way."""
    manifest = _manifest(folder)
    return hashlib.sha256(json.dumps([manifest["labels"], manifest["files"]], sort_keys=True).encode()).hexdigest()


_RESTORE = "Restore it from a backup"


def _lines(examples: Sequence[Example]) -> bytes:
    return "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples).encode()


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        known = {key: manifest[key] for key in _FORMAT} == _FORMAT and manifest["files"].keys() == set(SPLITS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(str(file), str(error), "a frozen task says in it what it holds", _RESTORE) from None
    if not known:
        raise CorpusError(str(file), "another format", f"must be {_FORMAT['format']} version {_FORMAT['version']}", _RESTORE)
    return manifest
