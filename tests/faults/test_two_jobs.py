"""Two jobs on one folder: the second is refused, or takes over from one that is dead; never do both write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaletrain import checkpoint, dist, lease
from scaletrain.commit import folder
from scaletrain.config import decode
from scaletrain.recipes import pretrain
from scaletrain.recipes.pretrain import Run
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny
from tests.faults.table import Add

STEPS = 6
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def settings(prepared: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return tiny.settings(prepared, output, **{"steps": STEPS, "checkpoint": {"every_steps": 2, "keep": 9}, **changes})


def command(tree: dict[str, Any], *before: str) -> list[str]:
    """The command line of a pretraining, its settings written beside its folder."""
    file = Path(f"{tree['output']}.yaml")
    file.write_text(yaml.safe_dump(tree))
    return [sys.executable, "-m", "scaletrain", *before, "pretrain", "--config", str(file)]


def environment() -> dict[str, str]:
    """Of a job of its own, started by one that is a rank."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lease, which beats."""
    found = [file for file in folder.rglob("*") if file.is_file() and "lease-" not in file.name]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def at_save(tree: dict[str, Any], step: int, then: Any) -> None:
    """One rank of a run, of which rank 0 does something before it saves ``step``."""
    save = Run.save

    def interrupted(self: Run, number: int, **named: Any) -> None:
        if number == step and dist.rank() == 0:
            then()
        save(self, number, **named)

    Run.save = interrupted  # type: ignore[method-assign]  # in a process of its own
    pretrain.main(decode(pretrain.Config, tree))


# --------------------------------------------------------------------------------------------------------- both are alive


def first(tree: dict[str, Any], second: list[str], said: str) -> None:
    """A rank of the first job, which starts the second one, through the launcher, while it runs."""
    output = Path(tree["output"])

    def start_second() -> None:
        before = contents(output)
        done = subprocess.run(second, env=environment(), capture_output=True, text=True)
        Path(said).write_text(json.dumps([done.returncode, done.stderr, contents(output) == before, len(before)]))

    at_save(tree, 4, start_second)


def test_a_second_job_is_refused_and_the_first_one_does_not_notice(prepared: Path, tmp_path: Path, fault: Add) -> None:
    tree = settings(prepared, tmp_path / "run")
    second = command(tree, "launch", "backend.ranks=1", "backend.restarts.attempts=1", "--")
    ranks.run(first, 2, {"tree": tree, "second": second, "said": str(tmp_path / "said")})
    code, errors, untouched, files = json.loads((tmp_path / "said").read_text())
    assert code == 65, errors
    assert f"error: output: got '{tmp_path / 'run'}'; " in errors
    assert "is writing there, and only one job at a time may. Wait for that job, end it, or choose another folder" in errors
    assert untouched and files > 5
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 0, "step": STEPS, "reason": "done", "lease": 1}
    assert len([line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]) == STEPS
    fault(
        fault="F19", injected="a second job while the first one runs", outcome="65, nothing touched; the first: 0", lost_steps=0
    )


# ---------------------------------------------------------------------------------------------------------- the first is dead


def killed(tree: dict[str, Any]) -> None:
    """Both ranks, in the middle of a save."""
    write = folder.write_file

    def dying(*arguments: Any) -> Any:
        write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    at_save(tree, 4, lambda: setattr(folder, "write_file", dying))


def resumed(tree: dict[str, Any]) -> float:
    began = time.monotonic()
    pretrain.main(decode(pretrain.Config, tree))
    return time.monotonic() - began


def test_after_sigkill_the_next_start_needs_no_clean_up(prepared: Path, tmp_path: Path, fault: Add) -> None:
    tree, whole = settings(prepared, tmp_path / "run"), settings(prepared, tmp_path / "whole")
    outcomes = ranks.attempt(killed, 2, {"tree": tree})
    assert outcomes[0]["status"] == f"signal {signal.SIGKILL:d}"
    took_s = max(ranks.run(resumed, 2, {"tree": tree}))
    ranks.run(resumed, 2, {"tree": whole})
    mine, theirs = (checkpoint.find(tmp_path / name / "checkpoints")[0] for name in ("run", "whole"))
    assert mine.manifest["files"] == theirs.manifest["files"]
    left = sorted(path.name for path in (tmp_path / "run").rglob("*") if path.name.startswith((".", "lease-")))
    assert left == ["lease-00000002.json"]
    fault(fault="F18", injected="SIGKILL of rank 0 in a save", outcome="nothing left, exact", detect_s=took_s, lost_steps=2)


# ---------------------------------------------------------------------------------------------------- the first was suspended

OTHER = """
import json, os, signal, subprocess, sys
pid, lease, told, *command = sys.argv[1:]
os.kill(int(pid), signal.SIGSTOP)
said = json.load(open(lease))
json.dump(said | {"place": "another machine"}, open(lease, "w"))
done = subprocess.run(command, capture_output=True, text=True)
json.dump([done.returncode, done.stderr], open(told, "w"))
os.kill(int(pid), signal.SIGCONT)
"""
"""Suspends the first job, lets its lease be that of another machine, runs the second one to its end, and wakes the first."""


def suspended(tree: dict[str, Any], second: list[str], told: str) -> None:
    output = Path(tree["output"])

    def suspend() -> None:
        path = str(output / "lease-00000001.json")
        subprocess.run([sys.executable, "-c", OTHER, str(os.getpid()), path, told, *second], env=environment(), check=True)
        Path(f"{told}.files").write_text(json.dumps({name: data.hex() for name, data in contents(output).items()}))

    at_save(tree, 4, suspend)


def test_one_that_was_taken_for_dead_stops_before_it_publishes(prepared: Path, tmp_path: Path, fault: Add) -> None:
    tree = settings(prepared, tmp_path / "run", engine={"name": "local"}, control={"patience_s": 1.0})
    arguments = {"tree": tree, "second": command(tree), "told": str(tmp_path / "told")}
    (outcome,) = ranks.attempt(suspended, 1, arguments)
    code, errors = json.loads((tmp_path / "told").read_text())
    assert code == 0, errors
    assert "no sign of life" in errors
    assert (outcome["type"], outcome["exit_code"]) == ("LeaseLostError", 65), outcome
    published = {name: bytes.fromhex(data) for name, data in json.loads((tmp_path / "told.files").read_text()).items()}
    left = {name: data for name, data in contents(tmp_path / "run").items() if "partial" not in name}
    assert left == published
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 0, "step": STEPS, "reason": "done", "lease": 2}
    seen = lease.newest(tmp_path / "run")
    assert seen is not None and seen.token == 2
    fault(fault="F19", injected="SIGSTOP, another job takes over, SIGCONT", outcome="65, nothing published", lost_steps=2)


# ----------------------------------------------------------------------------------------------- a resume that is another run


def test_a_resume_of_another_run_says_all_that_differs(prepared: Path, tmp_path: Path, fault: Add) -> None:
    tree = settings(prepared, tmp_path / "run", steps=2, engine={"name": "local"})
    ranks.run(resumed, 1, {"tree": tree})
    other = tiny.corpus(tmp_path, max_tokens=30, skip=50_000)
    changed = settings(
        other,
        tmp_path / "run",
        steps=2,
        engine={"name": "local"},
        seed=7,
        model={**tiny.MODEL, "hidden": 64},
        optimizer={"learning_rate": 1e-3, "betas": [0.8, 0.9], "weight_decay": 0.2},
    )
    before = contents(tmp_path / "run")
    (outcome,) = ranks.attempt(resumed, 1, {"tree": changed})
    assert (outcome["type"], outcome["exit_code"]) == ("CheckpointError", 65), outcome
    for what in (
        "model: got",
        "seed differs",
        "data.corpora differs",
        "tokenizer differs",
        "optimizer.betas differs",
        "optimizer.weight_decay differs",
    ):
        assert what in outcome["error"], (what, outcome["error"])
    assert "optimizer.learning_rate" not in outcome["error"]
    after = contents(tmp_path / "run")
    assert {name: data for name, data in after.items() if name != "exit.json"} == {
        name: data for name, data in before.items() if name != "exit.json"
    }
    fault(fault="F20", injected="another model, tokenizer, data, optimizer and seed", outcome="65, all named, nothing touched")
