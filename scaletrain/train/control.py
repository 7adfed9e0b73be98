"""How a run ends: on request, at its end, or by an error, and who is told.

A decision is never one rank's. A signal sets a flag; the flags are summed in the all-reduce that opens every step and every pass
of an evaluation, so that all ranks stop at the same place. The truth of how a run ended is ``RUN/exit.json``, written by rank 0:
launchers lose exit codes. Only the job that holds the folder's lease writes it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated

import torch
from pydantic import Field

from scaletrain import dist, durable, heartbeat, lease
from scaletrain.errors import (
    ConfigError,
    InputError,
    LeaseLostError,
    PeerLostError,
    RefusedError,
    RequeueError,
    ScaletrainError,
    StorageError,
    UndecidedError,
)
from scaletrain.lease import PATIENCE_S, Lease

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_MARGIN = 1.5
"""Times the longest save so far: what is kept free for the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlConfig:
    """How long a job may run, and how it shares its folder with others."""

    wall_clock_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds from the start of rank 0 after which the job has to be over: it saves and stops before, to be started again (exit
    code 75). Set it to the time limit of the queue; null: none."""
    grace_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds between a request to stop and SIGKILL, as the launcher (`backend.grace_s`) or the queue has them: a save that takes
    longer than two thirds of it is warned of."""
    patience_s: Annotated[float, Field(gt=0)] = PATIENCE_S
    """Seconds without a sign of life (there is one every 5 s) after which a job of another machine, which held the folder, counts
    as dead. Below 60, NFS may show a living one as dead."""

    def __post_init__(self) -> None:
        if self.wall_clock_s is not None and self.wall_clock_s <= self.grace_s:
            rule = f"it must be longer than control.grace_s ({self.grace_s:g}), which is kept free for a first save"
            raise ConfigError("control.wall_clock_s", self.wall_clock_s, rule, "Allow more time, or less for a save")


class StopRequest:
    """Whether this rank was asked to stop, by a signal, or (rank 0) by the clock. A second signal of any kind quits at once."""

    def __init__(self, config: ControlConfig | None = None) -> None:
        self.config = config or ControlConfig()
        self.agreed = False
        """Set, on all ranks at the same place, once any of them was asked."""
        self.lost: Callable[[], bool] = lambda: False
        """Whether the job has lost its folder, as far as this rank knows: it has to stop then, too."""
        self._signalled = False
        self._longest_save_s = 0.0
        self._longest_gap_s = 0.0
        self._asked_at_s: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    @property
    def requested(self) -> bool:
        """Whether this rank asks the others to stop. To be read wherever they can agree on it: what lies between is measured."""
        return self._signalled or self.lost() or self._time_is_up()

    def _time_is_up(self) -> bool:
        """On rank 0: whether a save from the next occasion on might come too late. Clocks of other ranks are not asked."""
        if self.config.wall_clock_s is None or dist.rank() != 0:
            return False
        now = time.monotonic()
        if self._asked_at_s is not None:
            self._longest_gap_s = max(self._longest_gap_s, now - self._asked_at_s)
        self._asked_at_s = now
        needed_s = self.config.grace_s  # until a save has been measured from its beginning to the disk
        if self._longest_save_s:  # twice: the last one may have to wait for one that is under way
            needed_s = SAVE_MARGIN * (2 * self._longest_save_s + self._longest_gap_s)
        return lease.age_s() + needed_s > self.config.wall_clock_s

    def ask(self) -> bool:
        """Whether any rank was asked, the same on all. Collective."""
        self.agreed = dist.sum_vector([float(self.requested)])[0] > 0
        return self.agreed

    def check(self) -> None:
        """Between two parts of the work, where nothing is lost: raises RequeueError on all ranks if any was asked. Collective."""
        self.ask()
        self.require_not_agreed("between two parts of its work")

    def require_not_agreed(self, where: str) -> None:
        """Raises RequeueError once the ranks have agreed to stop."""
        if self.agreed:
            raise RequeueError(f"stopped on request {where}; the same command continues it")

    @contextmanager
    def saving(self, longest_s: Callable[[], float] | None = None) -> Iterator[None]:
        """Around a save: how long saves take decides when the clock asks, and whether the grace is long enough.

        ``longest_s`` says how long the longest so far has taken in all, where it goes on after the training has; 0: none is over.
        """
        began_s, before_s = time.monotonic(), self._longest_save_s
        with heartbeat.section("save"):
            yield
        self._asked_at_s = time.monotonic()
        blocked_s = self._asked_at_s - began_s
        whole_s = blocked_s if longest_s is None else longest_s()
        if whole_s:
            self._longest_save_s = max(before_s, blocked_s, whole_s)
        needed_s, grace_s = SAVE_MARGIN * self._longest_save_s, self.config.grace_s
        if dist.rank() == 0 and needed_s > grace_s and self._longest_save_s > before_s:
            warnings.warn(
                f"control.grace_s: got {grace_s:g}; a checkpoint took {self._longest_save_s:.1f} s, and with a margin it needs "
                f"{needed_s:.1f} s, so that one after a request to stop may be killed in the middle. Raise the launcher's "
                "backend.grace_s (or the queue's) and control.grace_s, or save to a faster disk",
                stacklevel=3,
            )


class Session:
    """One run in its folder: joins the ranks, and leaves behind how it ended."""

    device: torch.device
    """Of this rank."""

    def __init__(self, output: Path, device: str, stop: StopRequest | None = None) -> None:
        """``device``: ``auto``, ``cpu`` or ``cuda``. ``stop`` of a job that needs the folder for itself: it takes the lease."""
        self._output = output
        self._wanted = device
        self._stop = stop
        self.lease: Lease | None = None
        """Of the folder, on rank 0 of a job that takes it."""
        self.step = 0
        """Steps taken so far, for ``exit.json``."""

    def __enter__(self) -> Session:
        self._first = dist.place().rank == 0
        self._records = self._first and self._stop is None
        refusal = self._take_folder() if self._first else None
        try:
            self.device = dist.device(self._wanted)
            dist.start(self.device)
            dist.raise_together(refusal, "making the run's folder")
        except ScaletrainError as error:
            self._leave(error.exit_code, _said(error))
            raise
        return self

    def _take_folder(self) -> ScaletrainError | None:
        """Takes the run's folder and forgets how an earlier start in it ended; returns what stands in the way."""
        try:
            if self._stop is not None:
                self.lease = lease.claim(self._output, patience_s=self._stop.config.patience_s)
                self._records = True
                held = self.lease
                self._stop.lost = lambda: held.lost
            else:
                self._output.mkdir(parents=True, exist_ok=True)
                probe = self._output / f".write-{os.getpid()}"
                probe.touch()
                probe.unlink()
            (self._output / "exit.json").unlink(missing_ok=True)
        except ScaletrainError as error:
            return error
        except OSError as error:
            reason, what = error.strerror or str(error), str(self._output)
            return StorageError(f"output: got {what!r}; it cannot be written ({reason}). Choose one that this user can write")
        return None

    def check(self) -> None:
        """To be called on rank 0 before anything is published. Raises LeaseLostError where another job has the folder now."""
        if self.lease is not None:
            self.lease.check()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._meet("all was done")
            self._leave(0, "done")
        elif isinstance(error, ScaletrainError):
            if isinstance(error, RequeueError):
                self._meet(str(error))
            self._leave(error.exit_code, _said(error))
        elif (lost := dist.lost_peer(error)) is not None:
            self._leave(lost.exit_code, str(lost))
            raise lost from error
        else:
            self._leave(ScaletrainError.exit_code, "".join(traceback.format_exception_only(kind, error)).strip())
        if error is None or isinstance(error, (InputError, RequeueError, RefusedError, UndecidedError)):
            dist.stop()  # after any other error the peers may be gone, and leaving the group would wait for them

    def _meet(self, done: str) -> None:
        """The last barrier: whoever gets through it knows that all have done their part, in a folder that was theirs to the end.

        Raises PeerLostError, and an error with the exit code of LeaseLostError.
        """
        lost_folder: LeaseLostError | None = None
        try:
            self.check()
        except LeaseLostError as error:
            lost_folder = error
        try:
            with heartbeat.section("end"):
                dist.raise_together(lost_folder, "keeping the folder")
        except PeerLostError as error:
            lost = PeerLostError(f"{done}; a rank was lost at the last barrier: {error}")
            self._leave(lost.exit_code, str(lost))
            raise lost from error

    def _leave(self, code: int, reason: str) -> None:
        """The record, where the folder is this job's, and then the folder."""
        if not self._records:
            return
        record = {"code": code, "step": self.step, "reason": reason}
        try:
            self.check()
            if self.lease is not None:
                record["lease"] = self.lease.token
            self._output.mkdir(parents=True, exist_ok=True)
            durable.write(self._output / "exit.json", (json.dumps(record) + "\n").encode())
        except LeaseLostError as lost:
            print(f"warning: exit.json was not written: {lost}", file=sys.stderr)
        except OSError as failure:
            print(f"warning: {self._output / 'exit.json'} could not be written: {failure}", file=sys.stderr)
        if self.lease is not None:
            self.lease.release()


def _said(error: ScaletrainError) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])
