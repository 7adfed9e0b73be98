"""Saving: what of the tensors goes to which file, and what the manifest says of it. How it is committed is `commit`'s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaletrain import commit, dist
from scaletrain.checkpoint.manifest import Checkpoint, Progress, parts
from scaletrain.checkpoint.pieces import Piece, files
from scaletrain.commit import FORMAT, VERSION, Entry, Hook, Peers, Retention
from scaletrain.commit.boundary import passed
from scaletrain.engine import Engine


@dataclass(frozen=True, slots=True)
class State:
    """What is written of an engine: its tensors, live or copied, and what the manifest says of them."""

    pieces: list[tuple[str, str, Piece]]
    buffers: Mapping[str, Tensor]
    """On rank 0; the ranks hold the same."""
    described: Mapping[str, Any]


def save(
    folder: Path,
    engine: Engine,
    progress: Progress,
    keep: int,
    protected: Collection[int] = (),
    *,
    max_file_bytes: int = 2**32,
    at: Hook = passed,
    check: Callable[[], None] | None = None,
) -> Path:
    """Writes the checkpoint of ``progress.step`` under ``folder`` and drops old ones beyond ``keep``. Collective.

    Those of the steps ``protected`` (the best so far) are kept whatever their age. ``check`` is called on rank 0 before the
    checkpoint is published, and raises where it may not be.
    Raises StorageError on every rank where any rank could not write; older checkpoints are untouched then.
    """
    final = folder / name_of(progress.step)
    if not saved(final, progress):
        write(final, live(engine, progress), dist.channel(), Retention(keep, protected=protected), max_file_bytes, at, check)
    return final


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def saved(folder: Path, progress: Progress) -> bool:
    """Whether the checkpoint in ``folder`` is whole, and of this ``progress``: a run resumed here, and nothing happened since.

    Collective.
    """
    verdict = commit.verify(folder, dist.channel())
    if verdict.fault or verdict.manifest is None:
        return False
    return bool(verdict.manifest["progress"] == json.loads(json.dumps(asdict(progress))))


def go_back(folder: Path, step: int, check: Callable[[], None] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint from before ``step``, after those of ``step`` and later were dropped. Collective.

    Where there is none, nothing is dropped. ``check``: see `save`.
    """
    peers = dist.channel()
    names = dist.broadcast([found.folder.name for found in commit.find(folder) if found.step < step])
    chosen = next((name for name in names if not commit.verify(folder / name, peers).fault), None)
    if chosen is None:
        return None

    def drop() -> None:
        if check is not None:
            check()
        for later in commit.find(folder):
            if later.step >= step:
                commit.discard(later.folder)

    commit.phase(peers, lambda: drop() if peers.rank == 0 else None, f"going back to before step {step} in {folder}")
    manifest = commit.read(folder / chosen)
    assert manifest is not None, "it was just verified"
    return Checkpoint(folder / chosen, manifest)


def live(engine: Engine, progress: Progress) -> State:
    """The state as it stands: it changes with the next step. Raises where the ranks' buffers differ. Collective."""
    dist.agree("the buffers of the model", _buffers_digest(engine))
    pieces = [
        (part, shard.name, Piece(shard.shape, shard.start, values)) for shard in engine.shards() for part, values in parts(shard)
    ]
    buffers = {f"buffer/{name}": value for name, value in engine.buffers().items()}
    parameters = {s.name: {"shape": list(s.shape), "parts": [part for part, _ in parts(s)]} for s in engine.shards()}
    described = {
        **_described(parameters),
        "progress": asdict(progress),
        "updates": engine.updates,
        "buffers": {name: list(value.shape) for name, value in engine.buffers().items()},
    }
    return State(pieces, buffers if dist.rank() == 0 else {}, described)


def write(
    final: Path,
    state: State,
    peers: Peers,
    retention: Retention,
    max_file_bytes: int,
    at: Hook = passed,
    check: Callable[[], None] | None = None,
) -> None:
    """Commits ``state`` to the folder ``final``. Collective over ``peers``."""
    own = files(state.pieces, state.buffers, max_file_bytes)
    commit.commit(final, peers, own, lambda entries: {**state.described, "files": entries}, retention, at, check)


def write_state(folder: Path, part: str, pieces: Mapping[str, Piece]) -> list[Entry]:
    """Writes further pieces, such as a Fisher diagonal, to ``folder/part`` as a checkpoint keeps its own. Collective.

    Every rank gives the same names and shapes in the same order. What stood there before is replaced. Returns the manifest's
    entries of the files, alike on every rank. Raises StorageError on every rank where any rank could not write.
    """
    shapes = {name: list(piece.shape) for name, piece in pieces.items()}
    dist.agree(f"the names and shapes of {part}", hashlib.sha256(json.dumps(shapes).encode()).hexdigest())
    own = files(_of_part(part, pieces), {})
    described = _described({name: {"shape": shape, "parts": [part]} for name, shape in shapes.items()})
    return commit.commit(folder / part, dist.channel(), own, lambda entries: {**described, "files": entries})


def _of_part(part: str, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, str, Piece]]:
    for name, piece in pieces.items():
        yield part, name, piece


def _buffers_digest(engine: Engine) -> str:
    digest = hashlib.sha256()
    for name, value in engine.buffers().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of any pieces; the files are added when they are written."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "world_size": dist.world(),
        "parameters": parameters,
        "libraries": {"torch": torch.__version__},
    }
