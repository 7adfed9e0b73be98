"""Restoring: pieces of any number of ranks into the shards of any other."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from scaletrain.checkpoint.finding import faults, phase
from scaletrain.checkpoint.manifest import Checkpoint, Progress, parts
from scaletrain.engine import Engine
from scaletrain.errors import CheckpointError


def restore(checkpoint: Checkpoint, engine: Engine, identity: Mapping[str, str]) -> Progress:
    """Fills ``engine`` at whatever world size it has, and returns where the run stood. Collective.

    Raises CheckpointError, before anything is changed, where ``identity`` or a parameter differs from the checkpoint's.
    """
    progress = checkpoint.progress
    for what, mine in identity.items():
        theirs = progress.identity.get(what)
        if theirs != mine:
            rule = f"the checkpoint {checkpoint.folder} was written with {theirs!r}"
            raise CheckpointError(what, mine, rule, "Use the settings of that run, another output folder, or --fresh.")
    _check_shapes(checkpoint, engine)
    phase(lambda: _fill(checkpoint, engine), f"reading {checkpoint.folder}")
    engine.publish(int(checkpoint.manifest["updates"]))
    return progress


def _fill(checkpoint: Checkpoint, engine: Engine) -> None:
    with _Pieces(checkpoint) as pieces:
        for shard in engine.shards():
            for part, target in parts(shard):
                pieces.read(part, shard.name, shard.start, target)
        for name, buffer in engine.buffers().items():
            buffer.copy_(pieces.whole(f"buffer/{name}"))


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The whole fp32 weights and the buffers by name, on the host, in one process."""
    fault = faults(checkpoint.folder, checkpoint.manifest)
    if fault:
        raise CheckpointError(
            str(checkpoint.folder), fault, "a checkpoint is used whole or not at all", "Use another checkpoint."
        )
    found: dict[str, Tensor] = {}
    with _Pieces(checkpoint) as pieces:
        for name, facts in checkpoint.manifest["parameters"].items():
            flat = torch.empty(_numel(facts["shape"]))
            pieces.read("weight", name, 0, flat)
            found[name] = flat.view(facts["shape"])
        found |= {name: pieces.whole(f"buffer/{name}") for name in checkpoint.manifest["buffers"]}
    return found


def _check_shapes(checkpoint: Checkpoint, engine: Engine) -> None:
    theirs = {name: (facts["shape"], facts["parts"]) for name, facts in checkpoint.manifest["parameters"].items()}
    mine = {s.name: (list(s.shape), [part for part, _ in parts(s)]) for s in engine.shards()}
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            rule = f"the checkpoint {checkpoint.folder} has {theirs.get(name, 'no such parameter')}"
            raise CheckpointError(
                f"parameter {name}", mine.get(name, "no such parameter"), rule, "It is a checkpoint of another model."
            )


class _Pieces:
    """The pieces of all files of a checkpoint, read by range."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = [safe_open(checkpoint.folder / entry["name"], framework="pt") for entry in checkpoint.manifest["files"]]
        self._index: dict[str, list[tuple[int, int, int]]] = {}
        for number, file in enumerate(self._files):
            for name, (start, length) in json.loads(file.metadata()["pieces"]).items():
                self._index.setdefault(name, []).append((start, length, number))
        self._folder = checkpoint.folder

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def read(self, part: str, name: str, start: int, target: Tensor) -> None:
        """Fills ``target`` (flat) with the elements from ``start`` on of the flattened parameter."""
        end, filled = start + target.numel(), 0
        for first, length, number in self._index.get(name, []):
            low, high = max(start, first), min(end, first + length)
            if low < high:
                piece = self._files[number].get_slice(f"{part}/{name}")[low - first : high - first]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            rule = f"the files hold {filled} of {target.numel()} elements from {start} on"
            raise CheckpointError(f"{self._folder}: {part} of {name}", filled, rule, "Use another checkpoint.")

    def whole(self, key: str) -> Tensor:
        """A buffer; rank 0 wrote them."""
        value: Tensor = self._files[0].get_tensor(key)
        return value


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
