"""Saving: two phases, after each of which every rank knows how the others fared."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scaletrain import dist, durable
from scaletrain.checkpoint.finding import find, phase, sizes_fit, whole
from scaletrain.checkpoint.manifest import FORMAT, VERSION, Checkpoint, Progress, parts, read, write
from scaletrain.checkpoint.pieces import Piece, write_file
from scaletrain.engine import Engine

Files = list[dict[str, Any]]


def save(
    folder: Path,
    engine: Engine,
    progress: Progress,
    keep: int,
    protected: Collection[int] = (),
    check: Callable[[], None] | None = None,
) -> Path:
    """Writes the checkpoint of ``progress.step`` under ``folder`` and drops old ones beyond ``keep``. Collective.

    Those of the steps ``protected`` (the best so far) are kept whatever their age. ``check`` is called on rank 0 right before the
    checkpoint gets its name, and may raise: then it does not get it.
    Raises StorageError on every rank where any rank could not write; older checkpoints are untouched then.
    """
    final = folder / f"step-{progress.step:08d}"
    if whole(final) and dist.broadcast(_same_progress(final, progress)):
        return final  # resumed here, nothing happened since
    dist.agree("the buffers of the model", _buffers_digest(engine))
    buffers = {f"buffer/{name}": value for name, value in engine.buffers().items()} if dist.rank() == 0 else {}

    def settle() -> None:
        durable.write(folder / "latest", f"{final.name}\n".encode())
        _retain(folder, keep, protected)

    _commit(
        final,
        lambda partial: write_file(partial, _shards(engine), buffers),
        lambda files: _manifest(engine, progress, files),
        settle,
        check,
    )
    return final


def _same_progress(final: Path, progress: Progress) -> bool:
    manifest = read(final)
    return manifest is not None and manifest["progress"] == json.loads(json.dumps(asdict(progress)))


def write_state(folder: Path, part: str, pieces: Mapping[str, Piece]) -> Files:
    """Writes further pieces, such as a Fisher diagonal, to ``folder/part`` as a checkpoint keeps its own. Collective.

    Every rank gives the same names and shapes in the same order. What stood there before is replaced. Returns the manifest's
    entries of the files, alike on every rank. Raises StorageError on every rank where any rank could not write.
    """
    shapes = {name: list(piece.shape) for name, piece in pieces.items()}
    dist.agree(f"the names and shapes of {part}", hashlib.sha256(json.dumps(shapes).encode()).hexdigest())
    return _commit(
        folder / part,
        lambda partial: write_file(partial, ((part, name, piece) for name, piece in pieces.items()), {}),
        lambda files: _described({name: {"shape": shape, "parts": [part]} for name, shape in shapes.items()}, files),
    )


def _commit(
    final: Path,
    write_pieces: Callable[[Path], dict[str, Any]],
    manifest: Callable[[Files], dict[str, Any]],
    settle: Callable[[], None] | None = None,
    check: Callable[[], None] | None = None,
) -> Files:
    """Every rank's file beside its place, then rank 0's manifest and rename. Returns the entries of all files."""
    partial = final.with_name(f".{final.name}.partial")
    phase(lambda: _clear(partial) if dist.rank() == 0 else None, f"making room for {final}")
    files: Files = dist.gather(phase(lambda: write_pieces(partial), f"writing {final}"))

    def publish() -> None:
        if dist.rank() == 0:
            write(partial, manifest(files))
            durable.sync(partial)
            if check:
                check()
            if final.exists():
                _discard(final)  # a damaged one, or that of an earlier attempt: the run came by here again
            partial.rename(final)
            durable.sync(final.parent)
            if settle:
                settle()

    phase(publish, f"publishing {final}")
    return files


def _shards(engine: Engine) -> Iterator[tuple[str, str, Piece]]:
    for shard in engine.shards():
        for part, values in parts(shard):
            yield part, shard.name, Piece(shard.shape, shard.start, values)


def _buffers_digest(engine: Engine) -> str:
    digest = hashlib.sha256()
    for name, value in engine.buffers().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _manifest(engine: Engine, progress: Progress, files: Files) -> dict[str, Any]:
    parameters = {s.name: {"shape": list(s.shape), "parts": [part for part, _ in parts(s)]} for s in engine.shards()}
    return {
        **_described(parameters, files),
        "progress": asdict(progress),
        "updates": engine.updates,
        "buffers": {name: list(value.shape) for name, value in engine.buffers().items()},
    }


def _described(parameters: Mapping[str, Any], files: Files) -> dict[str, Any]:
    """What the manifest says of any files of pieces."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "world_size": dist.world(),
        "parameters": parameters,
        "files": files,
        "libraries": {"torch": torch.__version__},
    }


def _clear(partial: Path) -> None:
    """Sweeps what killed saves of the same kind left behind, and makes the folder for this one."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    kind = partial.name.removesuffix(".partial").partition("-")[0]  # all of ".step-00000400", ".step-00000800", ...
    for left in [*partial.parent.glob(f"{kind}*.partial"), *partial.parent.glob(f"{kind}*.trash")]:
        shutil.rmtree(left)
    partial.mkdir()


def _retain(folder: Path, keep: int, protected: Collection[int]) -> None:
    """Drops all but the ``keep`` newest and those protected. One with files missing or cut counts for nothing."""
    for old in [checkpoint for checkpoint in find(folder) if sizes_fit(checkpoint)][keep:]:
        if old.progress.step not in protected:
            _discard(old.folder)


def go_back(folder: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint from before ``step``, after those of ``step`` and later were dropped. Collective.

    Where there is none, nothing is dropped.
    """
    names = dist.broadcast([each.folder.name for each in find(folder) if each.progress.step < step])
    chosen = next((folder / name for name in names if whole(folder / name)), None)
    if chosen is None:
        return None

    def drop() -> None:
        for later in [each for each in find(folder) if each.progress.step >= step] if dist.rank() == 0 else ():
            _discard(later.folder)

    phase(drop, f"going back to before step {step} in {folder}")
    manifest = read(chosen)
    assert manifest is not None, "it was just read"
    return Checkpoint(chosen, manifest)


def _discard(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle of unlinking leaves no checkpoint that looks whole.
    trash = checkpoint.with_name(f".{checkpoint.name}.trash")
    checkpoint.rename(trash)
    shutil.rmtree(trash)
