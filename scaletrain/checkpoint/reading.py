"""Restoring: pieces of any number of ranks into the shards of any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaletrain import commit, dist
from scaletrain.checkpoint.manifest import Checkpoint, Progress, parts
from scaletrain.checkpoint.pieces import Piece, Pieces
from scaletrain.engine import Engine
from scaletrain.errors import CheckpointError


def restore(checkpoint: Checkpoint, engine: Engine, identity: Mapping[str, str]) -> Progress:
    """Fills ``engine`` at whatever world size it has, and returns where the run stood. Collective.

    Raises CheckpointError, before anything is changed, where ``identity`` or a parameter differs from the checkpoint's.
    """
    check_identity(checkpoint, identity)
    _check_shapes(checkpoint, engine)
    commit.phase(dist.channel(), lambda: _fill(checkpoint, engine), f"reading {checkpoint.folder}")
    engine.publish(int(checkpoint.manifest["updates"]))
    return checkpoint.progress


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, str]) -> None:
    """Raises CheckpointError, which names all differences, where the checkpoint is of a run with another ``identity``."""
    before, found = checkpoint.progress.identity, differences(checkpoint, identity)
    if found:
        first = next(iter(found))
        rule = f"the checkpoint {checkpoint.folder} was written with {before.get(first)!r}"
        remedy = "Use the settings of that run, another output folder, or --fresh."
        error = CheckpointError(first, identity.get(first), rule, remedy)
        for what in found:
            if what != first:
                error.add_note(found[what])
        raise error


def differences(checkpoint: Checkpoint, identity: Mapping[str, str]) -> dict[str, str]:
    """What of ``identity`` is not as in the checkpoint's: its name, and a sentence with both values."""
    before = checkpoint.progress.identity
    return {
        what: f"{what} differs too: it was {before.get(what)!r}, and is {identity.get(what)!r}"
        for what in (*identity, *(what for what in before if what not in identity))
        if before.get(what) != identity.get(what)
    }


def _fill(checkpoint: Checkpoint, engine: Engine) -> None:
    with Pieces(checkpoint.folder, checkpoint.manifest) as pieces:
        for shard in engine.shards():
            for part, target in parts(shard):
                pieces.read(part, shard.name, shard.start, target)
        for name, buffer in engine.buffers().items():
            buffer.copy_(pieces.whole(f"buffer/{name}"))


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The whole fp32 weights and the buffers by name, on the host.

    Every process that calls it reads all files for itself. Raises CheckpointError where one is missing or damaged.
    """
    _check_whole(checkpoint.folder, commit.verify(checkpoint.folder, commit.Alone()).fault)
    found: dict[str, Tensor] = {}
    with Pieces(checkpoint.folder, checkpoint.manifest) as pieces:
        for name, facts in checkpoint.manifest["parameters"].items():
            flat = torch.empty(_numel(facts["shape"]))
            pieces.read("weight", name, 0, flat)
            found[name] = flat.view(facts["shape"])
        found |= {name: pieces.whole(f"buffer/{name}") for name in checkpoint.manifest["buffers"]}
    return found


def state_shapes(folder: Path, part: str) -> dict[str, tuple[int, ...]]:
    """What `write_state` wrote to ``folder/part``: name -> shape of the whole; nothing where it never wrote to its end.

    Raises CheckpointError for a manifest that is missing or damaged: what was lost must not look like what never was.
    """
    if not (folder / part).exists():
        return {}
    manifest = commit.read(folder / part)
    _check_whole(folder / part, "" if manifest else "the manifest cannot be read")
    assert manifest is not None
    return {name: tuple(facts["shape"]) for name, facts in manifest["parameters"].items()}


def read_state(folder: Path, part: str, pieces: Mapping[str, Piece]) -> None:
    """Fills the values of ``pieces`` from what `write_state` wrote, at whatever world size. Collective.

    Ranks may ask for different names. All ranks raise, a rank that is at fault CheckpointError, before anything is filled, where
    a file is missing or damaged or a name or shape is asked for that was not written (`state_shapes` says which were).
    """
    verdict = commit.verify(folder / part, dist.channel())
    _check_whole(folder / part, verdict.fault)
    manifest = verdict.manifest
    assert manifest is not None, "a missing manifest is a fault"
    commit.phase(dist.channel(), lambda: _check_written(folder / part, manifest, pieces), f"looking for {part}")

    def fill() -> None:
        with Pieces(folder / part, manifest) as found:
            for name, piece in pieces.items():
                found.read(part, name, piece.start, piece.values)

    commit.phase(dist.channel(), fill, f"reading {folder / part}")


def _check_whole(folder: Path, fault: str) -> None:
    if fault:
        raise CheckpointError(str(folder), fault, "a checkpoint is used whole or not at all", "Use another checkpoint.")


def _check_written(folder: Path, manifest: Mapping[str, Any], pieces: Mapping[str, Piece]) -> None:
    for name, piece in pieces.items():
        theirs = manifest["parameters"].get(name, {"shape": "no such parameter"})["shape"]
        if theirs != list(piece.shape):
            raise CheckpointError(f"parameter {name}", list(piece.shape), f"{folder} has {theirs}", "It is of another model.")


def _check_shapes(checkpoint: Checkpoint, engine: Engine) -> None:
    theirs = {name: (facts["shape"], facts["parts"]) for name, facts in checkpoint.manifest["parameters"].items()}
    mine = {s.name: (list(s.shape), [part for part, _ in parts(s)]) for s in engine.shards()}
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            rule = f"the checkpoint {checkpoint.folder} has {theirs.get(name, 'no such parameter')}"
            raise CheckpointError(
                f"parameter {name}", mine.get(name, "no such parameter"), rule, "It is a checkpoint of another model."
            )


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
