"""The manifest of a committed folder: JSON with a digest of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain import durable
from scaletrain.commit.boundary import Boundary, Hook, passed

FORMAT = "scaletrain-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of one folder; None where it is missing, damaged, or of another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        return None
    if manifest.pop("sha256", None) != digest(manifest):
        return None
    inside = all(Path(entry["name"]).name == entry["name"] for entry in manifest["files"])
    return manifest if inside else None


def write(folder: Path, manifest: Mapping[str, Any], at: Hook = passed) -> None:
    """Writes it durably, with a digest of its own: a flipped bit in a step number would otherwise go unnoticed."""
    temporary = folder / f".{MANIFEST}.tmp"
    with temporary.open("wb") as stream:
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
