"""Steps that are not taken: not finite, a spike, or passed over; and what follows where there are too many of them.

Everything here is decided from figures that were summed over all ranks (the loss, the gradient's norm), so that all ranks decide
alike without a word. A step that is not taken leaves weights, moments and the count of updates as they were; its samples count as
consumed, and the schedule goes on: both are functions of the plan.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from scaletrain import dist, durable
from scaletrain.data.loader import Batch
from scaletrain.errors import CheckpointError, ConfigError, DivergedError
from scaletrain.train.metrics import StepRecord

MAD_TO_SIGMA = 1.4826
"""Of a normal distribution: its standard deviation over its median absolute deviation (Rousseeuw and Croux, JASA 88, 1993)."""
SMALLEST_SPREAD = 0.01
"""Share of the median that counts as one deviation where the window is flatter: in one without any spread all would be spikes."""
NAMED = 8
"""Samples of a step that a message names; the file has all."""
RECORD = "diverged.json"

Range = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What is done about a step whose loss or gradient is not finite, or far from those before it."""

    consecutive: Annotated[int, Field(ge=1)] = 3
    """So many steps in a row that cannot be taken are too many. A single one is left out, and counted."""
    spikes: Literal["off", "skip", "stop"] = "off"
    """What follows from a loss or a gradient norm far above the last ones: `skip` leaves the step out, `stop` ends the run."""
    spike_score: Annotated[float, Field(gt=0)] = 6.0
    """How far: in deviations from the median (robust z-score; the deviation is 1.4826 times the median absolute deviation)."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Of how many steps that were taken. Before there are so many, nothing is a spike."""
    on_divergence: Literal["stop", "roll_back"] = "stop"
    """What follows from too many: `roll_back` goes back to the last checkpoint before them, and then passes them over."""
    roll_backs: Annotated[int, Field(ge=1)] = 2
    """How often a run may be rolled back."""
    pass_over: tuple[Range, ...] = ()
    """Ranges of steps, first and last, that are not taken, and whose samples are not even read: data known to be bad."""

    def __post_init__(self) -> None:
        for number, (first, last) in enumerate(self.pass_over):
            if last < first:
                raise ConfigError(f"guard.pass_over.{number}", [first, last], "the first step comes first", "Swap them")


class Guard:
    """The steps of one run so far, as far as the next decision depends on them."""

    def __init__(self, config: GuardConfig, samples: Callable[[int], Sequence[str]], folder: Path) -> None:
        """``samples``: number of a step, counted from 1 -> what its samples are called. ``folder``: of the run."""
        self._config, self._samples, self._folder = config, samples, folder
        self.skipped: list[int] = []
        """Steps left out, but for those passed over."""
        self._row: list[int] = []
        """Steps in a row, up to the last one, that could not be taken."""
        self._said = ""
        self._windows = {name: deque[float](maxlen=config.spike_window) for name in ("loss", "gradient norm")}
        self._rolled: list[tuple[int, int]] = []
        """Ranges of steps from which the run was rolled back."""

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Why ``step`` (counted from 1) is not to be taken; None where it is. Call it once a step, on every rank."""
        if self.passes_over(step):
            return "passed over"
        figures = {"loss": loss, "gradient norm": norm}
        reason = None
        if not all(map(math.isfinite, figures.values())):
            reason = f"not finite: loss {loss}, gradient norm {norm}"
        elif self._config.spikes != "off":
            reason = next(filter(None, (self._spike(name, value) for name, value in figures.items())), None)
        if reason is None:
            self._row = []
            for name, value in figures.items():
                self._windows[name].append(value)
            return None
        self.skipped.append(step)
        self._row.append(step)
        self._said = reason
        return reason

    def _spike(self, name: str, value: float) -> str | None:
        window = self._windows[name]
        if len(window) < self._config.spike_window:
            return None
        middle = statistics.median(window)
        spread = MAD_TO_SIGMA * statistics.median(abs(each - middle) for each in window)
        spread = max(spread, SMALLEST_SPREAD * abs(middle), math.ulp(1.0))
        score = (value - middle) / spread
        return (
            f"spike: {name} {value:.6g}, {score:.1f} deviations above {middle:.6g}" if score > self._config.spike_score else None
        )

    def check(self) -> None:
        """Raises DivergedError, on all ranks alike, where too many steps in a row could not be taken."""
        spiked = self._config.spikes == "stop" and self._said.startswith("spike")
        if not self._row or (len(self._row) < self._config.consecutive and not spiked):
            return
        found = {step: list(self._samples(step)) for step in self._row}
        listed = "; ".join(
            f"step {step}: {', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}"
            for step, names in found.items()
        )
        if dist.rank() == 0:
            record = {"steps": self._row, "reason": self._said, "samples": {str(step): names for step, names in found.items()}}
            durable.write(self._folder / RECORD, json.dumps(record, indent=1).encode())
        counted = f"steps {self._row[0]} to {self._row[-1]}" if len(self._row) > 1 else f"step {self._row[0]}"
        raise DivergedError(
            f"{counted} could not be taken ({self._said}); the weights are those before. Samples: {listed}. {RECORD} has all. "
            "Lower optimizer.learning_rate, lengthen the warm-up, or leave the steps out with guard.pass_over"
        )

    @property
    def in_doubt(self) -> bool:
        """Whether the last step could not be taken: a save would only push out the one that a roll-back goes back to."""
        return bool(self._row)

    def passes_over(self, step: int) -> bool:
        """Whether ``step`` is in a range that is not to be taken."""
        return any(first <= step <= last for first, last in (*self._config.pass_over, *self._rolled))

    def batches(
        self, read: Callable[[int, int], Iterator[Batch]], start: int, end: int, samples_before: Callable[[int], int]
    ) -> Iterator[Batch]:
        """Those of the steps ``start`` to ``end``, which ``read`` gives by ranges; one without slots for a step passed over."""
        step = start
        while step < end:
            if self.passes_over(step + 1):
                yield Batch(step, (), {}, 0, 0, 0, samples_before(step + 1))
                step += 1
                continue
            upto = next((later for later in range(step, end) if self.passes_over(later + 1)), end)
            yield from read(step, upto)
            step = upto

    # -------------------------------------------------------------------------------------------------------- going back

    def guarded(
        self,
        attempt: Callable[[int], Iterable[StepRecord]],
        start: int,
        go_back: Callable[[int], tuple[int, Mapping[str, Any]] | None],
    ) -> Iterator[StepRecord]:
        """The records of ``attempt(start)``, which takes steps and calls ``check``; after a divergence, of another attempt.

        ``go_back(first)`` restores the last checkpoint before the step ``first``, and returns how many steps it had taken and
        this guard's state in it, or None where there is none. All of it is deterministic: killed anywhere inside, a run comes to
        the same decision again.
        """
        while True:
            try:
                self.check()
                yield from attempt(start)
                return
            except DivergedError as error:
                if self._config.on_divergence == "stop":
                    raise
                if len(self._rolled) == self._config.roll_backs:
                    error.add_note(f"The run has been rolled back {len(self._rolled)} times before (guard.roll_backs)")
                    raise
                known, bad = self._rolled, (self._row[0], self._row[-1])
                restored = go_back(bad[0])
                if restored is None:
                    error.add_note("There is no checkpoint from before them to go back to (checkpoint.every_steps)")
                    raise
                start, state = restored
                self._restore(state)
                self._rolled = [*known, bad]

    # --------------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "skipped": list(self.skipped),
            "row": list(self._row),
            "said": self._said,
            "windows": {name: list(window) for name, window in self._windows.items()},
            "rolled_back": [list(each) for each in self._rolled],
            "pass_over": [list(each) for each in self._config.pass_over],
        }

    def resume(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Goes on after ``step`` steps from a checkpoint's ``state``; None where it was written without a guard.

        Raises CheckpointError where other steps were passed over by hand than the settings say now.
        """
        if state is None:
            return
        before, now = (_until(step, ranges) for ranges in (state["pass_over"], self._config.pass_over))
        if not before <= now <= before.union(state["skipped"]):
            rule = f"of the {step} steps so far, the run has passed over {sorted(before) or 'none'}"
            remedy = "Change it for later steps, or for those that were skipped, or start with --fresh"
            raise CheckpointError("guard.pass_over", sorted(now), rule, remedy)
        self._restore(state)
        self._row = [each for each in self._row if each not in now]  # whoever passes them over has dealt with them

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.skipped, self._row, self._said = list(state["skipped"]), list(state["row"]), str(state["said"])
        self._rolled = [(first, last) for first, last in state["rolled_back"]]
        for name, window in self._windows.items():
            window.clear()
            window.extend(state["windows"][name])


def _until(step: int, ranges: Iterable[Sequence[int]]) -> set[int]:
    """The steps up to ``step`` that are in the ranges."""
    return {each for first, last in ranges for each in range(first, min(last, step) + 1)}
