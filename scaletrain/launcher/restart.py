"""A job that failed is started again, as long as that leads somewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from scaletrain.errors import InputError, PeerLostError, RequeueError, ScaletrainError, StorageError
from scaletrain.launcher.group import signals_to
from scaletrain.launcher.watch import Stall

WORTH_IT = (ScaletrainError.exit_code, StorageError.exit_code, PeerLostError.exit_code)
"""Exit codes after which another start may go better: a bug, a disk, a rank that was lost. Not bad input, nor a verdict."""
RECORD = "attempts.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarts:
    """What follows from a failure. A job that was asked to stop is never started again: whoever asked will do that."""

    attempts: Annotated[int, Field(ge=0)] = 0
    """How often a job that failed (exit codes 70, 74, 76, or a crash) is started again, from its newest checkpoint."""
    backoff_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds before the first of them; each wait is twice the one before."""
    longest_backoff_s: Annotated[float, Field(ge=0)] = 600.0
    """But no longer than this."""
    no_progress: Annotated[int, Field(ge=1)] = 3
    """So many failures in a row without a new checkpoint between them are the last."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How one attempt ended."""

    code: int
    asked: bool = False
    """Whether it was asked to stop."""
    stall: Stall | None = None
    """Who hung, and in what."""
    said: Mapping[str, Any] | None = None
    """What rank 0 recorded: step and reason."""

    @property
    def worth_another(self) -> bool:
        """Whether another start may go better. A code that is not ours is that of a crash."""
        return self.code in WORTH_IT or self.code not in {0, *exit_codes()}


def again(config: Restarts, once: Callable[[int], Ending], output: Path | None) -> int:
    """The exit code of the last of as many ``once(number)`` as it takes; each leaves a line in ``attempts.jsonl``.

    A request to stop that comes between two of them ends it with 75.
    """
    failures, before = 0, None
    asked: list[int] = []
    with signals_to(asked.append):
        for number in range(config.attempts + 1):
            began = time.monotonic()
            try:
                ending = once(number)
            except ScaletrainError as error:
                if number == 0:
                    raise
                # What was well when the job began is not now, such as a host that does not answer: it may be again.
                print(f"error: {error}", file=sys.stderr)
                ending = Ending(PeerLostError.exit_code, said={"reason": str(error)})
            stands = standing(output)
            # One that was refused has no business in the folder: it may be another job's.
            if (config.attempts or ending.stall) and ending.code != InputError.exit_code:
                _note(output, number, ending, time.monotonic() - began, stands)
            if not ending.worth_another or ending.asked or number == config.attempts:
                return ending.code
            failures, before = (failures + 1 if stands == before else 1), stands
            if failures >= config.no_progress:
                print(f"error: {failures} attempts in a row have ended at {stands}; it is given up", file=sys.stderr)
                return ending.code
            wait_s = min(config.backoff_s * 2 ** min(number, 30), config.longest_backoff_s)
            left = config.attempts - number
            print(f"the job ended with {ending.code}, at {stands}; started again in {wait_s:g} s ({left} left)", file=sys.stderr)
            wait_ends = time.monotonic() + wait_s
            while time.monotonic() < wait_ends and not asked:
                time.sleep(min(0.05, wait_s))
            if asked:
                print(f"stopped on request at {stands}; the same command continues it", file=sys.stderr)
                return RequeueError.exit_code
    raise AssertionError("the last attempt returns")


def exit_codes() -> set[int]:
    """All that our errors have."""
    kinds = [ScaletrainError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.exit_code for kind in kinds}


def standing(output: Path | None) -> str:
    """How far a run or a lineage has come, by the names of its newest checkpoints."""
    if output is None:
        return "its beginning"
    places = [*output.glob("checkpoints/step-*"), *output.glob("work/*/checkpoints/step-*"), *output.glob("versions/*")]
    newest: dict[Path, str] = {}
    for place in places:
        newest[place.parent] = max(place.name, newest.get(place.parent, ""))
    return ", ".join(str((folder / name).relative_to(output)) for folder, name in sorted(newest.items())) or "its beginning"


def _note(output: Path | None, number: int, ending: Ending, seconds: float, stands: str) -> None:
    if output is None:
        return
    said = ending.said or {}
    row = {
        "attempt": number,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": ending.code,
        "reason": ending.stall.text() if ending.stall else said.get("reason"),
        "step": said.get("step"),
        "stands": stands,
        "seconds": round(seconds, 3),
    }
    if ending.stall:
        row |= {"ranks": ending.stall.ranks, "section": ending.stall.section}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (output / RECORD).open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        print(f"warning: {output / RECORD} could not be written: {error}", file=sys.stderr)
