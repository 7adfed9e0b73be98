"""Reads ahead along a dealt plan: the slots of one rank, collated in threads before the step that runs them.

Threads are handed numbers of steps and hand back finished batches; they keep nothing between steps and draw nothing, so how
many there are and how far they read ahead changes when a batch is ready, never what is in it. A position is where training is,
not how far reading got: to resume, a new loader starts at a step.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from scaletrain.data.collate import Collate, Slot
from scaletrain.data.ledger import DIGEST_BITS, Substitution, replaced, sample_digest
from scaletrain.data.plan import Picks
from scaletrain.data.reading import Readable, Reader, RetryConfig
from scaletrain.data.slots import DealtPlan, slots_of_rank
from scaletrain.data.workers import Work, Workers
from scaletrain.errors import StorageError

LOOK_EVERY_S = 0.25
"""How often a loop that waits for its data looks whether a thread hangs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How a rank reads its data; no setting here changes what is read, as long as it can be read."""

    workers: Annotated[int, Field(ge=0)] = 2
    """Threads that read and collate; 0 does it in between steps, without a deadline."""
    read_ahead_steps: Annotated[int, Field(ge=1)] = 2
    """Steps that are kept ready beyond the one that runs; memory grows with it. Each is the work of one thread."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Longest wait for a step's data: well below the time after which the other ranks give this one up."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """What happens when a chunk cannot be read."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one rank runs in one step: a slot per round, as many on every rank."""

    step: int
    slots: tuple[Slot, ...]
    counts: dict[str, int]
    """Term of the loss -> its count in these slots; a step's loss divides by the sum over all ranks."""
    real_tokens: int
    padded_tokens: int
    fillers: int
    """Slots with no sample, over all ranks."""
    samples_after: int
    """Samples that the whole run has consumed when this step is done."""
    digest: int = 0
    """Of the samples in these slots, as `ledger.sample_digest` makes it."""
    substitutions: tuple[Substitution, ...] = ()
    """Samples of these slots that could not be read, and what stands in their place."""
    retried: int = 0
    """Reads that had to be tried again."""
    wait_s: float = 0.0
    """How long the training loop waited for this batch."""

    @property
    def rounds(self) -> list[str]:
        """Signature of each round."""
        return [slot.signature for slot in self.slots]


class Loader:
    """Batches of rank ``rank`` of ``world``; ``datasets`` in the order of the plan's corpora. Close it, or use it in a ``with``.

    Raises ConfigError at once for a chunk that fits no slot, ValueError for datasets that are not the plan's.
    """

    def __init__(
        self,
        dealt: DealtPlan,
        datasets: Sequence[Readable],
        collate: Collate,
        rank: int,
        world: int,
        config: LoaderConfig | None = None,
    ) -> None:
        if len(datasets) != len(dealt.lengths):
            raise ValueError(f"{len(datasets)} datasets for a plan of {len(dealt.lengths)} corpora")
        dealt.check_chunks()
        self._dealt, self._collate, self._rank, self._world = dealt, collate, rank, world
        self._digests = [dataset.digest for dataset in datasets]
        self._config = config or LoaderConfig()
        self._reader = Reader(dealt, datasets, self._config.retry)
        self._workers: Workers[Batch] = Workers(self._config.workers)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what is under way; threads end by themselves, also one that a dead disk holds. May be called twice."""
        self._workers.close()

    def batches(self, start_step: int = 0, end_step: int | None = None) -> Iterator[Batch]:
        """The batches of steps ``start_step`` to ``end_step`` (the plan's end) in order.

        Raises what reading raised where nothing could stand in, with the step in a note of the exception, and StorageError when a
        batch takes over ``timeout_s``.
        """
        steps = iter(range(start_step, self._dealt.steps if end_step is None else end_step))
        pending: deque[Work[Batch]] = deque()
        try:
            while True:
                if self._workers.closed:
                    raise ValueError("this loader is closed")
                while len(pending) <= self._config.read_ahead_steps and (step := next(steps, None)) is not None:
                    pending.append(Work(step, self._build))
                    self._workers.put(pending[-1])
                if not pending:
                    return
                yield self._wait(pending)
        finally:
            for work in pending:
                work.future.cancel()

    def _wait(self, pending: deque[Work[Batch]]) -> Batch:
        began, limit = time.perf_counter(), self._config.timeout_s
        if not self._config.workers:
            pending[0].run()
        while not wait([pending[0].future], min(limit, LOOK_EVERY_S)).done:
            if time.perf_counter() - began > limit:
                work = pending[0]
                raise StorageError(
                    f"step {work.step}: its data was not ready after {limit:g} s (data.loader.timeout_s), "
                    f"still {self._doing(work)}. Check the storage; raise the limit if it is only slow"
                )
            # Those of later steps too: a thread that hangs there is one less for this step.
            for number, work in enumerate(pending):
                if work.hangs(limit_s := self._config.retry.read_timeout_s):
                    said = (
                        f"step {work.step}: {self._doing(work)} has taken over {limit_s:g} s (data.loader.retry.read_timeout_s)"
                    )
                    warnings.warn(f"{said}; the thread is left to itself, and another one reads again", stacklevel=2)
                    pending[number] = self._workers.replace(work)
        return replace(pending.popleft().future.result(), wait_s=time.perf_counter() - began)

    def _build(self, work: Work[Batch]) -> Batch:
        try:
            return self._batch(work)
        except BaseException as error:
            error.add_note(f"while the data of step {work.step} was made ready, {self._doing(work)}")
            raise

    def _doing(self, work: Work[Batch]) -> str:
        if reading := work.reading:
            return f"reading {self._reader.name(reading.corpus, reading.chunk)}"
        return "collating" if work.future.running() else "waiting for a thread"

    def _batch(self, work: Work[Batch]) -> Batch:
        dealt = self._dealt.slots(work.step)
        numbers = slots_of_rank(len(dealt), self._rank, self._world)
        mine = [dealt[number] if number < len(dealt) else dealt[0][:0] for number in numbers]
        chunks, substitutions, retried = self._read(mine, work)
        if substitutions:
            mine = [
                replaced(picks, [each for slot, each in substitutions if slot == number]) for number, picks in enumerate(mine)
            ]
        slots = []
        for number, samples, arrays in zip(numbers, mine, chunks, strict=True):
            slots.append(self._collate(work.step, number, samples, arrays))
        counts: dict[str, int] = {}
        for slot in slots:
            for term, count in slot.counts.items():
                counts[term] = counts.get(term, 0) + count
        return Batch(
            step=work.step,
            slots=tuple(slots),
            counts=counts,
            real_tokens=sum(slot.real_tokens for slot in slots),
            padded_tokens=sum(slot.padded_tokens for slot in slots),
            fillers=len(numbers) * self._world - sum(len(samples) > 0 for samples in dealt),
            samples_after=self._dealt.plan.samples_before(work.step + 1),
            digest=sum(sample_digest(self._digests, slot.samples) for slot in slots) % (1 << DIGEST_BITS),
            substitutions=tuple(each for _, each in substitutions),
            retried=retried,
        )

    def _read(
        self, slots: Sequence[Picks], work: Work[Batch]
    ) -> tuple[list[list[NDArray[np.int32]]], list[tuple[int, Substitution]], int]:
        """The token arrays of each slot, read in the order in which they lie on the disk; by slot, what was replaced; retries."""
        chunks: list[list[NDArray[np.int32]]] = [[np.empty(0, np.int32)] * len(picks) for picks in slots]
        substitutions, retried = [], 0
        wanted = (
            (corpus, chunk, corpus_pass, slot, place)
            for slot, picks in enumerate(slots)
            for place, (corpus, chunk, corpus_pass) in enumerate(
                zip(picks.corpus.tolist(), picks.chunk.tolist(), picks.corpus_pass.tolist(), strict=True)
            )
        )
        for corpus, chunk, corpus_pass, slot, place in sorted(wanted):
            chunks[slot][place], instead, again = self._reader.read(corpus, corpus_pass, chunk, work.hung, work.note)
            retried += again
            if instead is not None:
                substitutions.append((slot, instead))
        work.note(None)
        return chunks, substitutions, retried
