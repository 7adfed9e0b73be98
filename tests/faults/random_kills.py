"""Kills at random moments, and what is found afterwards. The fast driver has no torch: two forked ranks, real files, real syncs.

::

    python -m tests.faults.random_kills KILLS SEED FOLDER      the last line is a JSON object

Two ranks commit one step after another, with some work in between. After a random time one of them, or both, get SIGKILL.
Whatever was on the disk by then must still be there: the newest step that is found is one that was published, or one that just
was about to be, and every byte of it is that of its step. The next two ranks go on from there.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaletrain import commit
from scaletrain.commit import Alone, Boundary, File, Retention
from scaletrain.errors import PeerLostError, ScaletrainError

FILES, FILE_BYTES = 2, 40_000
"""Of each rank, in each step."""
WORK_S = 0.004
"""Between two commits."""
LONGEST_S = 0.15
"""Before a kill."""
PATIENCE_S = 10.0
"""For a rank whose peer is gone."""
BOUNDARIES = list(Boundary)
WORKING = len(BOUNDARIES)


@dataclass
class Tally:
    """What became of the kills."""

    statuses: Counter[str] = field(default_factory=Counter)
    """How the ranks ended, as waitpid says it."""
    phases: Counter[str] = field(default_factory=Counter)
    """What a killed rank was at: between which boundaries, or at work."""
    kills: int = 0
    wrong: list[str] = field(default_factory=list)
    """Where something was lost, or was not what it should be."""
    commits: int = 0

    @property
    def in_a_save(self) -> float:
        """Share of the killed ranks that were inside a save."""
        return 1 - self.phases["at work"] / max(1, sum(self.phases.values()))

    def to_json(self) -> dict[str, Any]:
        order = [f"after {boundary}" for boundary in BOUNDARIES] + ["at work"]
        phases = {name: self.phases[name] for name in order if self.phases[name]}
        return {
            "kills": self.kills,
            "wrong": self.wrong,
            "in a save": round(self.in_a_save, 3),
            "statuses": dict(sorted(self.statuses.items())),
            "phases": phases,
            "commits": self.commits,
        }


class Place:
    """Memory that two ranks and whoever kills them share: what each is at, and the last step that was published."""

    _LAYOUT = struct.Struct("<QQQQ")  # what rank 0 is at, what rank 1 is at, last step published, last step begun

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._LAYOUT.size)

    def put(self, place: int, value: int) -> None:
        struct.pack_into("<Q", self._memory, 8 * place, value)

    def get(self, place: int) -> int:
        return int(struct.unpack_from("<Q", self._memory, 8 * place)[0])

    def phase(self, rank: int) -> str:
        at = self.get(rank)
        return "at work" if at == WORKING else f"after {BOUNDARIES[at]}"


class Line:
    """The other rank, at the other end of a socket."""

    world = 2

    def __init__(self, rank: int, ends: tuple[socket.socket, socket.socket]) -> None:
        self.rank = rank
        ends[1 - rank].close()
        self._other = ends[rank]

    def gather(self, tree: Any) -> list[Any]:
        try:
            data = json.dumps(tree).encode()
            self._other.sendall(struct.pack("<I", len(data)) + data)
            theirs = json.loads(self._exactly(struct.unpack("<I", self._exactly(4))[0]))
        except OSError as error:
            raise PeerLostError(f"rank {self.rank} lost its peer: {error}") from error
        return [theirs, tree] if self.rank else [tree, theirs]

    def raise_together(self, error: Exception | None, what: str) -> None:
        said = self.gather(None if error is None else [str(error), getattr(error, "exit_code", 70)])
        if error is not None:
            raise error
        if found := next(filter(None, said), None):
            shared = ScaletrainError(f"{what} failed on the other rank: {found[0]}")
            shared.exit_code = found[1]
            raise shared

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._other.recv(size - len(data))
            if not part:
                raise PeerLostError(f"rank {self.rank} lost its peer")
            data += part
        return data


def content(rank: int, step: int, number: int) -> bytes:
    """What a rank writes in a step: another thing in every file of every step."""
    seed = hashlib.sha256(f"{rank} {step} {number}".encode()).digest()
    return (seed * (FILE_BYTES // len(seed) + 1))[: FILE_BYTES + step % 7]


def work(folder: Path, start: int, line: Line, place: Place) -> None:
    """Commits the steps after ``start`` until something comes in between."""

    def at(boundary: Boundary) -> None:
        place.put(line.rank, BOUNDARIES.index(boundary))
        if boundary == Boundary.FOLDER_SYNCED:
            place.put(2, place.get(3))

    step = start
    while True:
        step += 1
        place.put(line.rank, WORKING)
        time.sleep(WORK_S)
        if line.rank == 0:
            place.put(3, step)
        data = [content(line.rank, step, number) for number in range(FILES)]
        files = [File(f"rank-{line.rank}-{number}", len(each), [each]) for number, each in enumerate(data)]
        facts = {"format": commit.FORMAT, "version": commit.VERSION, "progress": {"step": step}}

        def manifest(entries: list[commit.Entry], facts: dict[str, Any] = facts) -> dict[str, Any]:
            return {**facts, "files": entries}

        commit.commit(folder / f"step-{step:08d}", line, files, manifest, Retention(keep=2), at)


def fault_of(folder: Path, published: int, begun: int) -> tuple[int, str]:
    """The newest step that is found, and what is wrong with that; the oracle."""
    found = commit.newest(folder, Alone())
    step = found.step if found else 0
    if not published <= step <= begun:
        return step, f"found step {step} where {published} had been published and {begun} begun"
    for entry in found.manifest["files"] if found else ():
        _, rank, number = entry["name"].split("-")
        if (found.folder / entry["name"]).read_bytes() != content(int(rank), step, int(number)):  # type: ignore[union-attr]
            return step, f"{entry['name']} of step {step} is not what was written"
    if found and len(found.manifest["files"]) != 2 * FILES:
        return step, f"step {step} has {len(found.manifest['files'])} files"
    return step, ""


def ended(number: int) -> str:
    """How a process ends, within the patience: as waitpid says it."""
    descriptor = os.pidfd_open(number)
    try:
        if not select.select([descriptor], [], [], PATIENCE_S)[0]:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            return "hung"
    finally:
        os.close(descriptor)
    _, status = os.waitpid(number, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def run(kills: int, seed: int, folder: Path, progress: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """``kills`` kills, one after the other, in one folder of checkpoints."""
    draw, tally, step = random.Random(seed), Tally(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(kills):
        place, ends = Place(), socket.socketpair()
        place.put(2, step)
        place.put(3, step)
        numbers = [_fork(rank, ends, folder, step, place) for rank in range(2)]
        for end in ends:
            end.close()
        time.sleep(draw.uniform(0, LONGEST_S))
        victims = draw.choice([(0,), (1,), (0, 1)])
        for rank in victims:
            os.kill(numbers[rank], signal.SIGKILL)
        statuses = [ended(number) for number in numbers]
        tally.kills += 1
        tally.statuses.update(statuses)
        tally.phases.update(place.phase(rank) for rank in victims)
        # The one that is killed last may have noticed the other's end before.
        allowed = [
            {0: {"signal 9"}, 1: {"signal 9", "exit 76"}}[victims.index(r)] if r in victims else {"exit 76"} for r in (0, 1)
        ]
        if any(status not in fine for status, fine in zip(statuses, allowed, strict=True)):
            tally.wrong.append(f"kill {tally.kills}: the ranks ended with {statuses}")
        before = step
        step, fault = fault_of(folder, place.get(2), place.get(3))
        tally.commits += step - before
        if fault:
            tally.wrong.append(f"kill {tally.kills}: {fault}")
        progress(tally)
    return tally


def _fork(rank: int, ends: tuple[socket.socket, socket.socket], folder: Path, step: int, place: Place) -> int:
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        place.put(rank, WORKING)
        work(folder, step, Line(rank, ends), place)
    except ScaletrainError as error:
        code = error.exit_code
    finally:
        os._exit(code)


if __name__ == "__main__":
    assert "torch" not in sys.modules, "the driver is fast because it has no torch"
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])).to_json()))
