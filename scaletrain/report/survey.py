"""What a page about a folder of data says: what is in it, how long and how frequent, and what of it is damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scaletrain.report.content import (
    Block,
    Fact,
    Facts,
    Fold,
    Histogram,
    Histograms,
    Page,
    Passage,
    Section,
    Table,
    Word,
)
from scaletrain.report.run import spaced
from scaletrain.report.scale import size

LISTED = 1000
"""Damaged samples on a page; the terminal and the JSON have all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A split of a prepared folder, or all of a folder of tars."""

    name: str
    counts: Mapping[str, float]
    """What there is, by its name: chunks, tokens, shards, ..."""
    bytes: int
    dropped: Mapping[str, int]
    """Documents that were left out, by reason."""
    histograms: tuple[Histogram, ...]
    frequent: Sequence[tuple[str, int, float]] = ()
    """The most frequent tokens: how often they occur, and their share of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRecord:
    """What is known of a folder of data. ``verified`` None: nothing was compared with anything."""

    name: str
    kind: str
    facts: Mapping[str, str | int]
    parts: tuple[Part, ...]
    verified: str | None
    damaged: Sequence[tuple[str, str]] = ()
    """Where, and what is wrong there."""


def written(value: str | int) -> str:
    """A fact for people."""
    return value if isinstance(value, str) else f"{value:,}"


def survey_page(survey: SurveyRecord, origin: str, made: str) -> Page:
    """The page of a folder of data."""
    facts = [Fact(name=spaced(name), value=written(value)) for name, value in survey.facts.items()]
    sections = [Section(title="Overview", blocks=(Facts(facts=tuple(facts)),))] if facts else []
    if survey.damaged:
        sections.append(Section(title="Damaged", blocks=tuple(_damaged(survey.damaged))))
    sections += [Section(title=part.name, blocks=tuple(_part(part))) for part in survey.parts]
    return Page(
        title=survey.name,
        kind=survey.kind,
        status=standing(survey),
        detail=survey.verified or "No byte was compared with anything.",
        sections=tuple(sections),
        origin=origin,
        made=made,
    )


def standing(survey: SurveyRecord) -> Word:
    """Whether the data is what was prepared or indexed."""
    if survey.damaged:
        return Word(text=f"damaged: {len(survey.damaged):,}", tone="bad")
    return Word(text="whole", tone="good") if survey.verified else Word(text="not verified", tone="open")


def _damaged(damaged: Sequence[tuple[str, str]]) -> Iterator[Block]:
    if len(damaged) > LISTED:
        yield Passage(text=f"The first {LISTED:,} of {len(damaged):,}.")
    yield Table(caption="damaged", header=("where", "what"), rows=tuple(damaged[:LISTED]))


def _part(part: Part) -> Iterator[Block]:
    counts = [Fact(name=spaced(name), value=f"{count:,}") for name, count in part.counts.items()]
    yield Facts(facts=(*counts, Fact(name="size", value=size(part.bytes))))
    if any(part.dropped.values()):
        rows = tuple((spaced(reason), f"{count:,}") for reason, count in part.dropped.items() if count)
        yield Table(caption="dropped", header=("dropped because", "documents"), rows=rows, figures=frozenset({"documents"}))
    if part.histograms:
        yield Histograms(histograms=part.histograms)
    if part.frequent:
        tokens = tuple((token, f"{count:,}", f"{share:.2%}") for token, count, share in part.frequent)
        header = ("token", "occurrences", "share")
        table = Table(caption="most frequent tokens", header=header, rows=tokens, figures=frozenset(header[1:]))
        together = sum(share for *_, share in part.frequent)
        yield Fold(title=f"The {len(tokens)} most frequent tokens, {together:.0%} of all", blocks=(table,))
