"""What the gate said and why, put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scaletrain.report.content import GateRow, Judgement, Tone, Word

RULES = (
    "Both models answer the same examples of every live task. The drop is (lost - gained) / n. Two one-sided score tests for "
    "paired proportions (Tango 1998), corrected over the tasks by Holm's procedure: a task is held where its drop is shown to be "
    "below the limit, broken where it is shown to be above it or where the accuracy is below the floor, and open otherwise. A "
    "task that the published model does not know is new: it has nothing to lose, and is broken only below its floor. Any broken: "
    "refuse. Else any open: undecidable, there is no proof of harm, and none of its absence. Else accept."
)

COLUMNS = (
    ("task", "live task that must not get worse"),
    ("n", "examples of the gate's split"),
    ("lost", "right with the published model, wrong with the candidate"),
    ("gained", "wrong with the published model, right with the candidate"),
    ("drop", "(lost - gained) / n"),
    ("limit", "largest drop that is accepted"),
    ("accuracy", "of the candidate on the gate's split"),
    ("floor", "lowest accuracy that is accepted"),
    ("p held", "of such data if the drop were at or above the limit; small: the limit is held"),
    ("p broken", "of such data if the drop were at or below the limit; small: the limit is broken"),
    ("uses", "how often these examples have decided by now: the more often, the less they say"),
    ("finding", "on this task, and why"),
)
"""Of the gate's table, with what they mean."""

_TONES: Mapping[str, Tone] = {"accept": "good", "held": "good", "refuse": "bad", "broken": "bad"}


def finding(text: str, *, compared: bool = True) -> Word:
    """A decision of the gate, or its finding on one task. What was not ``compared`` has not been shown to be held: it is new."""
    if text == "held" and not compared:
        return Word(text="new")
    return Word(text=text, tone=_TONES.get(text, "open"))


def judgement(candidate: str, decision: str, rows: Sequence[GateRow], against: str | None) -> Judgement:
    """The gate's decision on a candidate, when ``against`` was published (None: nothing was)."""
    compared = any(row.drop is not None for row in rows)
    return Judgement(
        candidate=candidate,
        verdict=finding(decision),
        reason=_why(decision, rows, against),
        against=against or "" if compared else "",
        rows=tuple(rows),
    )


def _why(decision: str, rows: Sequence[GateRow], against: str | None) -> str:
    """The decision in a sentence that names the tasks it rests on."""
    names = {status: ", ".join(row.task for row in rows if row.outcome.text == status) for status in ("broken", "open")}
    match decision:
        case "accept" if not rows:
            return "Nothing was compared: this lineage has no gate."
        case "accept":
            return f"{_losses(rows, against)} {_floors(rows)}"
        case "refuse":
            return f"Broken: {names['broken']}."
        case _:
            return f"Nothing is shown to be broken, but there are too few examples to tell about: {names['open']}."


def _losses(rows: Sequence[GateRow], against: str | None) -> str:
    """What an accepted candidate has shown of the tasks that the published model knows."""
    if any(row.drop is not None for row in rows):
        return "Every task that the published model knows is shown to have lost less than its limit."
    return f"Nothing was compared: {f'{against} knows none of these tasks' if against else 'nothing was published before'}."


def _floors(rows: Sequence[GateRow]) -> str:
    """What an accepted candidate has shown of its floors."""
    return "No task is below its floor." if any(row.floor is not None for row in rows) else "No task has a floor."
