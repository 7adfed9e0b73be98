"""Which checkpoints a folder holds, and which of them can be trusted."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from scaletrain import dist, outside
from scaletrain.checkpoint.manifest import Checkpoint, file_digest, read
from scaletrain.errors import CheckpointError, ScaletrainError, StorageError

T = TypeVar("T")


def phase(work: Callable[[], T], what: str) -> T:
    """Runs one rank's part of a phase; no rank goes on before all have done theirs."""
    error: Exception | None = None
    try:
        result = work()
    except ScaletrainError as failure:
        error = failure
    except OSError as failure:
        error = StorageError(
            f"{what}: {failure.strerror or failure} ({failure.filename}); free space or choose another output folder"
        )
    except SafetensorError as failure:
        error = StorageError(f"{what}: {failure}; free space or choose another output folder")
    dist.raise_together(error, what)
    return result


def find(folder: Path) -> list[Checkpoint]:
    """The checkpoints in ``folder`` whose manifest can be read, newest step first. By step, not by time: clocks are wrong."""
    found = [(path, read(path)) for path in folder.glob("step-*")]
    whole = [Checkpoint(path, manifest) for path, manifest in found if manifest is not None]
    return sorted(whole, key=lambda checkpoint: -checkpoint.progress.step)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, the same on every rank; None in a folder that never had one. Collective.

    Rank 0 looks, all ranks hash their share of the files. A damaged one is named in a warning and the one before it is tried.
    Raises CheckpointError where there were checkpoints and none is whole: going back to step 0 is for the user to say.
    """
    names = dist.broadcast([checkpoint.folder.name for checkpoint in find(folder)])
    for name in names:
        manifest, found = verified(folder / name)
        if manifest is not None and not found:
            return Checkpoint(folder / name, manifest)
        if dist.rank() == 0:
            warnings.warn(f"checkpoint {folder / name} is damaged and was passed over: {found}", stacklevel=2)
    if dist.broadcast(bool(names) or (folder / "latest").exists()):
        rule = "it held checkpoints and none of them is whole"
        raise CheckpointError(str(folder), names, rule, "Restore one from a backup, or start again from step 0 with --fresh.")
    return None


def whole(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` verifies, on every rank. Collective."""
    return not verified(folder)[1]


def sizes_fit(checkpoint: Checkpoint) -> bool:
    """Whether all files are there in full; a look at the folder, not at what the files hold."""
    sizes = {path.name: path.stat().st_size for path in checkpoint.folder.iterdir()}
    return all(sizes.get(entry["name"]) == entry["bytes"] for entry in checkpoint.manifest["files"])


def verified(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest as read here, and the first fault that any rank found; empty where there is none. Collective.

    Each rank hashes its share of the files.
    """
    manifest = read(folder)
    found = dist.gather(
        "the manifest cannot be read" if manifest is None else faults(folder, manifest["files"][dist.rank() :: dist.world()])
    )
    return manifest, next(filter(None, found), "")


def set_aside(folder: Path) -> Path | None:
    """Renames what an earlier run left, so that a fresh start loses nothing; returns its new name. Collective."""
    aside = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.before-fresh-{n}")).exists())

    def rename() -> bool:
        if dist.rank() or not folder.exists():
            return False
        folder.rename(aside)
        return True

    return aside if dist.broadcast(phase(rename, f"setting {folder} aside")) else None


def faults(folder: Path, entries: Sequence[Mapping[str, Any]]) -> str:
    """The first thing that is wrong with the files of these entries of a manifest; empty where all is well."""
    for entry in entries:
        try:
            path = outside.plain(folder, entry["name"])
        except ValueError as error:
            return str(error)
        if not path.is_file():
            return f"{entry['name']} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{entry['name']} has {path.stat().st_size} bytes where the manifest says {entry['bytes']}"
        if file_digest(path) != entry["sha256"]:
            return f"{entry['name']} does not have the SHA-256 that the manifest says"
    return ""
