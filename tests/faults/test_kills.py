"""SIGKILL at every boundary of a save: what is resumed then ends as the run that nothing interrupted, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from scaletrain import checkpoint, dist
from scaletrain.checkpoint import CheckpointConfig, Progress, Saver
from scaletrain.commit import Boundary
from tests import ranks, toy
from tests.faults.table import Add

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = {"model": "toy"}
BASE, SAVED, LAST = 4, 6, 26
"""Steps: of the newest checkpoint before the save, of the save that is cut short, and of the end."""

KILLS = {0: list(Boundary), 1: [boundary for boundary in Boundary if boundary.on_all]}
"""Where each rank is killed."""


def progress(step: int) -> Progress:
    return Progress(step, {"phase": 0, "samples": step * 2 * toy.SLOTS}, IDENTITY)


def consumed(step: int) -> list[int]:
    """What identifies the samples of a step, as its slots carry it."""
    return [toy.slot(step, number, head).seed for number, head in enumerate(toy.heads_by_slot(step))]


def train(made: Any, first: int) -> dict[str, Any]:
    """Steps from ``first`` to the end, to the bit."""
    ids = [consumed(step) for step in range(first, LAST)]
    losses = [[loss.hex(), norm.hex()] for loss, norm in toy.steps(made, first, LAST)]
    return {"start": first, "ids": ids, "losses": losses, "digest": toy.digest(made), "updates": made.updates}


def uninterrupted(folder: str) -> dict[str, Any]:
    """Checkpoints of the steps 2 and 4 in ``folder/base``, and the run from the later one to the end."""
    made = toy.make("zero3")
    for first in (0, 2):
        list(toy.steps(made, first, first + 2))
        checkpoint.save(Path(folder, "base"), made, progress(first + 2), keep=2)
    return train(made, BASE)


def resume_then_die(resumed: str | None, broken: str | None, asynchronous: bool, boundary: str, rank: int, report: str) -> Any:
    """Resumes what the kill before has left and trains to the end; then saves in another folder, and dies at ``boundary``."""
    made = toy.make("zero3")
    found = None
    if resumed is not None:
        last = checkpoint.newest(Path(resumed), aside=True)
        assert last is not None
        found = train(made, checkpoint.restore(last, made, IDENTITY).step)
        Path(report, f"{dist.rank()}.json").write_text(json.dumps(found))
    if broken is None:
        return found
    base = checkpoint.newest(Path(broken))
    assert base is not None
    checkpoint.restore(base, made, IDENTITY)
    list(toy.steps(made, BASE, SAVED))

    def at(passed: Boundary) -> None:
        if passed == boundary and dist.rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    if not asynchronous:
        checkpoint.save(Path(broken), made, progress(SAVED), keep=2, at=at)
    else:
        saver = Saver(Path(broken), made, CheckpointConfig(keep=2), at=at)
        saver.save(progress(SAVED))
        list(toy.steps(made, SAVED, SAVED + 1))  # changes what the copy was taken of
        saver.settle()
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("kills")
    return folder / "base", ranks.run(uninterrupted, 2, {"folder": str(folder)})


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("asynchronous", "rank"), [(False, 0), (False, 1), (True, 0), (True, 1)])
def test_killed_at_every_boundary_and_resumed_equals_uninterrupted_to_the_bit(
    base: tuple[Path, list[dict[str, Any]]], tmp_path: Path, asynchronous: bool, rank: int, fault: Add
) -> None:
    """One pair of ranks resumes after a kill, trains 20 steps and more, and meets the next one."""
    template, whole = base
    before: Path | None = None
    for boundary in [*KILLS[rank], None]:
        folder = None if boundary is None else tmp_path / f"{boundary.name}-{rank}"
        if folder is not None:
            shutil.copytree(template, folder)
        report = tmp_path / "report"
        shutil.rmtree(report, ignore_errors=True)
        report.mkdir()
        arguments = {"resumed": before and str(before), "broken": folder and str(folder), "report": str(report)}
        arguments |= {"asynchronous": asynchronous, "boundary": boundary or "", "rank": rank}
        outcomes = ranks.attempt(resume_then_die, 2, arguments)
        if boundary is not None:
            assert outcomes[rank]["status"] == f"signal {signal.SIGKILL:d}", (boundary, rank, outcomes)
        else:
            assert [outcome["status"] for outcome in outcomes] == ["ok", "ok"], outcomes
        if before is not None:
            check(before, report, whole)
            shutil.rmtree(before)
        before = folder
    how = "beside the training" if asynchronous else "that all wait for"
    injected = f"SIGKILL of rank {rank} at each boundary of a save {how}"
    fault(fault="F1", injected=injected, times=len(KILLS[rank]), outcome="exact", lost_steps=SAVED - BASE)


def check(folder: Path, report: Path, whole: list[dict[str, Any]]) -> None:
    """The resumed run is the end of the whole one, from a checkpoint that had been committed when the kill came."""
    boundary, killed = folder.name.rsplit("-", 1)
    durable = list(Boundary).index(Boundary.FOLDER_NAMED)
    published = list(Boundary).index(Boundary[boundary]) >= durable
    for rank in range(2):
        found = json.loads((report / f"{rank}.json").read_text())
        start = found.pop("start")
        # Where rank 1 dies after it has reported, rank 0 may or may not publish before it notices.
        allowed = {SAVED} if published else {BASE, SAVED} if (boundary, killed) == ("REPORTED", "1") else {BASE}
        assert start in allowed, (boundary, killed)
        expected = {name: whole[rank][name][start - BASE :] for name in ("ids", "losses")}
        assert found == {**expected, "digest": whole[rank]["digest"], "updates": LAST}, (boundary, killed)


def test_a_save_with_retention_passes_every_boundary_once_and_in_order(
    base: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """So that each of them is one where the kills above can strike."""
    folder = Path(shutil.copytree(base[0], tmp_path / "checkpoints"))
    passed = ranks.run(boundaries_passed, 2, {"folder": str(folder)})
    assert passed[0] == [boundary.name for boundary in Boundary]
    assert passed[1] == [boundary.name for boundary in Boundary if boundary.on_all]
    assert [set(KILLS[rank]) for rank in (0, 1)] == [set(Boundary), {boundary for boundary in Boundary if boundary.on_all}]


def boundaries_passed(folder: str) -> list[str]:
    made = toy.make("zero3")
    passed: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.save(Path(folder), made, progress(SAVED), keep=2, at=lambda boundary: passed.append(boundary.name))
    return passed


def test_random_kills_of_the_protocol_lose_nothing(tmp_path: Path, fault: Add) -> None:
    """200 of them; ``tools/bench/kills.py`` has thousands, and some of whole runs."""
    command = [sys.executable, "-m", "tests.faults.random_kills", "200", "1", str(tmp_path / "steps")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tally = json.loads(done.stdout)
    print(json.dumps(tally, indent=1))
    assert tally["wrong"] == []
    assert tally["kills"] == 200
    assert tally["in a save"] >= 0.3
    assert set(tally["statuses"]) == {"signal 9", "exit 76"}
    injected = f"SIGKILL of one rank or both at a random time, {tally['in a save']:.0%} in a save"
    fault(fault="F1", injected=injected, times=200, outcome="nothing lost, nothing wrong")
