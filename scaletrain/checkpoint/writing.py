"""Saving: two phases, after each of which every rank knows how the others fared."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scaletrain import dist, durable
from scaletrain.checkpoint.finding import find, phase, sizes_fit, whole
from scaletrain.checkpoint.manifest import FORMAT, VERSION, Progress, file_digest, parts, write
from scaletrain.engine import Engine


def save(folder: Path, engine: Engine, progress: Progress, keep: int) -> Path:
    """Writes the checkpoint of ``progress.step`` under ``folder`` and drops old ones beyond ``keep``. Collective.

    Raises StorageError on every rank where any rank could not write; older checkpoints are untouched then.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f".{final.name}.partial"
    if whole(final):
        return final  # resumed here, nothing happened since
    dist.agree("the buffers of the model", _buffers_digest(engine))
    phase(lambda: _clear(folder, partial) if dist.rank() == 0 else None, "making room for a checkpoint")
    files = dist.gather(phase(lambda: _write_pieces(partial, engine), "writing a checkpoint"))

    def publish() -> None:
        if dist.rank() == 0:
            write(partial, _manifest(engine, progress, files))
            durable.sync(partial)
            if final.exists():
                _discard(final)  # a damaged one: the run came by here again
            partial.rename(final)
            durable.sync(folder)
            durable.write(folder / "latest", f"{final.name}\n".encode())
            _retain(folder, keep)

    phase(publish, "publishing a checkpoint")
    return final


def _write_pieces(partial: Path, engine: Engine) -> dict[str, Any]:
    """This rank's file; returns its entry of the manifest."""
    name = f"state-{dist.rank():05d}-of-{dist.world():05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, tuple[int, int]] = {}
    for shard in engine.shards():
        if shard.weight.numel():
            pieces[shard.name] = (shard.start, shard.weight.numel())
            for part, value in parts(shard):
                tensors[f"{part}/{shard.name}"] = value.detach().to("cpu", copy=True)
    if dist.rank() == 0:
        tensors |= {f"buffer/{name}": value.detach().to("cpu", copy=True) for name, value in engine.buffers().items()}
    save_file(tensors, partial / name, metadata={"pieces": json.dumps(pieces)})
    durable.sync(partial / name)
    return {"name": name, "bytes": (partial / name).stat().st_size, "sha256": file_digest(partial / name)}


def _buffers_digest(engine: Engine) -> str:
    digest = hashlib.sha256()
    for name, value in engine.buffers().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _manifest(engine: Engine, progress: Progress, files: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = {s.name: {"shape": list(s.shape), "parts": [part for part, _ in parts(s)]} for s in engine.shards()}
    libraries = {"torch": torch.__version__}
    return {
        "format": FORMAT,
        "version": VERSION,
        "progress": asdict(progress),
        "updates": engine.updates,
        "world_size": dist.world(),
        "parameters": parameters,
        "buffers": {name: list(value.shape) for name, value in engine.buffers().items()},
        "files": files,
        "libraries": libraries,
    }


def _clear(folder: Path, partial: Path) -> None:
    """Sweeps what killed saves left behind, and makes the folder for this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.trash")]:
        shutil.rmtree(left)
    partial.mkdir()


def _retain(folder: Path, keep: int) -> None:
    """Drops all but the ``keep`` newest. One with files missing or cut counts for nothing."""
    for old in [checkpoint for checkpoint in find(folder) if sizes_fit(checkpoint)][keep:]:
        _discard(old.folder)


def _discard(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle of unlinking leaves no checkpoint that looks whole.
    trash = checkpoint.with_name(f".{checkpoint.name}.trash")
    checkpoint.rename(trash)
    shutil.rmtree(trash)
