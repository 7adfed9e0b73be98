"""Reads ahead along a dealt plan: the slots of one rank, collated in threads before the step that runs them.

Threads are handed numbers of steps and hand back finished batches; they keep nothing between steps and draw nothing, so how
many there are and how far they read ahead changes when a batch is ready, never what is in it. A position is where training is,
not how far reading got: to resume, a new loader starts at a step.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from scaletrain.data.collate import Collate, Slot
from scaletrain.data.plan import Picks
from scaletrain.data.slots import DealtPlan, slots_of_rank
from scaletrain.errors import StorageError

CLOSE_PATIENCE_S = 1.0
"""How long closing a loader waits for threads to finish what they are at; then they are left to themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How a rank reads its data; no setting here changes what is read."""

    workers: Annotated[int, Field(ge=0)] = 2
    """Threads that read and collate; 0 does it in between steps, without a deadline."""
    read_ahead_steps: Annotated[int, Field(ge=1)] = 2
    """Steps that are kept ready beyond the one that runs; memory grows with it. Each is the work of one thread."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Longest wait for a step's data: well below the time after which the other ranks give this one up."""


class Readable(Protocol):
    """A corpus as the loader sees it."""

    @property
    def digest(self) -> str: ...

    def read(self, chunk: int) -> NDArray[np.int32]: ...


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
        self._dealt, self._datasets, self._collate = dealt, datasets, collate
        self._rank, self._world = rank, world
        self._config = config or LoaderConfig()
        self._threads = _Threads(self._config.workers)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what is under way; threads end by themselves, also one that a dead disk holds. May be called twice."""
        self._threads.close()

    def batches(self, start_step: int = 0, end_step: int | None = None) -> Iterator[Batch]:
        """The batches of steps ``start_step`` to ``end_step`` (the plan's end) in order.

        Raises what reading raised, with the step in a note of the exception, and StorageError when a batch takes over
        ``timeout_s``.
        """
        steps = iter(range(start_step, self._dealt.steps if end_step is None else end_step))
        pending: deque[_Work] = deque()
        try:
            while True:
                if self._threads.closed:
                    raise ValueError("this loader is closed")
                while len(pending) <= self._config.read_ahead_steps and (step := next(steps, None)) is not None:
                    pending.append(_Work(step, self._build))
                    self._threads.put(pending[-1])
                if not pending:
                    return
                yield self._wait(pending.popleft())
        finally:
            for work in pending:
                work.future.cancel()

    def _wait(self, work: _Work) -> Batch:
        began, limit = time.perf_counter(), self._config.timeout_s
        if not self._config.workers:
            work.run()
        try:
            batch = work.future.result(limit)
        except TimeoutError:
            if not work.future.done():
                raise StorageError(
                    f"step {work.step}: its data was not ready after {limit:g} s (data.loader.timeout_s), "
                    f"still {self._doing(work)}. Check the storage; raise the limit if it is only slow"
                ) from None
            batch = work.future.result()  # it came in that moment, or reading itself ran into a time limit
        return replace(batch, wait_s=time.perf_counter() - began)

    def _build(self, work: _Work) -> Batch:
        try:
            return self._batch(work)
        except BaseException as error:
            error.add_note(f"while the data of step {work.step} was made ready, {self._doing(work)}")
            raise

    def _doing(self, work: _Work) -> str:
        if work.reading is None:
            return "collating" if work.future.running() else "waiting for a thread"
        corpus, chunk = work.reading
        return f"reading chunk {chunk} of corpus {corpus} ({self._datasets[corpus].digest})"

    def _batch(self, work: _Work) -> Batch:
        dealt = self._dealt.slots(work.step)
        numbers = slots_of_rank(len(dealt), self._rank, self._world)
        mine = [dealt[number] if number < len(dealt) else dealt[0][:0] for number in numbers]
        chunks = self._read(mine, work)
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
        )

    def _read(self, slots: Sequence[Picks], work: _Work) -> list[list[NDArray[np.int32]]]:
        """The token arrays of each slot, read in the order in which they lie on the disk."""
        chunks: list[list[NDArray[np.int32]]] = [[np.empty(0, np.int32)] * len(picks) for picks in slots]
        wanted = (
            (int(corpus), int(chunk), slot, place)
            for slot, picks in enumerate(slots)
            for place, (corpus, chunk) in enumerate(zip(picks.corpus, picks.chunk, strict=True))
        )
        for corpus, chunk, slot, place in sorted(wanted):
            work.reading = (corpus, chunk)
            chunks[slot][place] = self._datasets[corpus].read(chunk)
        work.reading = None
        return chunks


class _Work:
    """One step to make ready: what a thread takes, and what it says it is reading."""

    def __init__(self, step: int, build: Callable[[_Work], Batch]) -> None:
        self.step = step
        self.reading: tuple[int, int] | None = None
        self.future: Future[Batch] = Future()
        self._build = build

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._build(self))
        except BaseException as error:  # whoever waits for the future gets it
            self.future.set_exception(error)


class _Threads:
    """Some threads and a queue of work for them.

    Unlike a ThreadPoolExecutor's they are daemons: a process must be able to end while one hangs in a read that never returns.
    """

    def __init__(self, count: int) -> None:
        self.closed = False
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name=f"loader-{number}", daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def put(self, work: _Work) -> None:
        if self._threads:
            self._queue.put(work)

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                if work := self._queue.get_nowait():
                    work.future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        patience_ends = time.perf_counter() + CLOSE_PATIENCE_S
        for thread in self._threads:
            thread.join(max(patience_ends - time.perf_counter(), 0.0))
        self._threads = []

    def _serve(self) -> None:
        while work := self._queue.get():
            work.run()
