"""Saving while the run goes on: a copy of the state in host memory, and a thread that brings it to the disk.

What blocks the training is the copy. Writing, hashing and syncing let go of the interpreter lock, and the thread speaks with the
other ranks' threads over a group of its own: a save may take longer than the training's collectives may.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from threading import Thread
from types import TracebackType

import torch

from scaletrain import dist
from scaletrain.checkpoint import memory
from scaletrain.checkpoint.manifest import CheckpointConfig, Progress, parts
from scaletrain.checkpoint.pieces import Piece
from scaletrain.checkpoint.writing import State, live, name_of, saved, write
from scaletrain.commit import Hook, Retention
from scaletrain.commit.boundary import passed
from scaletrain.engine import Engine
from scaletrain.errors import PeerLostError, ScaletrainError, StorageError

Alarm = Callable[[int, str], None]
"""Told of a save that failed: its step, and why."""


class Saver:
    """The checkpoints of one run. At most one save is under way: the next one waits for it.

    A save that fails for want of space or by a failing disk is removed, named in a warning and to ``alarm``, and the run goes on;
    ``config.failures`` of them in a row end it. That is decided only where all ranks are together: in `save` and in `settle`.

    With ``config.asynchronous``, a rank holds a copy of its shards' weights and moments in host memory, `copy_bytes` in all, from
    the first save on.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        config: CheckpointConfig,
        alarm: Alarm | None = None,
        *,
        at: Hook = passed,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Collective. Raises ConfigError where the copies do not fit into the memory of a machine. ``check``: see `commit`."""
        self._folder, self._engine, self._config, self._alarm = folder, engine, config, alarm
        self._at, self._check = at, check
        self._flight: _Flight | None = None
        self._copy: torch.Tensor | None = None
        self.longest_s = 0.0
        """The longest that a save has taken so far, from the copy to the rename."""
        self.saved: int | None = None
        """The step of the last save that is known to be on the disk."""
        self._failures = 0
        self._failure: ScaletrainError | None = None
        if config.asynchronous:
            memory.check(copy_bytes(engine))
        self._channel = dist.open_channel(config.save_s)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error, a save that is under way still ends, unless the peers that it needs are lost."""
        lost = isinstance(error, PeerLostError) or dist.lost_peer(error) is not None
        if self._flight is not None and not lost:
            self._flight.join()
        if error is None:
            self._channel.close()

    def save(self, progress: Progress, protected: Collection[int] = (), *, required: bool = False) -> bool:
        """Saves the state as it stands; returns whether that is done or under way. Collective.

        Waits for the save before. The checkpoints of the steps ``protected`` are kept whatever their age. Raises StorageError on
        every rank where too many saves in a row have failed, or one that was ``required``; of the save that begins here, the next
        call says so.
        """
        self._collect()
        final = self._folder / name_of(progress.step)
        if saved(final, progress):
            return True
        state = live(self._engine, progress)
        if self._config.asynchronous:
            state = self._copied(state)
        retention = Retention(self._config.keep, self._config.keep_every_steps, tuple(protected))
        self._flight = _Flight(
            progress.step,
            required,
            lambda: write(final, state, self._channel, retention, self._config.max_file_bytes, self._at, self._check),
        )
        if self._config.asynchronous:
            self._flight.start()
            return True
        self._flight.run()
        return self._collect()

    def wait(self) -> None:
        """Waits until no save is under way; one that failed counts as any other. Collective."""
        self._collect()

    def settle(self) -> None:
        """Waits until the last save is on the disk. Raises StorageError on every rank where it failed. Collective."""
        self._collect()
        if self._failure is not None:
            raise self._failure

    def _collect(self) -> bool:
        """Waits for the save that is under way; whether there was none or it went well."""
        if self._flight is None:
            return True
        flight, self._flight = self._flight, None
        flight.join()
        self.longest_s = max(self.longest_s, flight.ended_s - flight.began_s)
        failure = flight.failure
        if failure is None:
            self._failures, self._failure, self.saved = 0, None, flight.step
            return True
        if not isinstance(failure, ScaletrainError) or failure.exit_code != StorageError.exit_code:
            raise failure
        self._failures, self._failure = self._failures + 1, failure
        if dist.rank() == 0:
            warnings.warn(f"the checkpoint of step {flight.step} was not saved: {failure}", stacklevel=3)
        if self._alarm is not None:
            self._alarm(flight.step, str(failure))
        if flight.required:
            raise failure
        if self._failures >= self._config.failures:
            raise StorageError(f"{self._failures} saves in a row have failed; the last one: {failure}")
        return False

    def _copied(self, state: State) -> State:
        """The same state in this rank's buffer, which the save before does not need any more."""
        if self._copy is None:
            elements = copy_bytes(self._engine) // 4
            self._copy = torch.empty(elements, pin_memory=self._engine.device.type == "cuda")
        pieces, used = [], 0
        for part, name, piece in state.pieces:
            target = self._copy[used : used + piece.values.numel()]
            target.copy_(piece.values, non_blocking=True)
            used += piece.values.numel()
            pieces.append((part, name, Piece(piece.shape, piece.start, target)))
        buffers = {name: value.detach().to("cpu", copy=True) for name, value in state.buffers.items()}
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        return State(pieces, buffers, state.described)


def copy_bytes(engine: Engine) -> int:
    """Host memory that this rank's copy of the state takes: its shards' weights and moments, in fp32."""
    return sum(4 * values.numel() for shard in engine.shards() for _, values in parts(shard))


class _Flight(Thread):
    """One save. As a daemon: a process that has lost its peers ends without waiting for them here."""

    def __init__(self, step: int, required: bool, work: Callable[[], None]) -> None:
        super().__init__(name=f"save-{step}", daemon=True)
        self.step, self.required, self._work = step, required, work
        self.failure: BaseException | None = None
        self.began_s = self.ended_s = time.monotonic()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as failure:
            self.failure = failure
        self.ended_s = time.monotonic()

    def join(self, timeout: float | None = None) -> None:
        if self.ident is not None:  # else it ran in place
            super().join(timeout)
