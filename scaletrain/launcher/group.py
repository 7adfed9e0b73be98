"""Processes of this machine that begin and end as one.

A signal to the group reaches every process, one that fails takes the others with it, and none outlives whoever started it, not
even when that is killed. The ranks of a node are such a group, and so are the connections through which others are started.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from scaletrain.errors import PeerLostError, StorageError
from scaletrain.launcher.plan import LOCALHOST, Process
from scaletrain.launcher.watch import Stall, Watch

KEPT_LINES = 50
"""How much of a failed process's last output is shown."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Member:
    """A started process and what it last said (the first of a job speaks for itself)."""

    planned: Process
    process: subprocess.Popen[bytes]
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    code: int | None = None
    """As of subprocess: negative for a signal; None while it runs."""

    def hear(self) -> bool:
        """Keep the last of what it writes; False at the end."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        unfinished = self.tail.pop() if self.tail and not self.tail[-1].endswith(b"\n") else b""
        self.tail.extend((unfinished + chunk).splitlines(keepends=True))
        return bool(chunk)


class Group:
    """Made, started, waited for and ended once.

    A process that has ended stays unreaped until `end`: its number, and with it that of the process group, cannot go to another
    one before the last signal to the group was sent.
    """

    stdin = subprocess.DEVNULL
    """What each process is given to read."""
    settling_s = 0.0
    """Seconds in which a second failure counts as simultaneous with the first."""

    def __init__(
        self,
        processes: Sequence[Process],
        *,
        grace_s: float,
        peer_grace_s: float,
        logs: Path | None = None,
        watch: Watch | None = None,
    ) -> None:
        """``grace_s`` as of a request to stop, ``peer_grace_s`` as of a failure: then those that still run are killed.

        ``logs`` takes the output of all but the first process of a job. ``watch`` notices those that hang.
        """
        self._watch = watch
        self.stall: Stall | None = None
        """Why we ended the group, if a process hung."""
        self.planned, self.grace_s, self.peer_grace_s, self.logs = processes, grace_s, peer_grace_s, logs
        self.members: list[Member] = []
        self.requested: int | None = None
        """The signal that asked the group to stop."""
        self.failed: tuple[Member, ...] = ()
        """Those that were the first to end badly; the others follow from them."""
        self._deadline = self._settled = float("inf")
        self._over = False
        self._files = ExitStack()
        self._ears = selectors.DefaultSelector()

    def start(self) -> None:
        """Start every process. All but the first of a job write into a pipe or a log file. Raises StorageError."""
        for process in self.planned:
            if self.requested is None:
                self._start(process)

    def _start(self, planned: Process) -> None:
        sink: IO[bytes] | int | None = None if planned.rank == 0 else subprocess.PIPE
        if planned.rank > 0 and self.logs is not None:
            sink = self._log(self.logs / f"rank-{planned.rank:05d}.log")
        child = subprocess.Popen(
            planned.argv,
            env={**os.environ, **planned.env, **(self._watch.environment(planned.rank) if self._watch else {})},
            pass_fds=self._watch.descriptors(planned.rank) if self._watch else (),
            stdin=self.stdin,
            stdout=sink,
            stderr=None if sink is None else subprocess.STDOUT,
            process_group=self.members[0].process.pid if self.members else 0,
            preexec_fn=partial(die_with, os.getpid()),
        )
        self.members.append(Member(planned, child))
        if child.stdout is not None:
            os.set_blocking(child.stdout.fileno(), False)
            self.watch(child.stdout, self.members[-1].hear)

    def _log(self, path: Path) -> IO[bytes]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self._files.enter_context(path.open("ab"))
        except OSError as error:
            raise StorageError(f"backend.logs: got {str(path)!r}; must be writable: {error.strerror}") from error

    def watch(self, stream: IO[bytes] | socket.socket, hear: Callable[[], bool]) -> None:
        """Call ``hear`` whenever there is something to read, until it answers False."""
        self._ears.register(stream, selectors.EVENT_READ, hear)

    def wait(self) -> None:
        """Return when every process has ended, by itself or because its time was up."""
        while any(member.code is None for member in self.members):
            self._listen(0.05)
            for member in self.members:
                member.code = self.code_of(member) if member.code is None else member.code
            self._note_failures()
            self._note_stalls()
            if time.monotonic() >= self._deadline:
                self.send(signal.SIGKILL)

    def _note_failures(self) -> None:
        failed, now = tuple(member for member in self.members if member.code), time.monotonic()
        if now >= self._deadline:
            return  # From now on it is we who end them.
        if failed and not self.failed:
            self._settled = now + self.settling_s
            self._deadline = min(self._deadline, now + self.peer_grace_s)
        if not self.failed or now < self._settled:
            self.failed = failed

    def _note_stalls(self) -> None:
        running = {member.planned.rank: member.process.pid for member in self.members if member.code is None}
        if self._watch is None or self.stall or not running or self.failed:
            return  # of those that wait for one that has failed, none is the one that hangs
        stall = self._watch.stalled(list(running))
        if stall:
            self.stall = self._watch.dump(stall, running)
        if self.stall:
            self.cut_short()

    def request_stop(self, number: int) -> None:
        """Pass a signal on to every process; the first one starts the period of grace."""
        if self.requested is None:
            self.requested = number
            self._deadline = min(self._deadline, time.monotonic() + self.grace_s)
        self.send(number)

    def code_of(self, member: Member) -> int | None:
        """The exit code of a process that has ended, without reaping it; None while it runs."""
        state = os.waitid(os.P_PID, member.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return None
        return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status

    def explain(self, member: Member) -> list[str]:
        """How it ended and what it said last."""
        code, here = member.code or 0, member.planned
        name = f"rank {here.rank}" if here.node == LOCALHOST else f"rank {here.rank} on {here.node}"
        said = [f"[rank {here.rank}] {line.decode(errors='replace').rstrip()}" for line in member.tail]
        return [f"error: {name} ended with {f'exit code {code}' if code > 0 else signal_name(-code)}", *said]

    def cut_short(self) -> None:
        """Have `wait` kill what still runs, now."""
        self._deadline = 0.0

    def end(self) -> None:
        """Leave no process behind: members, and what they may have started."""
        Group.send(self, signal.SIGKILL)
        self._over = True
        self._listen(0)
        for member in self.members:
            member.process.wait()
            for stream in filter(None, (member.process.stdin, member.process.stdout)):
                stream.close()
        self._ears.close()
        self._files.close()

    def send(self, number: int) -> None:
        """Send a signal to every process."""
        if self.members and not self._over:
            os.killpg(self.members[0].process.pid, number)

    def _listen(self, timeout_s: float) -> None:
        """Take in what there is to read, so that no pipe fills up."""
        if not self._ears.get_map():
            time.sleep(timeout_s)
            return
        for key, _ in self._ears.select(timeout_s):
            if not key.data():
                self._ears.unregister(key.fileobj)


def die_with(parent: int) -> None:
    """Runs in the new process: have the kernel kill it when its parent goes, however that may be."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It went before the kernel was told.
        os._exit(PeerLostError.exit_code)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal N`` for one without a name."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


@contextmanager
def signals_to(tell: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 go to the processes behind ``tell`` inside: the terminal sends Ctrl-C to this group only.

    A terminal that hangs up asks them to stop as SIGTERM does, unless that was to be ignored (nohup).
    """

    def forward(number: int, frame: FrameType | None) -> None:
        tell(signal.SIGTERM if number == signal.SIGHUP else number)

    heard = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    heard += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
