"""One job at a time writes into a folder, and one that was taken for dead learns it before it publishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scaletrain import lease
from scaletrain.errors import LeaseLostError, OccupiedError

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import pathlib, sys
from scaletrain import lease
lease.BEAT_S = 0.05
held = lease.claim(pathlib.Path(sys.argv[1]))
print(held.token, flush=True)
sys.stdin.readline()
held.check()
print("published", flush=True)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has taken the lease; on a line of input it checks and then publishes."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        try:
            yield process
        finally:
            process.kill()


def elsewhere(folder: Path) -> None:
    """What the holder has written is now that of a process of another machine, which is silent."""
    seen = lease.newest(folder)
    assert seen is not None
    (folder / f"lease-{seen.token:08d}.json").write_text(json.dumps(json.loads(seen.data) | {"place": "another machine"}))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_tokens_only_grow_and_one_file_stays(tmp_path: Path) -> None:
    for token in (1, 2, 3):
        held = lease.claim(tmp_path / "new")
        assert held.token == token
        held.check()
        held.release()
        assert [file.name for file in (tmp_path / "new").iterdir()] == [f"lease-{token:08d}.json"]


def test_the_second_is_told_who_and_since_when_and_changes_nothing(tmp_path: Path) -> None:
    held = lease.claim(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OccupiedError, match=rf"output: .*\w+@\S+ \(pid {os.getpid()}, since 20\d\d-.*\+00:00\)") as caught:
        lease.claim(tmp_path)
    assert caught.value.exit_code == 65
    assert contents(tmp_path) == before
    held.release()


def test_a_killed_holder_of_this_machine_lets_go_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()  # and not reaped: a zombie holds nothing
        wait_until_gone(process.pid)
        began = time.monotonic()
        held = lease.claim(tmp_path)
        assert time.monotonic() - began < 1
        assert held.token == 2
        held.release()


def wait_until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.005)


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path: Path) -> None:
    held = lease.claim(tmp_path)
    seen = lease.newest(tmp_path)
    assert seen is not None
    held.release()
    mine = json.loads(seen.data)
    (tmp_path / "lease-00000001.json").write_text(json.dumps(mine | {"started": mine["started"] - 1}))
    lease.claim(tmp_path).release()


def test_a_holder_of_another_machine_is_refused_as_soon_as_it_shows_life(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        elsewhere(tmp_path)
        threading.Timer(0.3, os.kill, (process.pid, signal.SIGCONT)).start()
        began = time.monotonic()
        with pytest.raises(OccupiedError, match=f"pid {process.pid}"):
            lease.claim(tmp_path, patience_s=20)
        assert time.monotonic() - began < 10


def test_a_suspended_holder_that_was_taken_over_publishes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        elsewhere(tmp_path)
        began = time.monotonic()
        held = lease.claim(tmp_path, patience_s=0.5)
        assert 0.5 <= time.monotonic() - began < 5
        assert f"pid {process.pid}" in capsys.readouterr().err
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.read() == ""
        assert process.wait() != 0
        held.check()
        held.release()


def test_a_beat_of_the_one_that_was_taken_over_does_not_bring_it_back(tmp_path: Path) -> None:
    old = lease.claim(tmp_path)
    elsewhere(tmp_path)
    new = lease.claim(tmp_path, patience_s=0.1)
    before = contents(tmp_path)
    old._write()
    old.release()
    assert old.lost
    with pytest.raises(LeaseLostError, match=r"lease 1.*holds it as lease 2"):
        old.check()
    assert contents(tmp_path) == before
    new.release()


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"token": 4}'])
def test_a_file_that_cannot_be_read_is_waited_for_and_taken_over(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "lease-00000004.json").write_bytes(data)
    held = lease.claim(tmp_path, patience_s=0.1)
    assert held.token == 5
    held.release()


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """Threads of one process, which the operating system does not keep apart either."""
    got: list[lease.Lease] = []
    refused: list[OccupiedError] = []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        try:
            got.append(lease.claim(tmp_path))
        except OccupiedError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


def test_without_hard_links_it_is_as_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    held = lease.claim(tmp_path)
    assert not lease._create(tmp_path / "lease-00000001.json", b"other")
    held.check()
    held.release()
