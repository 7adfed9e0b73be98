"""The manifest of a committed folder: JSON with a digest of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain import durable, outside
from scaletrain.commit.boundary import Boundary, Hook, passed

FORMAT = "scaletrain-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of one folder; None where it is missing, damaged, of another format, or behind a link."""
    try:
        manifest = None if folder.is_symlink() else outside.read_json(outside.plain(folder, MANIFEST))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        return None
    if manifest.pop("sha256", None) != digest(manifest):
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


def write(folder: Path, manifest: Mapping[str, Any], at: Hook = passed) -> None:
    """Writes it durably, with a digest of its own: a flipped bit in a step number would otherwise go unnoticed."""
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb", opener=durable.own) as stream:
        stream.write(json.dumps({**manifest, "sha256": digest(manifest)}, indent=1).encode())
        stream.flush()
        os.fsync(stream.fileno())
    at(Boundary.MANIFEST_WRITTEN)
    temporary.replace(folder / MANIFEST)
    at(Boundary.MANIFEST_NAMED)
    durable.sync(folder)
    at(Boundary.MANIFEST_SYNCED)


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what the manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
