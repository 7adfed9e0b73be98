"""An exact account of what a run was fed: what stood in for data that could not be read, and a digest of every step's samples.

A step never becomes shorter because a shard is damaged: another chunk takes the place of one that cannot be read, chosen by the
plan, and a line says so. The lines are part of every checkpoint. A budget says how many there may be; beyond it the run stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from scaletrain.data import keyed
from scaletrain.data.plan import Picks

DIGEST_BITS = 40
"""Of a step's digest: sums of it over 4,096 ranks are exact in the float64 that ranks add up."""
FEWEST_SAMPLES = 10_000
"""The budget's share is of at least so many: else the first damaged chunk of a run would be beyond any share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DamageConfig:
    """How much of the training data may turn out to be unreadable. What cannot be read is replaced by other chunks."""

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of the samples consumed so far (of 10,000 where there are fewer) that may have been replaced; 0: none."""
    consecutive: Annotated[int, Field(ge=1)] = 32
    """So many replaced samples in a row, in the order of the plan, are too many: it is the storage that fails, not a shard."""


@dataclass(frozen=True, slots=True)
class Substitution:
    """One sample that could not be read, and what was read in its place."""

    corpus: int
    """Its number in the plan."""
    corpus_pass: int
    chunk: int
    substitute: int
    """A chunk of the same corpus, cut to the length of the other one, and masked as the chunk that it is."""
    reason: str
    """What the last attempt to read the sample said."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the ledger: a substitution, and where in the run it was."""

    step: int
    """Steps taken after this one."""
    sample: int
    """Number of the sample in the run, counted from 0."""
    substitution: Substitution


class Ledger:
    """All substitutions of a run up to a step, the same on every rank."""

    def __init__(self, config: DamageConfig) -> None:
        self._config = config
        self.entries: list[Entry] = []

    def add(self, entries: Iterable[Entry]) -> None:
        """Adds a step's, in the order of its samples."""
        self.entries += sorted(entries, key=lambda entry: entry.sample)

    def exceeded(self, samples: int) -> str | None:
        """What is beyond the budget after ``samples`` samples, in words; None where nothing is."""
        row, before = 0, -2
        for entry in self.entries:
            row, before = (row + 1 if entry.sample == before + 1 else 1), entry.sample
            # A row that ended before the last step was dealt with: whoever mended the storage may go on.
            if row >= self._config.consecutive and entry.step == self.entries[-1].step:
                return f"{row} samples in a row could not be read (data.damage.consecutive is {self._config.consecutive})"
        allowed = self._config.fraction * max(samples, FEWEST_SAMPLES)
        if len(self.entries) > allowed:
            return (
                f"{len(self.entries)} of {samples} samples could not be read; {int(allowed)} may "
                f"(data.damage.fraction is {self._config.fraction:g}, of at least {FEWEST_SAMPLES} samples)"
            )
        return None

    def state(self) -> list[list[Any]]:
        """For a checkpoint: some 130 bytes for each entry, and a budget bounds how many there are."""
        return [[entry.step, entry.sample, *asdict(entry.substitution).values()] for entry in self.entries]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """The inverse of ``state``."""
        self.entries = [Entry(step, sample, Substitution(*rest)) for step, sample, *rest in state]


def samples_of(substitutions: Iterable[Substitution], picks: Picks, first: int) -> Iterator[tuple[int, Substitution]]:
    """The number in the run of each sample that was replaced, in a step that has ``picks`` and begins with sample ``first``."""
    for each in substitutions:
        there = (picks.corpus == each.corpus) & (picks.corpus_pass == each.corpus_pass) & (picks.chunk == each.chunk)
        yield first + int(np.flatnonzero(there)[0]), each


def replaced(picks: Picks, substitutions: Iterable[Substitution]) -> Picks:
    """What was read for ``picks``."""
    chunk = picks.chunk.copy()
    for place, each in samples_of(substitutions, picks, 0):
        chunk[place] = each.substitute
    return Picks(picks.corpus, picks.corpus_pass, chunk)


def sample_digest(corpora: Sequence[str], picks: Picks) -> int:
    """A digest of which samples there are, in any order: the sum of a hash of each, modulo 2**40. The sum of the digests of
    parts, modulo 2**40, is the digest of the whole: so ranks add up theirs without telling each other what they read.
    """
    if not len(picks):
        return 0
    of_corpus = np.array([keyed.key("sample", digest) for digest in corpora], dtype=np.uint64)
    hashes = keyed.derive(keyed.derive(of_corpus[picks.corpus], picks.corpus_pass), picks.chunk)
    return int(np.sum(hashes >> np.uint64(64 - DIGEST_BITS), dtype=np.uint64)) % (1 << DIGEST_BITS)


def digest_of_sum(total: float) -> str:
    """The digest of a step out of the sum of its ranks' digests, as it is recorded."""
    return f"{int(total) % (1 << DIGEST_BITS):0{DIGEST_BITS // 4}x}"
