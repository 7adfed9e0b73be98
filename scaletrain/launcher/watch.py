"""Notices ranks that hang: says which, and in what, keeps their stacks, and has the group ended.

It lives in the process that owns the ranks, so that no lock of theirs can hold it. Each section of a rank's work has a limit of
its own. Ranks wait for each other: once one has been in a section for too long, the one to name is that with the fewest beats.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from scaletrain import heartbeat
from scaletrain.heartbeat import Beat

DUMP_S = 2.0
"""How long ranks may take to write their stacks down."""
SHOWN_LINES = 12
"""Of the stack of the rank that is named; the files have all."""
_IN_A_COLLECTIVE = re.compile(r"torch/distributed/|deepspeed/comm/|deepspeed/.* in wait$", re.MULTILINE)
"""What the stack of a rank shows that waits for others."""

Seconds = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds that a rank may be in one section of its work without a sign of life."""

    start: Seconds = 3600.0
    """Before the run's folder is open: imports, on a cold file system."""
    data: Seconds = 900.0
    """Waiting for a step's samples; the loader's own limit is lower."""
    forward: Seconds = 900.0
    """The model on one slot."""
    backward: Seconds = 900.0
    """The gradient of one slot."""
    reduce: Seconds = 1800.0
    """Waiting for the other ranks: also the longest that one of them may work alone, whatever its own limit."""
    step: Seconds = 900.0
    """The optimizer."""
    evaluation: Seconds = 1800.0
    """One pass of an evaluation, and scoring."""
    load: Seconds = 7200.0
    """Reading a checkpoint."""
    save: Seconds = 7200.0
    """Writing one, as far as training waits for it."""
    other: Seconds = 7200.0
    """Anything else: opening corpora, building the model."""
    end: Seconds = 600.0
    """Leaving the group."""


@dataclass(frozen=True, slots=True)
class Stall:
    """What was found."""

    ranks: tuple[int, ...]
    section: str
    seconds: float
    """Since the last sign of life; or for how long the others have waited."""
    alive: bool = False
    """Whether it is within its own limit, and was only waited for too long."""

    def text(self) -> str:
        who = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, self.ranks))}"
        if self.alive:
            return f"{who} kept the others waiting for {self.seconds:.1f} s, in {self.section}"
        return f"{who} gave no sign of life for {self.seconds:.1f} s, in {self.section}"


class Watch:
    """Over the ranks of this machine. Used in a ``with``, which closes its files: they are in memory, and have no names."""

    def __init__(self, limits: Limits, keep: Path | None, *, alone: bool = True) -> None:
        """``keep``: the folder for the stacks of a rank that hung. ``alone``: whether this machine has all ranks of the job."""
        self._limits = {entry.name: float(getattr(limits, entry.name)) for entry in fields(limits)}
        self._keep, self._alone = keep, alone
        self._began = time.monotonic()
        self._not_before = self._began
        self._files: dict[int, tuple[int, int]] = {}
        """Rank -> descriptors of its beats and of its stacks."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (each for pair in self._files.values() for each in pair):
            os.close(descriptor)
        self._files = {}

    def descriptors(self, rank: int) -> tuple[int, int]:
        """What a rank inherits."""
        if rank not in self._files:
            beat, stack = os.memfd_create(f"beat-{rank}"), os.memfd_create(f"stack-{rank}")
            os.ftruncate(beat, heartbeat.SIZE)
            self._files[rank] = beat, stack
        return self._files[rank]

    def environment(self, rank: int) -> Mapping[str, str]:
        """How it learns of them."""
        return {heartbeat.VARIABLE: ",".join(map(str, self.descriptors(rank)))}

    def stalled(self, running: Sequence[int]) -> Stall | None:
        """Who hangs, of the ranks that are ``running``; None as long as all are within their limits."""
        now = time.monotonic()
        beats = {rank: self._beat(rank) or Beat(0, self._began, "start") for rank in running}
        over = [rank for rank, beat in beats.items() if now - beat.at_s > self._limits[beat.section]]
        if now < self._not_before or not over:
            return None
        last = min(beat.count for beat in beats.values())
        behind = {rank: beat for rank, beat in beats.items() if beat.count == last}
        since = min(beat.at_s for beat in behind.values())
        section = next(beat.section for beat in behind.values() if beat.at_s == since)
        alive = not set(behind) & set(over)
        seconds = now - (min(beats[rank].at_s for rank in over) if alive else since)
        return Stall(tuple(rank for rank, beat in behind.items() if beat.section == section), section, seconds, alive)

    def dump(self, stall: Stall, processes: Mapping[int, int]) -> Stall | None:
        """Has the ranks (number -> process) write their stacks down, keeps them, and says who it was; returns that.

        Of ranks that are equally far, those that wait in a collective are not the cause. If all do, it is on another machine,
        whose watch is given as long again to say so: None.
        """
        stacks = self._stacks(processes)
        waiting = [rank for rank in stall.ranks if _IN_A_COLLECTIVE.search(_innermost(stacks[rank]))]
        if len(waiting) < len(stall.ranks):
            stall = replace(stall, ranks=tuple(rank for rank in stall.ranks if rank not in waiting))
        elif not self._alone and self._not_before == self._began:
            self._not_before = time.monotonic() + self._limits[stall.section]
            return None
        print(f"error: {stall.text()}; the job is ended", file=sys.stderr)
        for line in _innermost(stacks[stall.ranks[0]]).splitlines():
            print(f"[rank {stall.ranks[0]}] {line}", file=sys.stderr)
        if self._keep is not None:
            try:
                self._keep.mkdir(parents=True, exist_ok=True)
                for rank, text in stacks.items():
                    (self._keep / f"rank-{rank:05d}.txt").write_text(text)
                print(f"error: the stacks of all ranks are in {self._keep}", file=sys.stderr)
            except OSError as error:
                print(f"warning: the stacks could not be kept in {self._keep}: {error}", file=sys.stderr)
        return stall

    def _stacks(self, processes: Mapping[int, int]) -> dict[int, str]:
        before = {rank: os.fstat(self._files[rank][1]).st_size for rank in processes}
        for rank, process in processes.items():
            if self._beat(rank) is not None:  # before it listens, the signal would kill it
                os.kill(process, heartbeat.DUMP)
        patience_ends = time.monotonic() + DUMP_S
        while time.monotonic() < patience_ends and not all(self._stack(rank, start) for rank, start in before.items()):
            time.sleep(0.02)
        time.sleep(0.1)  # the last lines
        silent = "it did not answer: not begun, stopped, or held by the kernel\n"
        return {rank: self._stack(rank, start) or silent for rank, start in before.items()}

    def _beat(self, rank: int) -> Beat | None:
        return heartbeat.read(self.descriptors(rank)[0])

    def _stack(self, rank: int, start: int) -> str:
        """What a rank has written from a place on."""
        file = self._files[rank][1]
        return os.pread(file, max(0, os.fstat(file).st_size - start), start).decode(errors="replace")


def _innermost(stacks: str) -> str:
    """The last calls of the thread that answered, the innermost first."""
    lines = stacks.splitlines()
    first = next((place for place, line in enumerate(lines) if line.startswith("Current thread")), 0)
    return "\n".join(lines[first : first + SHOWN_LINES])
