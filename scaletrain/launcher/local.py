"""All ranks on this machine, in one process group that the launcher owns.

The group ends as one: a signal to the launcher reaches every rank, a rank that fails takes the others with it, and no rank
outlives the launcher, not even when it is killed. How the job ended is what rank 0 recorded in ``RUN/exit.json``; the exit
codes of the processes are asked only where there is no record.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Literal

from pydantic import Field

from scaletrain.errors import PeerLostError, ScaletrainError, StorageError
from scaletrain.launcher.plan import Job, LaunchPlan, Process, on_one_node

KEPT_LINES = 50
"""How much of a failed rank's last output is shown."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalConfig:
    """Ranks on this machine."""

    name: Literal["local"] = "local"
    """This launcher."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """How many processes; on GPUs, one each."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where the ranks meet; 0 picks a free one."""
    grace_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that the ranks have to save and stop after SIGTERM, SIGINT or SIGUSR1, before they are killed."""
    peer_grace_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds that the other ranks have to notice a failed one, before they are killed."""
    logs: Path | None = None
    """Folder for the output of ranks above 0, one file each; without one only the last lines of a failed rank are shown."""


def run(config: LocalConfig, job: Job, *, dry_run: bool = False) -> int:
    """Start the ranks, wait for them, answer with the job's exit code. Raises StorageError."""
    cores = len(os.sched_getaffinity(0))
    port = config.port or free_port()
    plan = on_one_node(job.argv, ranks=config.ranks, port=port, cores=cores, environment=os.environ)
    if dry_run:
        print(plan.text())
        return 0
    record = job.output / "exit.json" if job.output else None
    if record is not None:
        _forget(record)
    group = _Group(plan, config)
    with _signals_to(group):
        group.start()
        try:
            group.wait()
        finally:
            group.end()
    return _outcome(group, record)


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _forget(record: Path) -> None:
    """Remove the record of an earlier launch, which must not be taken for this one's."""
    try:
        record.unlink(missing_ok=True)
    except NotADirectoryError:
        return  # The run folder is not a folder: rank 0 says so better.
    except OSError as error:
        rule = "the record of the last launch is removed before a new one"
        raise StorageError(f"{record}: got {error.strerror!r}; {rule}. Make the run folder writable") from error


@dataclass(slots=True)
class _Rank:
    """A started process and what it last said (rank 0 speaks for itself)."""

    number: int
    process: subprocess.Popen[bytes]
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    code: int | None = None
    """As of subprocess: negative for a signal; None while it runs."""


class _Group:
    """The ranks of one job. Made, started, waited for and ended once.

    A rank that has ended stays unreaped until `end`: its number, and with it that of the process group, cannot go to another
    process before the last signal to the group was sent.
    """

    def __init__(self, plan: LaunchPlan, config: LocalConfig) -> None:
        self.plan, self.config = plan, config
        self.ranks: list[_Rank] = []
        self.requested: int | None = None
        """The signal that asked the job to stop."""
        self.failed: tuple[_Rank, ...] = ()
        """The ranks that were the first to end badly; the others follow from them."""
        self._deadline = float("inf")
        self._over = False
        self._files = ExitStack()
        self._output = selectors.DefaultSelector()

    def start(self) -> None:
        """Start every rank. Ranks above 0 write into a pipe or a log file."""
        for process in self.plan.processes:
            if self.requested is None:
                self._start(process)

    def _start(self, process: Process) -> None:
        sink: IO[bytes] | int | None = None if process.rank == 0 else subprocess.PIPE
        if process.rank > 0 and self.config.logs is not None:
            sink = self._log(self.config.logs / f"rank-{process.rank:05d}.log")
        child = subprocess.Popen(
            process.argv,
            env={**os.environ, **process.env},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=None if sink is None else subprocess.STDOUT,
            process_group=self.ranks[0].process.pid if self.ranks else 0,
            preexec_fn=partial(_die_with, os.getpid()),
        )
        self.ranks.append(_Rank(process.rank, child))
        if child.stdout is not None:
            os.set_blocking(child.stdout.fileno(), False)
            self._output.register(child.stdout, selectors.EVENT_READ, self.ranks[-1])

    def _log(self, path: Path) -> IO[bytes]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self._files.enter_context(path.open("ab"))
        except OSError as error:
            raise StorageError(f"backend.logs: got {str(path)!r}; must be writable: {error.strerror}") from error

    def wait(self) -> None:
        """Return when every rank has ended, by itself or because its time was up."""
        while any(rank.code is None for rank in self.ranks):
            self._listen(0.05)
            for rank in self.ranks:
                rank.code = _code_of(rank.process.pid) if rank.code is None else rank.code
            if not self.failed and any(rank.code for rank in self.ranks):
                self.failed = tuple(rank for rank in self.ranks if rank.code)
                self._deadline = min(self._deadline, time.monotonic() + self.config.peer_grace_s)
            if time.monotonic() >= self._deadline:
                self._signal(signal.SIGKILL)

    def request_stop(self, number: int) -> None:
        """Pass a signal on to every rank; the first one starts the period of grace."""
        if self.requested is None:
            self.requested = number
            self._deadline = min(self._deadline, time.monotonic() + self.config.grace_s)
        self._signal(number)

    def end(self) -> None:
        """Leave no process behind: ranks, and what they may have started."""
        self._signal(signal.SIGKILL)
        self._over = True
        self._listen(0)
        for rank in self.ranks:
            rank.process.wait()
            if rank.process.stdout is not None:
                rank.process.stdout.close()
        self._output.close()
        self._files.close()

    def _signal(self, number: int) -> None:
        if self.ranks and not self._over:
            os.killpg(self.ranks[0].process.pid, number)

    def _listen(self, timeout_s: float) -> None:
        """Take in what ranks above 0 have written, so that no pipe fills up, and keep the last of it."""
        if not self._output.get_map():
            time.sleep(timeout_s)
            return
        for key, _ in self._output.select(timeout_s):
            chunk = os.read(key.fd, 1 << 16)
            if not chunk:
                self._output.unregister(key.fileobj)
                continue
            tail: deque[bytes] = key.data.tail
            unfinished = tail.pop() if tail and not tail[-1].endswith(b"\n") else b""
            tail.extend((unfinished + chunk).splitlines(keepends=True))


def _die_with(launcher: int) -> None:
    """Runs in the new process: have the kernel kill it when the launcher goes, however that may be."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # It went before the kernel was told.
        os._exit(PeerLostError.exit_code)


def _code_of(pid: int) -> int | None:
    """The exit code of a child that has ended, without reaping it; None while it runs."""
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


@contextmanager
def _signals_to(group: _Group) -> Iterator[None]:
    """While the ranks run, SIGTERM, SIGINT and SIGUSR1 are theirs: the terminal sends Ctrl-C to the launcher's group only."""

    def forward(number: int, frame: FrameType | None) -> None:
        group.request_stop(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(group: _Group, record: Path | None) -> int:
    """The exit code of the job: rank 0's record where there is one, else what the processes say."""
    said = _recorded(record)
    if group.requested is None and said != 0:
        _show(group.failed)
    if said is not None:
        return said
    codes = [rank.code or 0 for rank in group.failed]
    if any(code > 0 for code in codes) and not any(code < 0 for code in codes):
        return codes[0]
    if group.requested is not None:
        return 128 + group.requested
    if codes:
        return PeerLostError.exit_code
    if record is None:
        return 0
    print(f"error: {record}: missing; every rank ended with 0, but none recorded the end of the run", file=sys.stderr)
    return ScaletrainError.exit_code


def _show(failed: Sequence[_Rank]) -> None:
    """Say which ranks failed first, with their last words; not those that only repeat what rank 0 has said itself."""
    spoken = {rank.code for rank in failed if rank.number == 0}
    for rank in failed:
        code = rank.code or 0
        if rank.number > 0 and code in spoken:
            continue
        print(f"error: rank {rank.number} ended with {f'exit code {code}' if code > 0 else _name(-code)}", file=sys.stderr)
        for line in rank.tail:
            print(f"[rank {rank.number}] {line.decode(errors='replace').rstrip()}", file=sys.stderr)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _recorded(record: Path | None) -> int | None:
    """The ``code`` in ``exit.json``; None where there is no whole record."""
    try:
        said = json.loads(record.read_bytes()) if record else None
    except (OSError, ValueError):
        return None
    code = said.get("code") if isinstance(said, dict) else None
    return code if isinstance(code, int) and 0 <= code <= 255 else None
