"""Which checkpoint of a run is the one to keep, and when it is no use to go on.

Pure: it is told scores and answers. All ranks are told the same scores, so that they decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

Metric = Literal["accuracy", "macro_f1", "weighted_f1", "loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """What is looked at on the validation split, how often, and what follows from it."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; empty: once per pass over the new examples. The last step always has one."""
    metric: Metric = "accuracy"
    """What makes one checkpoint better than another. The earlier one wins a tie."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row without a better one; empty: never."""
    minimum_gain: Annotated[float, Field(ge=0)] = 0.0
    """How much better counts as better."""


@dataclass(slots=True)
class Selection:
    """The evaluations of a run so far, in the three numbers that matter."""

    config: SelectionConfig
    best_step: int | None = None
    best_score: float | None = None
    since_best: int = 0
    """Evaluations since the best one."""

    def offer(self, step: int, scores: Mapping[str, float]) -> bool:
        """Takes note of an evaluation; returns whether it is the best so far."""
        score = scores[self.config.metric]
        if not math.isfinite(score):
            self.since_best += 1  # compared with nothing, it would be the best there ever was
            return False
        gain = 0.0 if self.best_score is None else score - self.best_score
        if self.config.metric == "loss":
            gain = -gain
        if self.best_score is None or gain > self.config.minimum_gain:
            self.best_step, self.best_score, self.since_best = step, score, 0
            return True
        self.since_best += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.config.patience is not None and self.since_best >= self.config.patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "config"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a checkpoint's ``state``."""
        for name, value in state.items():
            setattr(self, name, value)

    @classmethod
    def resumed(cls, config: SelectionConfig, state: Mapping[str, Any]) -> Selection:
        """From a checkpoint's ``state``; empty for a run that has had none."""
        return cls(config, **state)
