"""Random kills of two ranks of real ZeRO-3 that save beside the training: what is resumed is the run's own state, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaletrain import checkpoint, dist
from scaletrain.checkpoint import CheckpointConfig, Progress, Saver
from scaletrain.commit import Boundary
from tests import ranks, toy

STEPS = 200
EVERY = 1
"""Steps between saves."""
LONGEST_S = 1.5
"""From the first step to a kill."""


@dataclass
class Tally:
    """What became of the kills."""

    kills: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        inside = sum(count for name, count in self.phases.items() if name != "at work")
        return {
            "kills": self.kills,
            "wrong": self.wrong,
            "in a save": round(inside / max(1, sum(self.phases.values())), 3),
            "statuses": dict(self.statuses),
            "phases": dict(self.phases),
            "resumed at": self.resumed_at,
        }


def uninterrupted() -> dict[str, str]:
    """Digest of this rank's weights and moments after every step; nothing is saved."""
    made = toy.make("zero3")
    digests = {"0": toy.digest(made)}
    for step in range(STEPS):
        list(toy.steps(made, step, step + 1))
        digests[str(step + 1)] = toy.digest(made)
    return digests


def work(folder: str, digests: list[dict[str, str]], die_s: list[float | None], asynchronous: bool, report: str) -> str:
    """One rank: resumes, checks that it is where the run was, and goes on until it is killed; or to the end."""
    made, rank = toy.make("zero3"), dist.rank()
    last = checkpoint.newest(Path(folder), aside=True)
    first = checkpoint.restore(last, made, {}).step if last else 0
    note = Path(report, str(rank))
    state = {"resumed": first, "right": toy.digest(made) == digests[rank][str(first)], "published": first, "at": "at work"}

    def say(**changes: Any) -> None:
        state.update(changes)
        note.with_suffix(".tmp").write_text(json.dumps(state))
        note.with_suffix(".tmp").rename(note)

    def at(boundary: Boundary) -> None:
        nonlocal under_way
        if boundary == Boundary.BEGUN:
            under_way = asked.popleft()
        if boundary == Boundary.FOLDER_SYNCED:
            say(published=under_way)
        say(at="at work" if boundary == Boundary.PUBLISHED else f"after {boundary}")

    say()
    asked: deque[int] = deque()
    under_way = first
    saver = Saver(Path(folder), made, CheckpointConfig(keep=2, asynchronous=asynchronous), at=at)
    dist.barrier()
    after = die_s[rank]
    if after is not None:
        threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    for step in range(first, STEPS):
        list(toy.steps(made, step, step + 1))
        if toy.digest(made) != digests[rank][str(step + 1)]:
            say(right=False)
        if (step + 1) % EVERY == 0:
            asked.append(step + 1)  # before: the save may be over when the call returns
            saver.save(Progress(step + 1, {"phase": 0, "samples": step + 1}, {}))
    saver.settle()
    return "end"


def run(kills: int, seed: int, folder: Path, progress: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """``kills`` kills; a run that has come to its end is begun anew."""
    draw, tally = random.Random(seed), Tally()
    digests = ranks.run(uninterrupted, 2)
    number = 0
    while tally.kills < kills:
        victims = draw.choice([(0,), (1,), (0, 1)])
        after = draw.uniform(0, LONGEST_S)
        report = folder / "report"
        report.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {"folder": str(folder / f"run-{number}"), "digests": digests, "report": str(report)}
        arguments |= {
            "die_s": [after if rank in victims else None for rank in range(2)],
            "asynchronous": bool(draw.random() < 0.7),
        }
        before = json.loads((report / "0").read_text()) if (report / "0").exists() else {"published": 0}
        outcomes = ranks.attempt(work, 2, arguments, timeout_s=60)
        notes = [json.loads((report / str(rank)).read_text()) for rank in range(2)]
        if not all(note["right"] for note in notes) or notes[0]["resumed"] < before["published"]:
            tally.wrong.append(f"kill {tally.kills}: {notes}, published before: {before['published']}")
        tally.resumed_at.append(notes[0]["resumed"])
        if all(outcome["status"] == "ok" for outcome in outcomes):
            number += 1
            for file in report.iterdir():
                file.unlink()
            continue
        tally.kills += 1
        for rank, outcome in enumerate(outcomes):
            tally.statuses[outcome["status"]] += 1
            if rank in victims:
                tally.phases[notes[rank]["at"]] += 1
                if outcome["status"] != "signal 9":
                    tally.wrong.append(f"kill {tally.kills}: rank {rank} was to be killed and ended with {outcome}")
            elif outcome["status"] == "hung":
                tally.wrong.append(f"kill {tally.kills}: rank {rank} hung")
        progress(tally)
    return tally
