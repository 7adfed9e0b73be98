"""Reads chunks whatever the storage does: again after a failure, and in the end another chunk in its place.

::

    read ── failed ──► pause, read again ── failed `retries` times ──► the plan's substitute ── none can be read ──► error

Which chunk takes the place of another is said by the plan, so it is the same on any number of ranks. An evaluation has no
substitutes: its score is of the whole data set or it is no score.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from scaletrain.data.ledger import Substitution
from scaletrain.data.slots import DealtPlan
from scaletrain.errors import CorpusError, DataBudgetError, StorageError

Tokens = NDArray[np.int32]
FAILURES = (CorpusError, StorageError, OSError)
"""What a read may fail with: damaged bytes, a disk or a server that does not give them. Anything else is a bug."""


class Readable(Protocol):
    """A corpus as the loader sees it."""

    @property
    def digest(self) -> str: ...

    def read(self, chunk: int) -> Tokens: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """What happens when a chunk cannot be read at once."""

    attempts: Annotated[int, Field(ge=1)] = 4
    """Reads before a chunk is given up and another one takes its place."""
    pause_s: Annotated[float, Field(ge=0)] = 0.2
    """Pause before the second read; it doubles each time, and up to half of it is added at random."""
    read_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Longest that one read may take. The thread that hangs in it is left to itself, and another one reads again."""
    outage_s: Annotated[float, Field(ge=0)] = 120.0
    """How long nothing at all may be readable, before the run ends with 74: keep it well below the loader's `timeout_s`."""


@dataclass(slots=True)
class Reading:
    """What a thread is at, for whoever watches it."""

    corpus: int
    chunk: int
    since_s: float
    """On the monotonic clock; infinity while the chunk's shard is brought from elsewhere, which has deadlines of its own."""


class Reader:
    """The corpora of one plan. ``read`` may be called from many threads."""

    def __init__(self, dealt: DealtPlan, datasets: Sequence[Readable], config: RetryConfig) -> None:
        self._dealt, self._datasets, self._config = dealt, datasets, config
        self._fetch: list[Callable[[int], None]] = [getattr(dataset, "fetch", _nothing_to_fetch) for dataset in datasets]
        self._shard: list[Callable[[int], int]] = [getattr(dataset, "shard_of", _no_shard) for dataset in datasets]
        self._broken: set[tuple[int, int]] = set()
        """(corpus, shard) of which a chunk could not be read: the next one is tried once, until one can be read again."""

    def read(
        self,
        corpus: int,
        corpus_pass: int,
        chunk: int,
        hung: Mapping[tuple[int, int], int],
        note: Callable[[Reading | None], None],
    ) -> tuple[Tokens, Substitution | None, int]:
        """The tokens of a chunk, or of the one that took its place, and how often a read was tried again.

        ``hung``: (corpus, chunk) -> reads that have been given up because they did not return. ``note`` is told what is being
        read, and None in a pause. Raises what the last read raised where the plan has no substitutes, and DataBudgetError where
        none of them is whole either. Where storage does not answer at all, that is no reason for another chunk: reads are tried
        for ``outage_s``, and StorageError is raised then, as it is where a server does not give a shard.
        """
        tokens, failure, retried = self._attempts(corpus, chunk, hung.get((corpus, chunk), 0), note)
        if tokens is not None:
            return tokens, None, retried
        assert failure is not None
        return self._stand_in(Substitution(corpus, corpus_pass, chunk, -1, _said(failure)), failure, retried, hung, note)

    def _stand_in(
        self,
        wanted: Substitution,
        failure: Exception,
        retried: int,
        hung: Mapping[tuple[int, int], int],
        note: Callable[[Reading | None], None],
    ) -> tuple[Tokens, Substitution | None, int]:
        """Another chunk for one that cannot be read; or, after an outage, that chunk after all. As ``read``."""
        corpus, chunk = wanted.corpus, wanted.chunk
        substitutes = self._dealt.plan.substitutes(corpus, wanted.corpus_pass, chunk)
        if not substitutes:
            raise failure
        ends, pause_s = time.monotonic() + self._config.outage_s, self._config.pause_s
        while True:
            failures = [failure]
            for candidate in substitutes:
                tokens, failed, again = self._attempts(corpus, candidate, hung.get((corpus, candidate), 0), note)
                retried += again
                if tokens is None:
                    assert failed is not None
                    failures.append(failed)
                    continue
                if not isinstance(failure, CorpusError):  # the storage answers again: perhaps for the chunk itself, too
                    own, _, again = self._attempts(corpus, chunk, hung.get((corpus, chunk), 0), note)
                    retried += again + 1
                    if own is not None:
                        return own, None, retried
                longest = int(self._dealt.lengths[corpus][chunk])  # the slot has no room for more
                return tokens[:longest], replace(wanted, substitute=candidate), retried
            if all(isinstance(each, CorpusError) for each in failures):
                said = f"{self.name(corpus, chunk)} cannot be read, and none of {len(substitutes)} others in its place"
                raise DataBudgetError(f"{said}: {failure}") from failure
            if time.monotonic() > ends:
                said = f"nothing of corpus {corpus} could be read for {self._config.outage_s:g} s (data.loader.retry.outage_s)"
                raise StorageError(f"{said}: {failure}") from failure
            note(None)
            time.sleep(min(pause_s, 5.0))
            pause_s, retried = 2 * pause_s, retried + 1
            tokens, again_failed, again = self._attempts(corpus, chunk, hung.get((corpus, chunk), 0), note)
            retried += again
            if tokens is not None:
                return tokens, None, retried
            failure = again_failed or failure

    def _attempts(
        self, corpus: int, chunk: int, hung: int, note: Callable[[Reading | None], None]
    ) -> tuple[Tokens | None, Exception | None, int]:
        failure: Exception | None = None
        if hung:
            limit = self._config.read_timeout_s
            failure = StorageError(f"{self.name(corpus, chunk)}: no answer within {limit:g} s, {hung} times. Check the storage")
        place = (corpus, self._shard[corpus](chunk))
        attempts = 1 if place in self._broken else self._config.attempts
        for attempt in range(hung, attempts):
            if attempt:
                note(None)
                time.sleep(self._config.pause_s * 2 ** (attempt - 1) * random.uniform(1.0, 1.5))
            if lost := self._bring(corpus, chunk, note):
                return None, lost, attempt
            note(Reading(corpus, chunk, time.monotonic()))
            try:
                tokens = self._datasets[corpus].read(chunk)
            except FAILURES as error:
                failure = error
                continue
            self._broken.discard(place)
            return tokens, None, attempt
        self._broken.add(place)
        return None, failure, max(attempts - 1, hung)

    def _bring(self, corpus: int, chunk: int, note: Callable[[Reading | None], None]) -> CorpusError | None:
        """Has the shard of a chunk brought to this machine; what is wrong with it, where that has shown. Raises StorageError."""
        note(Reading(corpus, chunk, math.inf))
        try:
            self._fetch[corpus](chunk)
        except CorpusError as error:
            return error
        return None

    def name(self, corpus: int, chunk: int) -> str:
        """What a chunk is called in messages."""
        return f"chunk {chunk} of corpus {corpus} ({self._datasets[corpus].digest})"


def _no_shard(chunk: int) -> int:
    """Of a corpus that says nothing of shards: every chunk fails for itself."""
    return -1 - chunk


def _nothing_to_fetch(chunk: int) -> None:
    """Of a corpus that lies here."""


def _said(error: Exception) -> str:
    """An error in few words: for input, what was found where."""
    if isinstance(error, CorpusError):
        return f"{error.field}: {error.value}"
    return str(error) or type(error).__name__
