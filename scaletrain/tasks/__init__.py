"""What a model is trained to do: one file per task, each the few functions below.

A task turns chunks into a slot, and the module's output for a slot into sums. It neither divides by counts nor knows other
slots or ranks: the loop adds sums and counts up over the step, and a step's loss is the sum of ``weight * sum / count`` over
the terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scaletrain.data.collate import Slot
from scaletrain.data.plan import Picks


class Task(Protocol):
    """What the loop, the loader and evaluation ask of a task."""

    @property
    def signature(self) -> str:
        """Names the modules that its slots run; slots of one round have the same."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Term of the loss -> its weight. Its keys are those of every slot's ``counts``."""

    def collate(self, step: int, index: int, samples: Picks, chunks: Sequence[NDArray[np.int32]]) -> Slot:
        """One slot out of its samples and their token arrays; without samples, a slot that runs the full path for nothing."""

    def terms(self, outputs: Tensor, slot: Slot) -> dict[str, Tensor]:
        """Term of the loss -> its sum over the slot, an fp32 scalar with a graph to every module, also where its count is 0."""

    @property
    def columns(self) -> int:
        """How many numbers evaluation keeps of a sample."""

    def score(self, outputs: Tensor, slot: Slot) -> NDArray[np.float64]:
        """What evaluation keeps of each sample of a slot, in its order: [samples, columns]."""

    def summary(self, table: NDArray[np.float64]) -> dict[str, float]:
        """Scores of a data set by their names, computed once from the rows of all its samples: [samples, columns]."""
