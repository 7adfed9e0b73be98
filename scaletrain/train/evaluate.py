"""Scores of a whole data set, the same at any number of ranks.

Every sample is scored once, on some rank. The parts are brought together with the sample they belong to, checked against the data
set and put in its order; what is computed from the whole then does not depend on who scored what.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scaletrain import dist, heartbeat
from scaletrain.data.loader import Batch
from scaletrain.engine import Engine
from scaletrain.errors import ScaletrainError
from scaletrain.train.control import StopRequest
from scaletrain.train.loop import attempts


class Scorer(Protocol):
    """What evaluation asks of a task."""

    @property
    def columns(self) -> int:
        """Numbers that are kept of a sample."""

    def score(self, outputs: Any, slot: Any) -> NDArray[np.float64]:
        """What is kept of each sample of the slot, in its order: [samples, columns]."""


def evaluate(
    engine: Engine, task: Scorer, batches: Iterable[Batch], samples: int, stop: StopRequest | None = None
) -> NDArray[np.float64]:
    """What the task keeps of each of the data set's ``samples``, in the data set's order: [samples, columns]. Collective.

    Raises ScaletrainError on all ranks unless each sample was scored exactly once, and RequeueError where any rank was asked to
    ``stop`` meanwhile: what was scored until then is dropped.
    """
    rows = [np.empty((0, 2 + task.columns))]
    with engine.inference(), heartbeat.section("evaluation"):
        for batch, failure in attempts(batches):
            totals = engine.begin(batch.rounds if batch else (), {"stop": float(stop is not None and stop.requested)}, failure)
            assert batch is not None, "begin raises for a failure"
            if stop is not None and totals["stop"]:
                stop.agreed = True
                stop.require_not_agreed("in an evaluation")
            for slot in batch.slots:
                scores = task.score(engine.forward(slot), slot)
                rows.append(np.column_stack([slot.samples.corpus, slot.samples.chunk, scores]))
    table = dist.gather_rows(np.concatenate(rows))
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    scored = len(np.unique(table[:, :2], axis=0))
    if not scored == len(table) == samples:
        raise ScaletrainError(f"evaluation scored {scored} different samples, {len(table)} in all, of a data set of {samples}")
    return table[:, 2:]
