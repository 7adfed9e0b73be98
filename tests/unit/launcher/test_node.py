"""The process that watches over the ranks of a node: it passes signals on, and does not outlive its launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scaletrain.launcher import node
from scaletrain.launcher.node import NOBODY, LookAround, PassOn, RunRanks

BEGIN = "import os, signal, sys, time; rank, folder = os.environ['RANK'], sys.argv[1] + '/'\n"
SAY = "open(folder + 'tmp' + rank, 'w').write(str(os.getpid())); os.rename(folder + 'tmp' + rank, folder + 'pid' + rank)\n"


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def gone(number: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def order(folder: Path, text: str, **changes: Any) -> RunRanks:
    """Two ranks on the second of two nodes, whose job is named after the folder of the test."""
    argv = (sys.executable, "-S", "-E", "-c", BEGIN + text, str(folder))
    settings = {"slots": {"n1": 1, "n2": 2}, "address": "127.0.0.1", "port": 1, "grace_s": 30.0, "peer_grace_s": 0.1}
    return RunRanks(job=str(folder)[-60:], node="n2", argv=argv, **{**settings, **changes})


def started(order: RunRanks) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scaletrain.launcher", node.written(order)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(folder: Path, text: str, **changes: Any) -> Iterator[tuple[subprocess.Popen[str], RunRanks]]:
    """With two ranks that have begun and go on; all have ended afterwards."""
    given = order(folder, text + SAY + "time.sleep(60)", **changes)
    watching = started(given)
    files = [folder / "pid1", folder / "pid2"]
    try:
        assert wait_until(lambda: all(file.exists() for file in files))
        yield watching, given
        assert all(gone(int(file.read_text())) for file in files)
    finally:
        watching.kill()
        watching.wait()
        for stream in filter(None, (watching.stdin, watching.stderr)):
            stream.close()


def told(given: RunRanks, number: int) -> int:
    return node.pass_on(PassOn(job=given.job, node=given.node, number=number))


def test_a_signal_is_passed_on_to_every_rank_and_their_code_is_the_nodes(tmp_path: Path) -> None:
    text = "signal.signal(signal.SIGUSR1, lambda *_: (open(folder + 'got' + rank, 'w').close(), os._exit(75)))\n"
    with running(tmp_path, text) as (watching, given):
        assert told(given, signal.SIGUSR1) == 0
        assert watching.wait(timeout=10) == 75
    assert sorted(file.name for file in tmp_path.glob("got*")) == ["got1", "got2"]


def test_the_answer_to_sigkill_comes_when_the_ranks_are_gone_and_blames_none_of_them(tmp_path: Path) -> None:
    with running(tmp_path, "") as (watching, given):
        assert told(given, signal.SIGKILL) == 0
        assert all(gone(int((tmp_path / f"pid{rank}").read_text())) for rank in (1, 2))
        assert (watching.wait(timeout=10), watching.communicate()[1]) == (128 + signal.SIGKILL, "")


def test_a_signal_that_no_launcher_sends_is_not_passed_on(tmp_path: Path) -> None:
    text = "signal.signal(signal.SIGHUP, lambda *_: os._exit(1))\n"
    with running(tmp_path, text) as (watching, given):
        assert told(given, signal.SIGHUP) == 0
        assert told(given, signal.SIGKILL) == 0
        assert watching.wait(timeout=10) == 128 + signal.SIGKILL


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_another_user_is_not_listened_to(tmp_path: Path) -> None:
    def turned_away(knock: Callable[[socket.socket], None]) -> bool:
        with socket.socket(socket.AF_UNIX) as door, contextlib.suppress(ConnectionError):
            door.connect(node._door(given.job, given.node))
            knock(door)
            return door.recv(1) == b""
        return True  # reset: what was said was not even read

    with running(tmp_path, "") as (watching, given):
        files = len(os.listdir(f"/proc/{watching.pid}/fd"))
        child = os.fork()
        if not child:  # A fork, not a new interpreter, which that user may not be able to start.
            os.setgroups([])
            os.setuid(65534)
            silent = all(turned_away(lambda door: None) for _ in range(20))
            os._exit(7 if silent and turned_away(lambda door: door.sendall(bytes([signal.SIGKILL]))) else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert watching.poll() is None
        assert len(os.listdir(f"/proc/{watching.pid}/fd")) == files
        assert told(given, signal.SIGKILL) == 0


def test_ranks_do_not_outlive_the_line_to_the_launcher(tmp_path: Path) -> None:
    with running(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n") as (watching, _):
        assert watching.stdin is not None
        watching.stdin.close()
        assert watching.wait(timeout=10) == 76


def test_ranks_do_not_outlive_the_process_that_watches_over_them(tmp_path: Path) -> None:
    with running(tmp_path, "") as (watching, _):
        watching.kill()
        assert wait_until(lambda: all(gone(int((tmp_path / f"pid{rank}").read_text())) for rank in (1, 2)))


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 0, []),
        (
            "if rank == '2': print('no', file=sys.stderr); os._exit(66)\n",
            66,
            ["error: rank 2 on n2 ended with exit code 66", "[rank 2] no"],
        ),
        ("if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\n", 137, ["error: rank 1 on n2 ended with SIGKILL"]),
        ("if rank == '1': os._exit(255)\n", 70, ["error: rank 1 on n2 ended with exit code 255"]),
    ],
    ids=["well", "failed", "killed", "with the code that ssh has for itself"],
)
def test_how_the_ranks_ended_is_the_exit_code_and_who_failed_is_named(
    tmp_path: Path, text: str, code: int, said: list[str]
) -> None:
    others = f"if {code}: time.sleep(60)" if text else ""
    watching = started(order(tmp_path, text + others))
    assert watching.wait(timeout=20) is not None  # while the line to it is still open
    _, errors = watching.communicate()
    assert (watching.returncode, errors.splitlines()) == (code, said)


def test_a_job_that_is_not_here_is_said_so() -> None:
    assert node.pass_on(PassOn(job="of nobody", node="n1", number=15, patience_s=0.05)) == NOBODY


def test_a_job_may_take_a_moment_to_appear(tmp_path: Path) -> None:
    given = order(tmp_path, "time.sleep(60)")
    watching = started(given)
    assert node.pass_on(PassOn(job=given.job, node=given.node, number=signal.SIGKILL, patience_s=20)) == 0
    assert watching.wait(timeout=10) == 128 + signal.SIGKILL
    watching.communicate()


def test_an_order_that_cannot_be_read_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert node.main(['{"name": "look-around", "shard": "x"}']) == 65
    assert "no such setting. Did you mean order.shared?" in capsys.readouterr().err


def test_a_node_says_at_which_address_it_was_reached_and_what_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 40000 10.0.0.2 22")
    found = [node.look_around(LookAround(shared=path)) for path in (None, tmp_path, tmp_path / "absent")]
    assert [(sight.address, sight.sees_shared) for sight in found] == [
        ("10.0.0.2", True),
        ("10.0.0.2", True),
        ("10.0.0.2", False),
    ]


def test_the_interface_to_an_address_is_the_one_that_packets_leave_by() -> None:
    assert node.interface_to("127.0.0.1") == "lo"
    assert node.interface_to("no address") is None
