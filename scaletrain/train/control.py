"""How a run ends: on request, at its end, or by an error, and who is told.

A decision is never one rank's. A signal sets a flag; the flags are summed in the all-reduce that opens every step, so that all
ranks stop after the same step. The truth of how a run ended is ``RUN/exit.json``, written by rank 0: launchers lose exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType, TracebackType

import torch

from scaletrain import dist, durable, heartbeat
from scaletrain.errors import InputError, RefusedError, RequeueError, ScaletrainError, StorageError, UndecidedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this rank was asked to stop. The first signal asks, a second one of the same kind ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        """Set by the loop, on all ranks in the same step, once any of them was asked."""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


class Session:
    """One run in its folder: joins the ranks, and leaves behind how it ended."""

    device: torch.device
    """Of this rank."""

    def __init__(self, output: Path, device: str) -> None:
        """``device``: ``auto``, ``cpu`` or ``cuda``."""
        self._output = output
        self._wanted = device
        self.step = 0
        """Steps taken so far, for ``exit.json``."""

    def __enter__(self) -> Session:
        self._records = dist.place().rank == 0
        try:
            self.device = dist.device(self._wanted)
            dist.start(self.device)
            dist.raise_together(_make_folder(self._output) if self._records else None, "making the run's folder")
        except ScaletrainError as error:
            self._leave(error.exit_code, _said(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            with heartbeat.section("end"):
                dist.barrier()
            self._leave(0, "done")
        elif isinstance(error, ScaletrainError):
            if isinstance(error, RequeueError):
                dist.barrier()
            self._leave(error.exit_code, _said(error))
        elif (lost := dist.lost_peer(error)) is not None:
            self._leave(lost.exit_code, str(lost))
            raise lost from error
        else:
            self._leave(ScaletrainError.exit_code, "".join(traceback.format_exception_only(kind, error)).strip())
        if error is None or isinstance(error, (InputError, RequeueError, RefusedError, UndecidedError)):
            dist.stop()  # after any other error the peers may be gone, and leaving the group would wait for them

    def _leave(self, code: int, reason: str) -> None:
        if not self._records:
            return
        record = {"code": code, "step": self.step, "reason": reason}
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            durable.write(self._output / "exit.json", (json.dumps(record) + "\n").encode())
        except OSError as failure:
            print(f"warning: {self._output / 'exit.json'} could not be written: {failure}", file=sys.stderr)


def _said(error: ScaletrainError) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _make_folder(output: Path) -> StorageError | None:
    """Makes the run's folder and forgets how an earlier start in it ended; returns what stands in the way."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
        (output / "exit.json").unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        return StorageError(f"output: got {str(output)!r}; it cannot be written ({reason}). Choose one that this user can write")
    return None
