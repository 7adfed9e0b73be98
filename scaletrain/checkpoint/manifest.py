"""What a checkpoint says of itself, and when one is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from scaletrain.commit import Found
from scaletrain.engine import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every_steps: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; the last step always writes one."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest are kept."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of steps that are a multiple of it are kept whatever their age. 0: none are."""
    asynchronous: bool = True
    """Train on while a copy of the state in host memory is written; false: wait until it is on the disk."""
    save_s: Annotated[float, Field(gt=0)] = 7200.0
    """Longest time that ranks wait for each other in a save, in seconds. It does not limit the training's own collectives."""
    failures: Annotated[int, Field(ge=1)] = 3
    """Saves in a row that may fail for want of space or by a failing disk before the run stops."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 2**32
    """Most bytes of tensors in one file: a rank writes several, and cuts a parameter that is larger."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. With the shards, this is all that a resume needs."""

    step: int
    """Steps taken."""
    cursor: Mapping[str, int]
    """Of the plan: phase, and samples consumed in it."""
    identity: Mapping[str, str]
    """Digests of what may not change between save and resume: model, plan, tokenizer, optimizer."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What the fresh start decided once for the whole run (slot_multiple)."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """JSON state of further parts by their name; restored with the rest or not at all."""


@dataclass(frozen=True, slots=True)
class Checkpoint(Found):
    """A checkpoint whose manifest was read. Its files are not verified yet."""

    @property
    def progress(self) -> Progress:
        return Progress(**self.manifest["progress"])


def parts(shard: Shard) -> Iterator[tuple[str, Tensor]]:
    """What is kept of a parameter's piece, by the name under which it is filed."""
    yield "weight", shard.weight
    yield from shard.moments.items()
