"""What a checkpoint says of itself, and how its files are made durable and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from scaletrain import durable, outside
from scaletrain.engine import Shard

FORMAT = "scaletrain-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every_steps: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; the last step always writes one."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest are kept."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. With the shards, this is all that a resume needs."""

    step: int
    """Steps taken."""
    cursor: Mapping[str, int]
    """Of the plan: phase, and samples consumed in it."""
    identity: Mapping[str, str]
    """Digests of what may not change between save and resume: model, plan, tokenizer, optimizer."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What the fresh start decided once for the whole run (slot_multiple)."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """JSON state of further parts by their name; restored with the rest or not at all."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose manifest was read. Its files are not verified yet."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress(**self.manifest["progress"])


def parts(shard: Shard) -> Iterator[tuple[str, Tensor]]:
    """What is kept of a parameter's piece, by the name under which it is filed."""
    yield "weight", shard.weight
    yield from shard.moments.items()


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of one checkpoint; None where it is missing, damaged, of another format, or behind a link."""
    try:
        manifest = None if folder.is_symlink() else outside.read_json(outside.plain(folder, MANIFEST))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        return None
    if manifest.pop("sha256", None) != _own_digest(manifest):
        return None
    return manifest if _lists_files(manifest.get("files")) else None


def _lists_files(entries: Any) -> bool:
    """Whether these are entries of files in the folder itself, each of them once."""
    kinds = {"name": str, "bytes": int, "sha256": str}
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return False
    if not all(isinstance(entry.get(key), kind) for entry in entries for key, kind in kinds.items()):
        return False
    names = [entry["name"] for entry in entries]
    return len({*names}) == len(names) and all(outside.is_inside(name) and "/" not in name for name in names)


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes it durably, with a digest of its own: a flipped bit in a step number would otherwise go unnoticed."""
    durable.write(folder / MANIFEST, json.dumps({**manifest, "sha256": _own_digest(manifest)}, indent=1).encode())


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
