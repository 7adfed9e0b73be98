"""The table of faults: what was injected, how often, how it ended, how soon it was noticed, and what it cost.

A test adds its row with the fixture ``fault``; the rows of all processes are printed together at the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

PROPERTY = "fault"
"""Under which a test's report carries its rows, also from another process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One fault, as a test met it."""

    fault: str
    """Its number in the list, ``F1`` to ``F22``."""
    injected: str
    """What was done, and where."""
    times: int = 1
    outcome: str
    """What the test has asserted, in a few words."""
    detect_s: float | None = None
    """Seconds until it was noticed; None where nothing has to notice it."""
    lost_steps: int | None = None
    """Steps that had to be taken again."""


Add = Callable[..., None]


def adder(record: Callable[[str, object], None]) -> Add:
    """What the fixture ``fault`` gives: called with the fields of a row."""
    return lambda **fields: record(PROPERTY, asdict(Row(**fields)))


def rows(reports: Iterable[Any]) -> list[Row]:
    """Those that pytest's ``reports`` carry, by the number of the fault."""
    found = [Row(**value) for report in reports for name, value in report.user_properties if name == PROPERTY]
    return sorted(found, key=lambda row: (int(row.fault[1:]), row.injected))


def lines(found: list[Row]) -> list[str]:
    """The table as text."""
    table = [("fault", "injected", "times", "outcome", "detected", "lost")]
    for row in found:
        detected = "-" if row.detect_s is None else f"{row.detect_s:.1f} s"
        lost = "-" if row.lost_steps is None else f"{row.lost_steps} steps"
        table.append((row.fault, row.injected, str(row.times), row.outcome, detected, lost))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
