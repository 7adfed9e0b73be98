"""Experience replay: a few old examples are kept, and every step trains on some of them beside the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from scaletrain.continual.memory import Balance, Remembered, remember
from scaletrain.continual.method import Method, Past, Rehearsal
from scaletrain.data.labelled import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay(Method):
    """Experience replay (Chaudhry et al., arXiv 1902.10486) with a memory of `capacity` examples over all tasks.

    The memory is filled with the examples that have the lowest keyed hashes: a sample as uniform as a reservoir's, which depends
    neither on the order in which examples were seen nor on the number of ranks.
    """

    name: Literal["replay"] = "replay"
    capacity: Annotated[int, Field(ge=1)] = 500
    """Examples that are kept, of all tasks together. Their texts are stored with every version."""
    per_new: Annotated[float, Field(gt=0)] = 1.0
    """Old samples per new one in every step, on top of it: 1 doubles the cost of a step."""
    balance: Balance = "class"
    """`class`: every label of every task has an equal share of the memory. `none`: every example has the same chance."""
    seed: int = 1
    """Of the keyed hash that decides which examples are kept; the same in all stages of a stream."""

    def remember(self, memory: Sequence[Remembered], task: str, examples: Sequence[Example]) -> Sequence[Remembered]:
        return remember(memory, task, examples, capacity=self.capacity, balance=self.balance, seed=self.seed)

    def rehearse(self, past: Past) -> Rehearsal | None:
        if not past.memory:
            return None
        return Rehearsal([(kept.task, kept.example) for kept in past.memory], self.per_new)
