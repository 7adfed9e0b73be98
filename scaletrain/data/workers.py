"""Threads that make steps ready, and can be left behind when they hang.

Unlike a ThreadPoolExecutor's they are daemons: a process must be able to end while one is held by a read that never returns. And
such a thread can be replaced: nothing can stop it, but another one takes up its work.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from scaletrain.data.reading import Reading

CLOSE_PATIENCE_S = 1.0
"""How long closing waits for threads to finish what they are at; then they are left to themselves."""

T = TypeVar("T")


class Work(Generic[T]):
    """One step to make ready: what a thread takes, and what it says it is reading."""

    def __init__(self, step: int, build: Callable[[Work[T]], T], hung: Counter[tuple[int, int]] | None = None) -> None:
        self.step, self.build = step, build
        self.reading: Reading | None = None
        self.hung: Counter[tuple[int, int]] = hung or Counter()
        """(corpus, chunk) -> reads of it that did not return."""
        self.future: Future[T] = Future()
        self.left_behind = False

    def note(self, reading: Reading | None) -> None:
        """A thread says what it is reading."""
        self.reading = reading

    def hangs(self, limit_s: float) -> bool:
        """Whether a read has been under way for longer than ``limit_s``."""
        reading = self.reading
        return reading is not None and not self.future.done() and time.monotonic() - reading.since_s > limit_s

    def run(self) -> None:
        """Builds what the future gives, unless it was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.build(self))
        except BaseException as error:  # whoever waits for the future gets it
            self.future.set_exception(error)


class Workers(Generic[T]):
    """``count`` threads and a queue of work for them."""

    def __init__(self, count: int) -> None:
        self.closed = False
        self.replaced = 0
        self._queue: queue.SimpleQueue[Work[T] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self._start()

    def put(self, work: Work[T]) -> None:
        """Has a thread do it when one is free."""
        if self._threads:
            self._queue.put(work)

    def replace(self, work: Work[T]) -> Work[T]:
        """The same work again by another thread, because ``work`` hangs in a read; what it hung in is counted."""
        reading = work.reading
        hung = Counter(work.hung)
        if reading is not None:
            hung[reading.corpus, reading.chunk] += 1
        again = Work(work.step, work.build, hung)
        work.left_behind = True
        self.replaced += 1
        self._start(again)
        return again

    def close(self) -> None:
        """Drops what is under way; may be called twice."""
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

    def _start(self, first: Work[T] | None = None) -> None:
        name = f"loader-{len(self._threads)}"
        thread = threading.Thread(target=self._serve, args=(first,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, work: Work[T] | None) -> None:
        work = work or self._queue.get()
        while work:
            work.run()
            if work.left_behind:  # another thread has taken this one's place
                return
            work = self._queue.get()
