"""The seams of a continual method: all that it may do to a stage, and all that it is told.

A *stage* is one training run of a stream: fine-tuning on one task. A method is a frozen config with four seams, each of
which does nothing unless the method says otherwise; a stream has a tuple of methods, and an empty one is naive fine-tuning::

    rehearsal = method.rehearse(past)          # before a stage: which old examples are mixed in
    active = method.begin(beginning)           # with the weights that the stage starts from: terms of the loss, penalties
    ...                                        # the stage trains: the same loop as everywhere
    pieces = method.consolidate(ending)        # after it: what the next stage needs to know of these weights
    memory = method.remember(memory, ...)      # after it: which examples are kept

No method calls ``backward`` or ``step``, sees the optimizer, or gathers a parameter. What it computes of samples it gives as a
term of the loss, and what it computes of weights it adds to the gradient on this rank's shards, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scaletrain.continual.memory import Remembered
from scaletrain.data.collate import Slot
from scaletrain.data.labelled import Example
from scaletrain.engine import Engine, Shard
from scaletrain.train.loop import Penalty

__all__ = ["Active", "Beginning", "Ending", "Method", "Past", "Penalty", "Pieces", "Rehearsal", "State", "Term"]

State = Callable[[str, Shard], Tensor]
"""This rank's piece of what an earlier stage stored under the name of a part: flat fp32, as long as the shard's weight. Zeros
where nothing is stored: of a parameter that is new, or a part that no stage has written."""


@dataclass(frozen=True, slots=True)
class Past:
    """What there is of the tasks before the stage."""

    tasks: tuple[str, ...]
    """In the order in which they were learned; empty in the first stage."""
    train: Callable[[], Sequence[tuple[str, Example]]]
    """(task, example): all of their training examples, read when asked."""
    memory: Sequence[Remembered]
    """What the methods chose to keep of them."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Old examples that a stage trains on beside the new ones."""

    examples: Sequence[tuple[str, Example]]
    """(task, example)."""
    per_new: float | None
    """Old samples per new one in every step, drawn again and again while the new ones are read once per pass. None: old and new
    are one pool, in which every example is read once per pass."""
    afresh: bool = False
    """The stage starts from the encoder that the stream started from, not from the weights of the stage before."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """A stage before its first step, with the weights that it starts from."""

    engine: Engine
    teacher: Callable[[], NDArray[np.float32]]
    """Logits under those weights, without dropout, fp32 [samples of the stage, columns]. Collective; computed at the first call
    and kept."""
    old: tuple[slice, ...]
    """Columns of each block that an earlier stage has trained."""
    together: bool
    """Whether the old columns are one choice (one softmax over all of them: class-incremental), or one choice per block."""
    state: State
    has_state: bool
    """Whether an earlier stage stored anything at all."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A stage after its last step, with the weights that it ended with."""

    engine: Engine
    slots: Callable[[int], Sequence[Slot]]
    """This rank's slots, of one sample each, of n training examples of the new task (or all, if there are fewer), chosen by key:
    the same ones on any number of ranks. Filled up, so that all ranks have as many."""
    loss: Callable[[Tensor, Slot], Tensor]
    """The stage's own classification loss of the slot's one sample, a scalar with a graph; 0 for a slot that only fills up."""
    samples: Callable[[int], int]
    """How many examples the slots of all ranks then hold: n, or all of them if there are fewer."""
    state: State


class Term(Protocol):
    """A term of the loss that a method adds. Its count is the number of samples."""

    @property
    def weight(self) -> float:
        """In the loss of a step, which is the sum of ``weight * sum / count`` over terms."""

    def sum(self, outputs: Tensor, slot: Slot) -> Tensor:
        """An fp32 scalar: summed over all rows of ``outputs`` [samples, columns], also in a slot that only fills up."""


@dataclass(frozen=True, slots=True)
class Active:
    """What a method does while the stage trains."""

    terms: Mapping[str, Term] = field(default_factory=dict)
    penalties: tuple[Penalty, ...] = ()
    """Terms that depend on the weights alone, given as their gradient: applied between the last backward pass and clipping."""
    cached: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Arrays [samples of the stage, ...] by name: a slot carries the rows of its own samples as ``targets[name]``, and zeros for
    the dummy row of one that only fills up."""


Pieces = Mapping[str, Mapping[str, Tensor]]
"""Part -> parameter -> this rank's piece of it, flat fp32, as long as the piece of the weight."""


class Method:
    """A way not to forget: a frozen config dataclass that overrides the seams it needs.

    Every seam is called on all ranks, for all methods of a stream in their order, so that those marked as collective may be.
    """

    __slots__ = ()
    name: str

    def remember(self, memory: Sequence[Remembered], task: str, examples: Sequence[Example]) -> Sequence[Remembered]:
        """The memory after a stage on ``task``, out of the one before it and the task's training examples. Pure."""
        return memory

    def rehearse(self, past: Past) -> Rehearsal | None:
        """Which old examples the stage trains on as well. Pure."""
        return None

    def begin(self, beginning: Beginning) -> Active:
        """Terms and penalties of the stage. Collective. A resumed stage begins again, with the weights that it *started* from."""
        return Active()

    def consolidate(self, ending: Ending) -> Pieces:
        """What a later stage needs of this rank's shards; given back to it, at any number of ranks, by ``state``. Collective.

        The gradients in the shards are of no use afterwards; weights and moments are as they were.
        """
        return {}
