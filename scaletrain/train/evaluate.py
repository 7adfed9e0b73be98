"""Scores of a whole data set, the same at any number of ranks.

Every sample is scored once, on some rank. The parts are brought together with the sample they belong to, checked against the data
set, put in its order and added up once: what is returned does not depend on who scored what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from scaletrain import dist
from scaletrain.data.loader import Batch
from scaletrain.engine import Engine
from scaletrain.errors import CorpusError, ScaletrainError
from scaletrain.train.loop import attempts


class Scorer(Protocol):
    """What evaluation asks of a task."""

    def score(self, outputs: Any, slot: Any) -> Any:
        """Per sample of the slot: ``loss`` (summed), ``counts`` and ``correct``, each [samples]."""


def evaluate(engine: Engine, task: Scorer, batches: Iterable[Batch], samples: int) -> dict[str, float]:
    """``loss`` (mean over predictions, in nats), ``perplexity`` and ``accuracy`` over ``samples`` samples. Collective.

    Raises ScaletrainError on all ranks unless each sample was scored exactly once, CorpusError where nothing was predicted.
    """
    rows = [np.empty((0, 5))]
    with engine.inference():
        for batch, failure in attempts(batches):
            engine.begin(batch.rounds if batch else (), failure=failure)
            assert batch is not None, "begin raises for a failure"
            for slot in batch.slots:
                scores = task.score(engine.forward(slot), slot)
                rows.append(
                    np.column_stack([slot.samples.corpus, slot.samples.chunk, scores.loss, scores.counts, scores.correct])
                )
    table = dist.gather_rows(np.concatenate(rows))
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    scored = len(np.unique(table[:, :2], axis=0))
    if not scored == len(table) == samples:
        raise ScaletrainError(f"evaluation scored {scored} different samples, {len(table)} in all, of a data set of {samples}")
    loss, predictions, correct = (math.fsum(column) for column in table[:, 2:].T)
    if not predictions:
        rule = "nothing in it is to be predicted, so there is no loss to speak of"
        raise CorpusError("the held-out text", f"{samples} samples", rule, "Hold out more text, or set evaluation.every_steps=0.")
    mean = loss / predictions
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": correct / predictions}
