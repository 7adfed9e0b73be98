"""The quickstart, stopped: its stage has saved, no process is left, and the same command goes on, with the same settings only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scaletrain.train.metrics import read_jsonl


def wait_until(true: Callable[[], bool], timeout_s: float = 120.0) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def of(folder: Path) -> list[str]:
    """Command lines of the processes that have something to do with a folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it has ended
    return [line for line in lines if str(folder) in line]


def test_a_quickstart_that_is_stopped_leaves_a_saved_run_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scaletrain", "quickstart", f"output={tmp_path / 'out'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "out" / "pretrain" / "metrics.jsonl"
    running = subprocess.Popen([*command, "steps=100000"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        assert wait_until(lambda: metrics.exists() and any(line["kind"] == "step" for line in read_jsonl(metrics)))
        running.send_signal(signal.SIGTERM)  # to it alone, as a scheduler does
        assert running.wait(timeout=60) == 75
    finally:
        running.kill()
        _, errors = running.communicate()
    assert errors.decode().splitlines()[-1] == ("error: stopped on request in `scaletrain launch`; the same command continues it")
    assert json.loads((tmp_path / "out" / "pretrain" / "exit.json").read_text())["code"] == 75
    assert of(tmp_path) == []

    again = subprocess.run([*command, "steps=6"], env=environment, capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stderr) == (
        65,
        f"error: output: got '{tmp_path / 'out'}'; an earlier quickstart has left pretrain.yaml there with other settings. "
        "Use its settings, or another folder: output=FOLDER\n",
    )
