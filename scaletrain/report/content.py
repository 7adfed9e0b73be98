"""What a page can say, as plain data. Nothing here knows files or HTML.

::

    Page        a head with its status, and sections
      Section   a heading and blocks, one under the other
        Facts, Charts, Histograms, HeatMap, Metrics, Judgement, Table, Passage     the kinds of block
        Fold                                                                       blocks that open on a click

All text may come from strangers: it is escaped where it is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Tone: TypeAlias = Literal["good", "bad", "open", "plain"]
"""Of a word that decides something: accepted, refused, not decided yet, none of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A state in a word, with a sign so that it does not rest on its colour."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One figure of the overview, already written out."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Figures side by side."""

    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: ``y`` over ascending ``x``; nan leaves a gap, and of several values at one ``x`` the mean is drawn, with a band
    around all. ``dotted``: every value is a measurement of its own. ``leading``: the one that sums up the others. ``notes``: a
    word on each value, for those who ask for it; or none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dotted: bool = False
    leading: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened at ``x``: a line from top to bottom with a few letters on it."""

    x: float
    letters: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over one axis of steps."""

    title: str
    unit: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    places: tuple[str, ...] = ()
    """Names of x = 0, 1, ... where x counts things that have names; else x is a step."""
    x_name: str = "step"
    may_be_logarithmic: bool = False
    shares: bool = False
    """Whether its values are from 0 to 1, so that no axis has to go further."""
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Charts side by side, as many as fit."""

    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How many there are (``unit``) of each label, in order."""

    title: str
    unit: str
    x_name: str
    bars: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histograms:
    """Histograms side by side, as many as fit."""

    histograms: tuple[Histogram, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Numbers from 0 to 1 in rows and columns; None where there is none. Rows may be of different lengths."""

    caption: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A summary figure with the formula that gives it."""

    name: str
    value: float | None
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Summary figures, one per line."""

    caption: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRow:
    """What the gate found on one task: counts of its paired test, the limits, and the p values of both hypotheses."""

    task: str
    examples: float | None
    lost: float | None
    """Right before, wrong now."""
    gained: float | None
    """Wrong before, right now."""
    drop: float | None
    limit: float | None
    accuracy: float | None
    floor: float | None
    p_held: float | None
    """Of the data, if the drop were at least the limit (adjusted for the number of tasks)."""
    p_broken: float | None
    """Of the data, if the drop were at most the limit (adjusted for the number of tasks)."""
    outcome: Word
    reason: str = ""
    uses: float | None = None
    """How often the gate's examples of this task have been used, this time included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the gate said about a candidate, and why."""

    candidate: str
    verdict: Word
    reason: str
    against: str
    """The model it was compared with; empty where it was compared with none."""
    rows: tuple[GateRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text in rows; ``Word`` for a state. Columns named in ``figures`` are aligned as numbers."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | Word, ...], ...]
    figures: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A paragraph, or with ``verbatim`` a text whose lines are kept as they are."""

    text: str
    verbatim: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Blocks behind a title that opens them."""

    title: str
    blocks: tuple[Block, ...]
    opened: bool = False
    word: Word | None = None


Block: TypeAlias = Facts | Charts | Histograms | HeatMap | Metrics | Judgement | Table | Passage | Fold


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The whole page. ``origin`` says what was read, and ``made`` by what and when the page was written."""

    title: str
    kind: str
    status: Word
    detail: str
    sections: tuple[Section, ...]
    origin: str
    made: str
