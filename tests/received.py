"""A pretraining run on ranks that notes what ``engine.forward`` received, and that dies where it is told to."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from scaletrain import checkpoint, dist
from scaletrain.config import decode
from scaletrain.engine import Engine
from scaletrain.recipes import pretrain
from scaletrain.train.metrics import read_jsonl


def run(
    tree: dict[str, Any],
    die_after: int | None = None,
    stop_after: int | None = None,
    lost_after: int | None = None,
    notes: str | None = None,
) -> dict[str, str]:
    """One rank of a run; returns the hash of what ``engine.forward`` received, by step and slot.

    ``notes``: an empty folder where it is also written down at once, so that a rank that is killed leaves it.
    """
    received: dict[str, str] = {}
    forward, step = Engine.forward, Engine.clip

    def recorded(self: Engine, slot: Any) -> Any:
        if self.updates == lost_after and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        content = hashlib.sha256(repr(slot.seed).encode())
        for name, value in sorted({**slot.inputs, **slot.targets}.items()):
            content.update(name.encode() + repr(tuple(value.shape)).encode() + value.numpy().tobytes())
        received[f"{slot.step}/{slot.index}"] = content.hexdigest()
        if notes is not None:
            (Path(notes) / str(dist.rank())).write_text(json.dumps(received))
        return forward(self, slot)

    def interrupted(self: Engine, *arguments: Any) -> Any:
        if self.updates == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.updates == stop_after and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    Engine.forward, Engine.clip = recorded, interrupted  # type: ignore[method-assign]  # in a process of its own
    try:
        pretrain.main(decode(pretrain.Config, tree))
    finally:
        Engine.forward, Engine.clip = forward, step  # type: ignore[method-assign]
    return received


def losses(output: Path) -> list[str]:
    """Loss of every step to the bit, from the record of the run."""
    return [line["loss_hex"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "step"]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint.weights(checkpoint.find(output / "checkpoints")[0])


def noted(notes: Path) -> dict[str, str]:
    """What the ranks of a run that was killed had received until then."""
    return joined([json.loads(file.read_text()) for file in notes.iterdir()])


def joined(results: list[dict[str, str]]) -> dict[str, str]:
    """What all ranks received; a slot that two ranks ran would be a mistake."""
    assert sum(len(result) for result in results) == len(set().union(*results))
    return {key: value for result in results for key, value in result.items()}
