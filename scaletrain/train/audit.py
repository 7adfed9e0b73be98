"""Checks a run's account against its plan: how often every chunk was seen, and in which steps; gaps, repeats, wrong samples.

The account says of each step how many samples there were and has a digest of which; of what was replaced, it says by what. The
plan says which samples the step should have had. Where the digests are equal, the step had exactly those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.ledger import Entry, Substitution, replaced, sample_digest
from scaletrain.data.ledger import digest_of_sum as shown
from scaletrain.data.plan import Picks, Plan


@dataclass(slots=True)
class Attempt:
    """What one start of the run took, or one stretch after a roll-back."""

    start: int
    """Steps that were behind it when it began."""
    rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Of its steps that count, by number."""
    void: list[int] = field(default_factory=list)
    """Its steps that do not count: a later attempt began before them."""
    last: int = 0
    """The step that it took last."""
    samples: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """By corpus, how many samples its steps that count have had."""


@dataclass(slots=True)
class Audit:
    """The outcome. ``faults`` is empty where the account is that of the plan, to the sample."""

    names: list[str]
    plan: Plan
    attempts: list[Attempt]
    replaced: list[Entry]
    faults: list[str]
    seen: list[NDArray[np.uint32]]
    """By corpus, how often each of its chunks went through the model in a step that counts."""
    untaken: int = 0
    """Samples of steps that went through the model and changed nothing: not finite, or a spike."""
    passed_over: int = 0
    """Steps whose samples were not read, as the settings say."""

    @property
    def steps(self) -> int:
        """Steps that count."""
        return sum(len(attempt.rows) for attempt in self.attempts)

    @property
    def samples(self) -> int:
        """Samples in them."""
        return int(sum(int(times.sum()) for times in self.seen))


def audit(rows: Iterable[Mapping[str, Any]], reached: int = 0) -> Audit:
    """Checks the rows of an account of a run that is known to have taken ``reached`` steps, by its checkpoints or its end.

    Raises ValueError where the account has no beginning.
    """
    books = _Books()
    for row in rows:
        books.enter(row)
    if books.plan is None:
        raise ValueError("no attempt ever began")
    plan = books.plan
    result = Audit(
        books.names, plan, books.attempts, [], books.faults, [np.zeros(corpus.chunks, np.uint32) for corpus in plan.corpora]
    )
    digests = [corpus.digest for corpus in plan.corpora]
    taken = {step: attempt for attempt in books.attempts for step in attempt.rows}
    result.faults += _gaps(taken, max(reached, books.saved))
    for attempt in books.attempts:
        attempt.samples = np.zeros(len(plan.corpora), np.int64)
    for step, attempt in sorted(taken.items()):
        if step > plan.steps:
            result.faults.append(f"step {step} is beyond the plan's {plan.steps}")
            break
        read = _check_step(result, digests, step, attempt.rows[step], books.replaced.get(step, {}))
        if read is not None:
            attempt.samples += np.bincount(read.corpus, minlength=len(plan.corpora))
    return result


class _Books:
    """Rows put in order: which step counts, and which was taken again."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.plan: Plan | None = None
        self.attempts: list[Attempt] = []
        self.replaced: dict[int, dict[int, Substitution]] = {}
        self.saved = 0
        self._lease = 0
        self.faults: list[str] = []

    def enter(self, row: Mapping[str, Any]) -> None:
        kind, step, lease = row["kind"], row["step"], row.get("lease", 0)
        if lease < self._lease:
            return  # of a job that was taken for dead, and did not know it yet
        if kind == "begin":
            self._lease = lease
            self._begin(row, step)
        elif not self.attempts:
            self.faults.append(f"a row of step {step} before any attempt began")
        elif kind == "replaced":
            names = ("corpus", "corpus_pass", "chunk", "substitute", "reason")
            self.replaced.setdefault(step, {})[row["sample"]] = Substitution(*(row[name] for name in names))
        elif kind == "saved":
            self.saved = max(self.saved, step)
        elif kind == "step":
            latest = self.attempts[-1]
            before = latest.last
            if step in latest.rows or step <= latest.start:
                self.faults.append(f"step {step} is recorded twice in one attempt")
            elif step != before + 1:
                self.faults.append(f"steps {before + 1} to {step - 1} are missing in the attempt that began after {latest.start}")
            latest.rows[step], latest.last = row, max(step, before)

    def _begin(self, row: Mapping[str, Any], step: int) -> None:
        plan = Plan.of(row["plan"])
        if self.plan is not None and plan.digest != self.plan.digest:
            self.faults.append(f"the attempt that began after step {step} had another plan")
        for attempt in self.attempts:
            late = [each for each in attempt.rows if each > step]
            attempt.void += late
            for each in late:
                del attempt.rows[each]
        self.replaced = {each: found for each, found in self.replaced.items() if each <= step}
        self.plan, self.names, self.saved = plan, row["corpora"], step
        self.attempts.append(Attempt(step, last=step))


def _gaps(taken: Mapping[int, Any], reached: int) -> Iterator[str]:
    for first, last in ranges(set(range(1, max(reached, *taken, 0) + 1)) - set(taken)):
        yield f"no record of steps {first} to {last}" if last > first else f"no record of step {first}"


def _check_step(
    result: Audit, digests: list[str], step: int, row: Mapping[str, Any], substitutions: Mapping[int, Substitution]
) -> Picks | None:
    """The samples of a step, where they are known to be those that it had."""
    picks = result.plan.picks(step - 1)
    if not row["samples"] and "skipped" in row:
        result.passed_over += 1
        return None
    try:
        read = replaced(picks, substitutions.values())
    except IndexError:
        result.faults.append(f"step {step}: a sample is said to be replaced that the plan has not put there")
        return None
    if row["samples"] != len(picks):
        result.faults.append(f"step {step}: {row['samples']} samples, and the plan has {len(picks)}")
    if row["digest"] != shown(sample_digest(digests, read)):
        result.faults.append(f"step {step}: other samples than the plan's (digest {row['digest']})")
        return None
    result.replaced += [Entry(step, sample, each) for sample, each in sorted(substitutions.items())]
    if "skipped" in row:
        result.untaken += len(read)
    _count(result.seen, read)
    return read


def _count(seen: list[NDArray[np.uint32]], read: Picks) -> None:
    for corpus in np.unique(read.corpus):
        np.add.at(seen[corpus], read.chunk[read.corpus == corpus], 1)


def ranges(steps: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as ranges, first and last, ascending."""
    found: list[tuple[int, int]] = []
    for step in sorted(steps):
        if found and found[-1][1] == step - 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found
