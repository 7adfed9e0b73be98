"""The local launcher with real processes (tiny ones, without torch): how a job ends, and that it ends whole."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scaletrain import lease
from scaletrain.launcher import Job, LocalConfig, local

RECORD = "import json, os; rank = int(os.environ['RANK']); print('rank', rank, 'is here', flush=True)\n"


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-E", "-c", RECORD + text)


def writes(output: Path, code: int) -> str:
    """Rank 0 records ``code``."""
    text = json.dumps({"code": code, "step": 3, "reason": "test"})
    return f"if rank == 0: open({str(output / 'exit.json')!r}, 'w').write({text!r})\n"


def wait_until(true: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@contextmanager
def launcher_process(folder: Path, text: str, **settings: float) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A launcher of two ranks as a process of its own, with the process numbers of its ranks, each of which says so in a file."""
    here = f"import time, signal; open({str(folder)!r} + '/pid' + str(rank), 'w').write(str(os.getpid()))\n"
    call = f"LocalConfig(ranks=2, **{settings!r}), Job(argv={program(text + here + 'time.sleep(60)')!r}, output=None)"
    code = f"import sys; from scaletrain.launcher import *; from scaletrain.launcher import local; sys.exit(local.run({call}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    files = [folder / "pid0", folder / "pid1"]
    try:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        yield process, [int(file.read_text()) for file in files]
    finally:
        process.kill()
        process.communicate()


def gone(number: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_the_record_of_rank_0_is_the_exit_code(tmp_path: Path) -> None:
    job = Job(argv=program(writes(tmp_path, 75) + "raise SystemExit(0 if rank else 9)"), output=tmp_path)
    assert local.run(LocalConfig(ranks=2), job) == 75


def test_the_record_of_an_earlier_launch_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text('{"code": 0, "step": 1, "reason": "done"}')
    assert local.run(LocalConfig(ranks=2), Job(argv=program("raise SystemExit(66)"), output=tmp_path)) == 66


@pytest.mark.parametrize("record", ["not json", "[]", '{"code": "0"}', '{"code": 300}'])
def test_a_record_that_is_not_whole_does_not_count(tmp_path: Path, record: str) -> None:
    text = f"open({str(tmp_path / 'exit.json')!r}, 'w').write({record!r})"
    assert local.run(LocalConfig(ranks=1), Job(argv=program(text), output=tmp_path)) == 70


def test_a_run_that_records_nothing_has_failed_although_its_ranks_ended_with_0(tmp_path: Path) -> None:
    assert local.run(LocalConfig(ranks=2), Job(argv=program(""), output=tmp_path)) == 70


def test_without_a_run_folder_the_ranks_decide() -> None:
    assert local.run(LocalConfig(ranks=2), Job(argv=program(""), output=None)) == 0


def test_a_rank_that_was_killed_is_a_lost_peer(capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        "import signal, time\nif rank == 1: print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    began = time.monotonic()
    assert local.run(LocalConfig(ranks=2, peer_grace_s=0.1), Job(argv=program(text), output=None)) == 76
    assert time.monotonic() - began < 5, "the other rank was waited for"
    assert capfd.readouterr().err.splitlines() == [
        "error: rank 1 ended with SIGKILL",
        "[rank 1] rank 1 is here",
        "[rank 1] last words",
    ]


def test_a_rank_that_fails_ends_the_others_and_its_code_counts() -> None:
    text = "import time\nif rank == 1: raise SystemExit(66)\ntime.sleep(60)"
    assert local.run(LocalConfig(ranks=3, peer_grace_s=0.1), Job(argv=program(text), output=None)) == 66


def test_other_ranks_may_stop_by_themselves_when_one_has_failed(tmp_path: Path) -> None:
    text = f"import time\nif rank == 1: raise SystemExit(1)\ntime.sleep(0.5)\n{writes(tmp_path, 76)}"
    assert local.run(LocalConfig(ranks=2, peer_grace_s=20), Job(argv=program(text), output=tmp_path)) == 76


def test_only_rank_0_speaks_and_logs_take_the_rest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(argv=program("import sys; print('aside', rank, file=sys.stderr)"), output=None)
    assert local.run(LocalConfig(ranks=2, logs=tmp_path / "logs"), job) == 0
    assert capfd.readouterr() == ("rank 0 is here\n", "aside 0\n")
    assert (tmp_path / "logs" / "rank-00001.log").read_text() == "rank 1 is here\naside 1\n"


def test_a_rank_that_says_much_is_not_held_up_and_its_last_lines_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    text = "if rank == 1:\n for n in range(20000): print('line', n)\n raise SystemExit(3)"
    assert local.run(LocalConfig(ranks=2), Job(argv=program(text), output=None)) == 3
    expected = [f"[rank 1] line {n}" for n in range(20000 - local.KEPT_LINES, 20000)]
    assert capfd.readouterr().err.splitlines()[1:] == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["terminated", "warned by the scheduler"])
def test_a_request_to_stop_reaches_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    mark = "lambda *_: (open(os.environ['MARK'] + str(rank), 'w').write('x'), os._exit(75))"
    text = f"import signal; os.environ['MARK'] = {str(tmp_path / 'got')!r}; signal.signal({int(number)}, {mark})\n"
    with launcher_process(tmp_path, text) as (process, ranks):
        process.send_signal(number)
        assert process.wait(timeout=10) == 75
    assert sorted(file.name for file in tmp_path.glob("got*")) == ["got0", "got1"]
    assert all(gone(rank) for rank in ranks)


def test_ranks_that_do_not_stop_are_killed_when_their_time_is_up(tmp_path: Path) -> None:
    text = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    with launcher_process(tmp_path, text, grace_s=0.2) as (process, ranks):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert all(gone(rank) for rank in ranks)


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    with launcher_process(tmp_path, "") as (process, ranks):
        process.kill()
        assert wait_until(lambda: all(gone(rank) for rank in ranks))


def test_what_a_rank_has_started_ends_with_the_job(tmp_path: Path) -> None:
    child = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
    text = child + f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); os._exit(0)"
    assert local.run(LocalConfig(ranks=1), Job(argv=program(text), output=None)) == 0
    number = int((tmp_path / "child").read_text())
    assert wait_until(lambda: gone(number))


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", local.free_port()))


def test_the_record_of_a_job_that_has_the_folder_stays_and_does_not_count(tmp_path: Path) -> None:
    """It ends while this launch, which is refused, is under way."""
    held = lease.claim(tmp_path)
    text = "import json; json.dump({'code': 0, 'lease': 1}, open(%r, 'w')); raise SystemExit(65)"
    job = Job(argv=program(text % str(tmp_path / "exit.json")), output=tmp_path)
    assert local.run(LocalConfig(), job) == 65
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 0, "lease": 1}
    assert local.run(LocalConfig(), Job(argv=program("raise SystemExit(65)"), output=tmp_path)) == 65
    held.release()


def test_signals_have_their_former_meaning_after_a_job() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert local.run(LocalConfig(), Job(argv=program(""), output=None)) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ranks_share_a_process_group_that_is_not_the_launchers(tmp_path: Path) -> None:
    text = f"open({str(tmp_path / 'group')!r} + str(rank), 'w').write(str(os.getpgid(0)))"
    assert local.run(LocalConfig(ranks=2), Job(argv=program(text), output=None)) == 0
    groups = {(tmp_path / f"group{rank}").read_text() for rank in range(2)}
    assert len(groups) == 1 and groups != {str(os.getpgid(0))}
