"""Which checkpoints a folder holds, and which of them all ranks can trust."""

from __future__ import annotations

import itertools
from pathlib import Path

from scaletrain import commit, dist
from scaletrain.checkpoint.manifest import Checkpoint


def find(folder: Path) -> list[Checkpoint]:
    """The checkpoints in ``folder`` whose manifest can be read, newest step first. By step, not by time: clocks are wrong."""
    return [Checkpoint(found.folder, found.manifest) for found in commit.find(folder)]


def newest(folder: Path, *, aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint that verifies, the same on every rank; None in a folder that never had one. Collective.

    Rank 0 looks, all ranks confirm, and hash their share of the files. A damaged one is named in a warning and the one before
    it is tried; ``aside`` renames it, for the run whose folder it is. Raises CheckpointError where there were checkpoints and
    none is whole on all ranks: going back to step 0 is for the user to say.
    """
    found = commit.newest(folder, dist.channel(), aside=aside)
    return None if found is None else Checkpoint(found.folder, found.manifest)


def of_step(folder: Path, step: int) -> Checkpoint | None:
    """The checkpoint of ``step``, if it verifies on all ranks; the same answer on every rank. Collective."""
    names = dist.broadcast([found.folder.name for found in commit.find(folder) if found.step == step])
    for name in names:
        verdict = commit.verify(folder / name, dist.channel())
        if not verdict.fault and verdict.manifest is not None:
            return Checkpoint(folder / name, verdict.manifest)
    return None


def set_aside(folder: Path) -> Path | None:
    """Renames what an earlier run left, so that a fresh start loses nothing; returns its new name. Collective."""
    aside = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.before-fresh-{n}")).exists())

    def rename() -> bool:
        if dist.rank() or not folder.exists():
            return False
        folder.rename(aside)
        return True

    return aside if dist.broadcast(commit.phase(dist.channel(), rename, f"setting {folder} aside")) else None
