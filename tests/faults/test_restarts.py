"""F7: a rank dies. Its peers end, the launcher starts the job again, and the run ends as if nothing had been."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scaletrain import checkpoint, heartbeat
from scaletrain.config import decode
from scaletrain.engine import Engine
from scaletrain.launcher import Job, LocalConfig, local
from scaletrain.launcher.restart import Restarts
from scaletrain.launcher.watch import Limits
from scaletrain.recipes import pretrain
from tests import tiny
from tests.faults.table import Add

ROOT = Path(__file__).resolve().parents[2]
QUICK = Restarts(attempts=5, backoff_s=0.05, no_progress=2)
DEATHS = ["exit 1", "SIGKILL", "SIGSEGV", "hangs"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def settings(prepared: Path, output: Path) -> dict[str, Any]:
    return tiny.settings(prepared, output, steps=16, checkpoint={"every_steps": 2, "keep": 2, "asynchronous": False})


def train(tree: dict[str, Any], deaths: list[str], lives: str) -> None:
    """A rank of a run; with the n-th life of the job, rank 1 meets the n-th death, in step 3, 6, 9, ..."""
    before = len(os.listdir(lives))
    if os.environ["RANK"] == "1":
        Path(lives, str(before)).touch()
    forward = Engine._call

    def mortal(self: Engine, inputs: Any) -> Any:
        if os.environ["RANK"] == "1" and before < len(deaths) and self.updates == 3 * (before + 1):
            match deaths[before]:
                case "exit 1":
                    os._exit(1)
                case "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "SIGSEGV":
                    ctypes.string_at(0)
                case "hangs":
                    time.sleep(60)
        return forward(self, inputs)

    Engine._call = mortal  # type: ignore[method-assign]  # in a process of its own
    heartbeat.begin()
    try:
        pretrain.main(decode(pretrain.Config, tree))
    except Exception as error:  # as the command line does it
        sys.exit(getattr(error, "exit_code", 70))


def job(tree: dict[str, Any], deaths: list[str], folder: Path) -> Job:
    lives = folder / "lives"
    lives.mkdir()
    text = f"import json, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.faults.test_restarts import train\n"
    call = f"train(json.loads({json.dumps(tree)!r}), {deaths!r}, {str(lives)!r})"
    return Job(argv=(sys.executable, "-c", text + call), output=Path(tree["output"]))


def attempts(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "attempts.jsonl").read_text().splitlines()]


def test_a_run_whose_ranks_die_ends_as_if_none_had(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: Add
) -> None:
    """Each way to die once, in one job: the same bytes of weights and moments, and the same losses."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert local.run(LocalConfig(ranks=2), job(settings(prepared, whole), [], tmp_path / "a")) == 0
    config = LocalConfig(ranks=2, restarts=QUICK, limits=Limits(forward=2.0, reduce=8.0))
    assert local.run(config, job(settings(prepared, broken), DEATHS, tmp_path / "b")) == 0, capfd.readouterr().err
    left, right = (checkpoint.find(folder / "checkpoints")[0] for folder in (whole, broken))
    assert left.progress.step == right.progress.step == 16
    assert left.manifest["files"] == right.manifest["files"]
    losses = [
        [line["loss_hex"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss_hex" in line]
        for folder in (whole, broken)
    ]
    assert losses[0] == losses[1]
    rows = attempts(broken)
    assert [row["code"] for row in rows] == [76] * 4 + [0]
    assert [row["stands"] for row in rows] == [f"checkpoints/step-{step:08d}" for step in (2, 6, 8, 12, 16)]
    assert re.match(r"rank 1 gave no sign of life for 2\.[0-9] s, in forward", rows[3]["reason"])
    assert all(row["reason"] for row in rows)
    for death, row, taken in zip(DEATHS, rows, (3, 6, 9, 12), strict=False):
        lost = taken - int(row["stands"][-8:])
        fault(
            fault="F10" if death == "hangs" else "F7",
            injected=f"one rank of two: {death}; restarted",
            outcome="exact",
            detect_s=float(rows[3]["reason"].split(" for ")[1].split()[0]) if death == "hangs" else None,
            lost_steps=lost,
        )


SCRIPT = """
import os, pathlib, sys, time
run = pathlib.Path({run!r})
count = len(list(run.glob("life-*")))
(run / f"life-{{count}}").write_text(str(time.monotonic()))
{progress}
sys.exit({code})
"""


def script(run: Path, code: int, progress: str = "") -> Job:
    """One rank without torch, that notes when it lived."""
    run.mkdir()
    return Job(argv=(sys.executable, "-S", "-c", SCRIPT.format(run=str(run), code=code, progress=progress)), output=run)


def lives(run: Path) -> list[float]:
    return [float((run / f"life-{n}").read_text()) for n in range(len(list(run.glob("life-*"))))]


def test_a_job_that_does_not_get_on_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    restarts = Restarts(attempts=9, backoff_s=0.01, no_progress=3)
    assert local.run(LocalConfig(restarts=restarts), script(tmp_path / "run", 70)) == 70
    assert len(lives(tmp_path / "run")) == 3
    assert "error: 3 attempts in a row have ended at its beginning; it is given up" in capfd.readouterr().err


def test_a_job_that_gets_on_is_started_as_often_as_it_is_allowed_with_longer_and_longer_waits(tmp_path: Path) -> None:
    progress = "(run / 'checkpoints' / f'step-{count:08d}').mkdir(parents=True)"
    restarts = Restarts(attempts=3, backoff_s=0.2, longest_backoff_s=0.5, no_progress=2)
    assert local.run(LocalConfig(restarts=restarts), script(tmp_path / "run", 74, progress)) == 74
    found = lives(tmp_path / "run")
    waits = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert len(waits) == 3
    assert all(wait >= least for wait, least in zip(waits, (0.2, 0.4, 0.5), strict=True)), waits
    assert [row["stands"] for row in attempts(tmp_path / "run")] == [f"checkpoints/step-{n:08d}" for n in range(4)]


@pytest.mark.parametrize("code", [0, 66, 72, 75, 77, 78])
def test_some_ends_are_final(tmp_path: Path, code: int) -> None:
    record = f'(run / "exit.json").write_text(\'{{"code": {code}, "step": 3, "reason": "test"}}\')'
    assert local.run(LocalConfig(restarts=QUICK), script(tmp_path / "run", code, record)) == code
    assert [(row["code"], row["step"], row["reason"]) for row in attempts(tmp_path / "run")] == [(code, 3, "test")]


def test_a_job_that_was_asked_to_stop_is_not_started_again(tmp_path: Path) -> None:
    """Whoever asked knows when it may go on."""
    progress = "os.kill(os.getppid(), 15); time.sleep(60)"
    assert local.run(LocalConfig(restarts=QUICK), script(tmp_path / "run", 1, progress)) == 128 + 15
    assert len(lives(tmp_path / "run")) == 1


def test_a_job_that_was_refused_leaves_nothing_and_is_not_started_again(tmp_path: Path) -> None:
    """The folder may be that of another job, which runs."""
    assert local.run(LocalConfig(restarts=QUICK), script(tmp_path / "run", 65)) == 65
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["life-0"]


@pytest.mark.parametrize("code", [1, 2, 139])
def test_a_code_that_is_not_ours_is_a_crash(tmp_path: Path, code: int) -> None:
    assert local.run(LocalConfig(restarts=Restarts(attempts=1, backoff_s=0.01)), script(tmp_path / "run", code)) == code
    assert len(lives(tmp_path / "run")) == 2


def test_an_old_record_is_not_taken_for_that_of_an_attempt(tmp_path: Path) -> None:
    job = script(tmp_path / "run", 76)
    (tmp_path / "run/exit.json").write_text('{"code": 76, "step": 500, "reason": "long ago"}')
    assert local.run(LocalConfig(restarts=Restarts(attempts=1, backoff_s=0.01)), job) == 76
    assert [(row["step"], row["reason"]) for row in attempts(tmp_path / "run")] == [(None, None)] * 2


def test_what_is_permitted_once_is_not_permitted_again(tmp_path: Path) -> None:
    """Started again with --fresh, a job would throw away what it has just saved."""
    text = "import pathlib, sys\nwith open(sys.argv[1], 'a') as file: print(*sys.argv[2:], file=file)\nsys.exit(76)"
    argv = (sys.executable, "-S", "-c", text, str(tmp_path / "said"), "pretrain", "--fresh", "steps=5")
    job = Job(argv=argv, output=None, once_only=frozenset({"--fresh"}))
    assert local.run(LocalConfig(restarts=Restarts(attempts=2, backoff_s=0.01)), job) == 76
    assert (tmp_path / "said").read_text().splitlines() == ["pretrain --fresh steps=5", "pretrain steps=5", "pretrain steps=5"]


def test_a_request_to_stop_between_two_starts_is_requeue(tmp_path: Path) -> None:
    job = script(tmp_path / "run", 76)
    code = f"""
import sys
from pathlib import Path
from scaletrain.launcher import Job, LocalConfig, local
from scaletrain.launcher.restart import Restarts
config = LocalConfig(restarts=Restarts(attempts=3, backoff_s=60))
sys.exit(local.run(config, Job(argv={job.argv!r}, output=Path({str(job.output)!r}))))
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert launcher.stderr is not None
        while "started again in 60 s" not in (line := launcher.stderr.readline()):
            assert line, "it has ended"
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=10) == 75
    finally:
        launcher.kill()
        launcher.communicate()
    assert len(lives(tmp_path / "run")) == 1
