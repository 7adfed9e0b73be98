"""Who was taken for whom: the scores of a classification, from counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """``counts`` int64 [labels, labels]: row = the true label, column = the predicted one.

    Precision, recall and F1 of a label are 0 where they would divide by 0. Averages run over the labels that occur, as truth or
    as prediction: a label of which the data has no trace says nothing about a model.
    """

    counts: NDArray[np.int64]

    @classmethod
    def of(cls, true: NDArray[Any], predicted: NDArray[Any], labels: int) -> Confusion:
        """From the columns [samples] of both, whole numbers below ``labels``."""
        flat = true.astype(np.int64) * labels + predicted.astype(np.int64)
        return cls(np.bincount(flat, minlength=labels * labels).reshape(labels, labels))

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.counts) / self.counts.sum())

    @property
    def macro_f1(self) -> float:
        """Plain mean over labels."""
        return float(self._f1[self._occurs].mean())

    @property
    def weighted_f1(self) -> float:
        """Mean over labels, each weighted by its number of examples."""
        return float((self._f1 * self._support).sum() / self._support.sum())

    def per_label(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Precision, recall, F1 and number of examples of each label that occurs, in the order of the columns."""
        rows = zip(labels, self._precision, self._recall, self._f1, self._support, self._occurs, strict=True)
        return [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for label, p, r, f, n, occurs in rows
            if occurs
        ]

    def worst(self, labels: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
        """The most frequent mistakes: the true label, the predicted one, and how often."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [(int(place) // len(labels), int(place) % len(labels)) for place in order]
        return [{"true": labels[t], "predicted": labels[p], "count": int(wrong[t, p])} for t, p in pairs if wrong[t, p]]

    @property
    def _support(self) -> NDArray[np.int64]:
        support: NDArray[np.int64] = self.counts.sum(axis=1)
        return support

    @property
    def _occurs(self) -> NDArray[np.bool_]:
        occurs: NDArray[np.bool_] = (self.counts.sum(axis=0) + self._support) > 0
        return occurs

    @property
    def _precision(self) -> NDArray[np.float64]:
        return _share(np.diag(self.counts), self.counts.sum(axis=0))

    @property
    def _recall(self) -> NDArray[np.float64]:
        return _share(np.diag(self.counts), self._support)

    @property
    def _f1(self) -> NDArray[np.float64]:
        return _share(2 * np.diag(self.counts), self.counts.sum(axis=0) + self._support)


def report_text(rows: Sequence[dict[str, Any]]) -> str:
    """``per_label`` as a table for people."""
    width = max(5, *(len(row["label"]) for row in rows))
    lines = [f"{'label':<{width}}  precision  recall     f1  examples"]
    for row in rows:
        lines.append(
            f"{row['label']:<{width}}  {row['precision']:>9.3f}  {row['recall']:>6.3f}  {row['f1']:>5.3f}  {row['support']:>8}"
        )
    return "\n".join(lines)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
