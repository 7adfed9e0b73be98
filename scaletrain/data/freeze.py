"""A task's examples as a folder of canonical files: read and split once, and never differently again.

::

    FOLDER/train.jsonl, validation.jsonl, gate.jsonl, test.jsonl     an example a line: key, text, pair, label
    FOLDER/task.json                                                 labels, report, size and SHA-256 of each file, and its own
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaletrain import durable, outside
from scaletrain.data.dataset import canonical_digest
from scaletrain.data.labelled import SPLITS, Labelled
from scaletrain.data.tables import Example
from scaletrain.errors import CorpusError, StorageError

FORMAT = 1
MANIFEST = "task.json"
_BYTES_MAX = 1 << 40
_REMEDY = "Freeze the task again from its files, in another folder"


def freeze(labelled: Labelled, folder: Path) -> str:
    """Write a folder, whole or not at all: a JSON Lines file for each split, and ``task.json`` with labels, report and digests.

    Returns the digest of it all. A folder that holds the same is left alone. Raises CorpusError, naming the first difference, for
    one that holds something else, and StorageError.
    """
    files = {f"{split}.jsonl": _lines(labelled.splits[split]) for split in SPLITS}
    described = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    tree: dict[str, Any] = {"format": FORMAT, "labels": labelled.labels, "report": labelled.report, "files": described}
    tree["digest"] = canonical_digest(tree)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        _require_same(labelled, thaw(folder), folder)
        return str(tree["digest"])
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        temporary.mkdir(parents=True)
        for name, data in (*files.items(), (MANIFEST, json.dumps(tree, ensure_ascii=False, indent=1).encode() + b"\n")):
            durable.write(temporary / name, data)
        temporary.rename(folder)
        durable.sync(folder.parent)
    except OSError as error:
        raise StorageError(f"{folder}: got {error.strerror!r}; the task's examples must be written there") from error
    return str(tree["digest"])


def thaw(folder: Path) -> Labelled:
    """Read a frozen folder back. Raises CorpusError, naming the file, for one that is missing or is not as it was written."""
    file = folder / MANIFEST
    try:
        tree = outside.parse_json(_stored(file))
        if tree["format"] != FORMAT:
            raise CorpusError(f"{file}: format", tree["format"], f"this program reads format {FORMAT}", _REMEDY)
        expected = canonical_digest({key: value for key, value in tree.items() if key != "digest"})
        if tree["digest"] != expected:
            raise CorpusError(f"{file}: digest", tree["digest"], f"its contents have {expected}", _REMEDY)
        digests = {name: entry["sha256"] for name, entry in tree["files"].items()}
        labels, report = tuple(tree["labels"]), tree["report"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CorpusError(str(file), "no description of a task", "it was written whole", _REMEDY) from None
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.jsonl"
        data = _stored(file)
        found = hashlib.sha256(data).hexdigest()
        if found != digests.get(file.name):
            rule = f"task.json says {digests.get(file.name)}"
            raise CorpusError(str(file), f"{len(data)} bytes with SHA-256 {found}", rule, _REMEDY)
        try:
            splits[split] = tuple(Example(**outside.parse_json(line)) for line in data.decode().split("\n")[:-1])
        except (ValueError, TypeError):
            raise CorpusError(str(file), "another content", "a line holds one example", _REMEDY) from None
    return Labelled(splits, labels, report)


def frozen_digest(folder: Path) -> str:
    """What ``freeze`` returned for a folder."""
    try:
        return str(outside.parse_json(_stored(folder / MANIFEST))["digest"])
    except (ValueError, TypeError, KeyError):
        raise CorpusError(str(folder / MANIFEST), "no description of a task", "it was written whole", _REMEDY) from None


def _lines(examples: Sequence[Example]) -> bytes:
    return "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples).encode()


def _stored(file: Path) -> bytes:
    try:
        return outside.read_bytes(file, _BYTES_MAX)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CorpusError(str(file), reason, "a frozen task has this file", _REMEDY) from None


def _require_same(ours: Labelled, frozen: Labelled, folder: Path) -> None:
    remedy = "Give back the files and settings that it was made from, or another folder"
    for split in SPLITS:
        pairs = itertools.zip_longest(ours.splits[split], frozen.splits[split])
        for number, (example, before) in enumerate(pairs, start=1):
            if example != before:
                where = f"{folder / split}.jsonl, line {number}"
                raise CorpusError(where, example, f"the folder was frozen with {before or 'no example'} there", remedy)
    for part in ("labels", "report"):
        if getattr(ours, part) != getattr(frozen, part):
            rule = f"the folder was frozen with {getattr(frozen, part)}"
            raise CorpusError(f"{folder / MANIFEST}: {part}", getattr(ours, part), rule, remedy)
