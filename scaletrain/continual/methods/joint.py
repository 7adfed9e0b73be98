"""All tasks at once, from the beginning: what no method that forgets nothing could beat by much, and the cost that it avoids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scaletrain.continual.method import Method, Past, Rehearsal


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint(Method):
    """Trains every stage from the first encoder on the training examples of all tasks so far: the usual upper bound.

    It keeps the data of all tasks, and the cost of a stage grows with their number. It has no setting and stands alone: what
    another method could add to it is in it already.
    """

    name: Literal["joint"] = "joint"

    def rehearse(self, past: Past) -> Rehearsal | None:
        return Rehearsal(past.train(), per_new=None, afresh=True) if past.tasks else None
