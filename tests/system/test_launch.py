"""Real processes: a job is the same run under our launcher and DeepSpeed's, and ends as it should however it is ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaletrain import checkpoint
from scaletrain.train.metrics import read_jsonl
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent
STEPS = 24
TIMEOUT_S = 150.0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def written(prepared: Path, output: Path) -> Path:
    """The configuration file of a short run on two ranks that puts its files under ``output``."""
    data = {"corpora": [{"path": str(prepared)}], "chunks_per_step": 8, "slots": {"micro_batch_tokens": 512}}
    tree = tiny.settings(prepared, output, steps=STEPS, data=data)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return file


def launch(file: Path) -> list[str]:
    return [sys.executable, "-m", "scaletrain", "launch", "backend.ranks=2", "--", "pretrain", "--config", str(file)]


def environment(**changes: str) -> dict[str, str]:
    """As a user has it in the shell of an activated virtual environment; test runners leave no trace of ranks in it."""
    return {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", **changes}


def run(command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=TIMEOUT_S)


def losses(output: Path) -> list[str]:
    """Loss of every step to the bit."""
    return [line["loss_hex"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "step"]


def record(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "exit.json").read_text())
    return found


@pytest.fixture(scope="module")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The losses of a run under our launcher that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(launch(written(prepared, output)))
    assert done.returncode == 0, done.stderr
    assert record(output) == {"code": 0, "step": STEPS, "reason": "done", "lease": 1}
    found = losses(output)
    assert len(found) == len(set(found)) == STEPS
    return found


# ------------------------------------------------------------------------------------------------ a job in mid-run


def alive(number: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def descendants(number: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return [*children, *(below for child in children for below in descendants(child))]


def rank_of(number: int) -> str | None:
    found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{number}/environ").read_bytes())
    return found[1].decode() if found else None


def wait_until(true: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


@contextmanager
def in_training(file: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launched job that has taken its first step, with the numbers of all its processes; nothing of it is left afterwards."""
    output = file.with_suffix("")
    job = subprocess.Popen(launch(file), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    processes = []
    try:
        stepped = wait_until(lambda: job.poll() is not None or ((output / "metrics.jsonl").exists() and bool(losses(output))))
        assert stepped and job.poll() is None, "it ended before it could be interrupted"
        processes = descendants(job.pid)
        yield job, processes
    finally:
        job.kill()
        job.communicate()
        assert wait_until(lambda: not any(alive(number) for number in processes), timeout_s=10)


def test_a_request_to_stop_is_a_checkpoint_and_75_and_the_same_command_ends_as_if_nothing_had_happened(
    prepared: Path, tmp_path: Path, expected: list[str]
) -> None:
    file = written(prepared, tmp_path / "run")
    with in_training(file) as (job, processes):
        job.terminate()
        assert job.wait(timeout=30) == 75
        assert not any(alive(number) for number in processes)
    stopped = record(tmp_path / "run")
    assert stopped["code"] == 75
    assert 1 <= stopped["step"] < STEPS
    assert [each.progress.step for each in checkpoint.find(tmp_path / "run" / "checkpoints")] == [stopped["step"]]
    assert losses(tmp_path / "run") == expected[: stopped["step"]]
    done = run(launch(file))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == expected
    assert record(tmp_path / "run") == {"code": 0, "step": STEPS, "reason": "done", "lease": 2}


def test_a_rank_that_is_killed_ends_the_job_within_seconds_and_leaves_no_process(prepared: Path, tmp_path: Path) -> None:
    with in_training(written(prepared, tmp_path / "run")) as (job, processes):
        assert sorted(filter(None, map(rank_of, processes))) == ["0", "1"]
        os.kill(next(number for number in processes if rank_of(number) == "1"), signal.SIGKILL)
        assert job.wait(timeout=20) == 76
        assert not any(alive(number) for number in processes)
        assert job.stderr is not None
        assert "rank 1 ended with SIGKILL" in job.stderr.read()
    left = tmp_path / "run" / "exit.json"
    assert not left.exists() or record(tmp_path / "run")["code"] == 76


# ------------------------------------------------------------------------------------------- DeepSpeed's own launcher

COMPILERS = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|cpp|nvcc)(-[\d.]+)?")


@pytest.fixture
def no_compiler(tmp_path: Path) -> str:
    """A PATH with the virtual environment and the system's programs, but no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {program.name: program for place in ("/usr/bin", "/bin") for program in Path(place).iterdir()}
    for name, program in programs.items():
        if not COMPILERS.fullmatch(name):
            (folder / name).symlink_to(program)
    for compiler in ("c++", "g++", "cc", "gcc", "clang"):
        assert shutil.which(compiler, path=f"{TOOLS}{os.pathsep}{folder}") is None
    return f"{TOOLS}{os.pathsep}{folder}"


def test_deepspeeds_own_launcher_gives_the_same_losses_and_needs_no_compiler(
    prepared: Path, tmp_path: Path, expected: list[str], no_compiler: str
) -> None:
    """Through the script for sites that start their jobs with it, with an empty cache of compiled extensions that stays empty."""
    file, built = written(prepared, tmp_path / "run"), tmp_path / "extensions"
    command = [str(ROOT / "launch" / "deepspeed.sh"), str(file), f"output={tmp_path / 'other'}"]
    done = run(command, RANKS="2", PATH=no_compiler, TORCH_EXTENSIONS_DIR=str(built), CC="", CXX="")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "other") == expected
    assert record(tmp_path / "other") == {"code": 0, "step": STEPS, "reason": "done", "lease": 1}
    assert not (tmp_path / "run").exists()
    assert not list(built.rglob("build.ninja"))
