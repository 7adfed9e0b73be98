"""Who may write into a folder: one job at a time, known by a number that only grows.

::

    RUN/lease-00000007.json     {"token": 7, "host": ..., "pid": ..., "since": ..., "beat": 12, "released": false, ...}

The job with the highest token holds the folder. A token is taken by a hard link to its name, which only one process can make,
over NFS too. The holder writes a new beat every few seconds from a thread of its own, so that a long step does not look like a
death; a step that hangs therefore keeps the lease while its process lives, and whoever watches for hangs has to end it.

Whether a holder is dead is asked of ``/proc`` where it ran on this machine, and answered at once. Of another machine nothing is
known but its beats: it counts as dead when the file has not changed for ``patience_s`` of the *observer's* monotonic clock. No
clock of one machine is ever compared with that of another.

A holder that was only suspended finds the higher token when it wakes: it calls `Lease.check` before it publishes anything.
Between that look and the rename that follows there is no lock: being suspended for ``patience_s`` exactly there is not caught.

The fencing token is that of Kleppmann, "How to do distributed locking" (2016).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import re
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from scaletrain import durable, outside
from scaletrain.errors import LeaseLostError, OccupiedError

BEAT_S = 5.0
"""Between two signs of life."""
PATIENCE_S = 90.0
"""Many beats, and more than the 60 s for which an NFS client may show an old state of a folder."""

_NAME = re.compile(r"lease-(\d{8,})\.json")
_IMPORTED_S = time.monotonic()
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True)
class Holder:
    """What the file of a lease says."""

    token: int
    host: str
    place: str
    """The running system and its process numbers: where it is the same as here, ``pid`` can be looked up."""
    pid: int
    started: int
    """Clock ticks from boot to the start of the process: a number that is used again has another one."""
    user: str
    since: str
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"{self.user}@{self.host} (pid {self.pid}, since {self.since})"


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest lease in a folder, as it was read."""

    token: int
    data: bytes
    holder: Holder | None
    """None for a file that cannot be read as one."""


class Lease:
    """Held from `claim` to `release`, or to the end of the process."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self._folder, self._holder = folder, holder
        self.lost = False
        """Whether a beat has found that another job took the folder over."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)

    @property
    def token(self) -> int:
        return self._holder.token

    def check(self) -> None:
        """Raises LeaseLostError where another job has taken the folder over."""
        seen = newest(self._folder)
        if seen is None or seen.token != self.token:
            self.lost = True
            who = seen.holder if seen else None
            raise LeaseLostError(
                str(self._folder),
                f"lease {self.token}",
                f"{who or 'another job'} holds it as lease {seen.token}" if seen else "its lease was removed",
                "This job was taken for dead and stops without having changed anything; look at the other one",
            )

    def release(self) -> None:
        """Lets go. The file stays: the next token follows from it."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)
        self._write(released=True)

    def _live(self) -> None:
        while not self._over.wait(BEAT_S):
            self._write()

    def _write(self, *, released: bool = False) -> None:
        """A sign of life. One that cannot be written is not the end: the next may be, and `check` finds what came of it."""
        with contextlib.suppress(OSError):
            seen = newest(self._folder)
            self.lost = self.lost or seen is None or seen.token != self.token
            if not self.lost:
                self._holder = replace(self._holder, beat=self._holder.beat + 1, released=released)
                # Beats are not synced, which may take long beside a save: after a power cut an old one is as good as a new one.
                temporary = _put(self._folder / _name(self.token), _written(self._holder), sync=released)
                temporary.replace(self._folder / _name(self.token))
                if released:
                    durable.sync(self._folder)

    def _take(self) -> bool:
        """Gives the folder to this job; False where another one was quicker."""
        path = self._folder / _name(self.token)
        if not _create(path, _written(self._holder)):
            return False
        durable.sync(self._folder)
        seen = newest(self._folder)
        if seen is None or seen.token != self.token:  # ours was swept, or comes after one that was taken and swept meanwhile
            path.unlink(missing_ok=True)
            return False
        for token in _tokens(self._folder):
            if token < self.token:
                (self._folder / _name(token)).unlink(missing_ok=True)
                for left in self._folder.glob(f".{_name(token)}-*.tmp"):
                    left.unlink(missing_ok=True)
        self._thread.start()
        return True


def claim(folder: Path, *, field: str = "output", patience_s: float = PATIENCE_S) -> Lease:
    """Takes the lease of ``folder``, which is made if need be; of a dead holder over, without anything to clean up.

    Nothing is changed before it is certain that nobody holds it. Raises OccupiedError (for what the user calls ``field``) where
    somebody does, and OSError.
    """
    while True:
        seen = newest(folder)
        if seen is not None:
            _require_free(folder, field, seen, patience_s)
        folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(folder, _myself((seen.token if seen else 0) + 1))
        if lease._take():
            return lease


def newest(folder: Path) -> Seen | None:
    """The lease with the highest token, whoever holds it; None where there never was one."""
    while tokens := _tokens(folder):
        with contextlib.suppress(FileNotFoundError):  # swept since it was listed: then there is a newer one
            data = (folder / _name(max(tokens))).read_bytes()
            return Seen(max(tokens), data, _read(data))
    return None


def _require_free(folder: Path, field: str, seen: Seen, patience_s: float) -> None:
    """Returns once ``seen`` is certainly over. Raises OccupiedError where it is not."""
    holder = seen.holder
    if holder is not None and (holder.released or holder.place == _place() != ""):
        if not holder.released and _runs(holder):
            raise _occupied(folder, field, holder)
        return
    who = holder or "an unknown job"
    print(f"{folder}: {who} has the lease, on another machine; watching it for {patience_s:g} s", file=sys.stderr, flush=True)
    deadline = time.monotonic() + patience_s
    waiting = True
    while waiting:
        time.sleep(min(1.0, patience_s / 10))
        waiting = time.monotonic() < deadline  # before the look: what is seen after the deadline still counts
        now = newest(folder)
        if now is None:
            return
        if now.data != seen.data:
            if now.holder is not None and now.holder.released:
                return
            raise _occupied(folder, field, now.holder)
    print(f"{folder}: no sign of life from {who}; its lease is taken over", file=sys.stderr, flush=True)


def _occupied(folder: Path, field: str, holder: Holder | None) -> OccupiedError:
    rule = f"{holder or 'another job'} is writing there, and only one job at a time may"
    return OccupiedError(field, str(folder), rule, "Wait for that job, end it, or choose another folder")


def _tokens(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _name(token: int) -> str:
    return f"lease-{token:08d}.json"


def _create(path: Path, data: bytes) -> bool:
    """Makes the file with its content in one step; False where it is there."""
    temporary = _put(path, data, sync=True)
    try:
        os.link(temporary, path)
    except OSError as error:
        if temporary.stat().st_nlink == 2:  # NFS: it was done, and the answer was lost
            return True
        if isinstance(error, FileExistsError):
            return False
        if error.errno not in _NO_LINKS:
            raise
        return _create_exclusively(path, data)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_exclusively(path: Path, data: bytes) -> bool:
    """Where there are no hard links. Who reads it before it is whole sees an unknown holder, and then that it moves."""
    try:
        with path.open("xb") as stream:
            stream.write(data)
    except FileExistsError:
        return False
    return True


def _put(path: Path, data: bytes, *, sync: bool) -> Path:
    """The data in a file beside ``path``, under a name that no other process or machine has."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    with temporary.open("xb") as stream:
        stream.write(data)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
    return temporary


def _written(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode() + b"\n"


def _read(data: bytes) -> Holder | None:
    try:
        return Holder(**outside.parse_json(data))
    except (ValueError, TypeError):
        return None


def _myself(token: int) -> Holder:
    pid = os.getpid()
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Holder(token, socket.gethostname(), _place(), pid, _start_ticks(pid) or 0, _user(), since)


def _place() -> str:
    """This machine since its last boot, and the namespace of its process numbers; empty where there is no ``/proc``."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _runs(holder: Holder) -> bool:
    """Whether the process of a holder of this machine still runs; one that is stopped does, a zombie does not."""
    return _start_ticks(holder.pid) == holder.started


def _start_ticks(pid: int) -> int | None:
    """Of a process, from boot; None for one that has ended (proc_pid_stat(5), fields 3 and 22)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def age_s() -> float:
    """Seconds since this process was started, imports and all."""
    ticks = _start_ticks(os.getpid())
    if ticks is None:
        return time.monotonic() - _IMPORTED_S
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container that runs under a number without a name
        return f"user {os.getuid()}"
