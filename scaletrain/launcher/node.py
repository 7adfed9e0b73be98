"""What a launcher has done on a node: look around before a job, run the node's ranks, pass a signal on to them.

It is started through ssh or pdsh, which bring no signal across, and leave running what they have started when they end. So the
ranks of a node belong to a process of ours. It takes signals at a door that opens to this user only. Nothing is ever written to
its standard input: when that ends, the launcher has gone, and the ranks go too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

import scaletrain
from scaletrain import config
from scaletrain.errors import PeerLostError, ScaletrainError
from scaletrain.launcher.group import Group, signals_to
from scaletrain.launcher.local import free_port
from scaletrain.launcher.outcome import show
from scaletrain.launcher.plan import defaults, on_nodes
from scaletrain.launcher.watch import Limits, Watch

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL)
"""The signals that a launcher sends."""

NOBODY = 3
"""The exit code where a signal was to be passed on to a job that this node does not have."""

_END_S = 60.0
"""How long killed ranks may take to be gone: those that wait for a disk or a device do not die at once."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_UCRED = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, kw_only=True, slots=True)
class LookAround:
    """Answer with a `Sight`, as one line of JSON."""

    name: Literal["look-around"] = "look-around"
    shared: Path | None = None
    """A file that the launcher has made where all nodes must be able to see it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a node knows about itself."""

    address: str
    """At which the launcher has reached it."""
    port: int
    """A TCP port that is free there."""
    sees_shared: bool
    version: str
    """Of scaletrain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRanks:
    """Run the ranks of one node; the exit code is that of the first that failed, 128 + N where signal N ended it."""

    name: Literal["run-ranks"] = "run-ranks"
    job: str
    node: str
    slots: dict[str, int]
    """Of all nodes of the job."""
    argv: tuple[str, ...]
    address: str
    port: int
    grace_s: float
    peer_grace_s: float
    logs: Path | None = None
    limits: Limits = field(default_factory=Limits)
    stacks: Path | None = None
    """Where the stacks of ranks that hang are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassOn:
    """Pass a signal on to the ranks of a job on this node. SIGKILL ends all of them; the answer comes when they are gone."""

    name: Literal["pass-on"] = "pass-on"
    job: str
    node: str
    number: int
    patience_s: float = 0.0
    """How long the job may take to appear here."""


Order = Annotated[LookAround | RunRanks | PassOn, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Envelope:
    order: Order


def written(order: LookAround | RunRanks | PassOn) -> str:
    """An order as an argument of a command line."""
    return json.dumps(config.to_tree(order), ensure_ascii=True)


def main(argv: Sequence[str]) -> int:
    """Carry out one order. Returns the exit code."""
    try:
        order = config.decode(_Envelope, {"order": json.loads(argv[0])}).order
        match order:
            case LookAround():
                print(json.dumps(config.to_tree(look_around(order))), flush=True)
                return 0
            case RunRanks():
                return run_ranks(order)
            case PassOn():
                return pass_on(order)
    except ScaletrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


# ------------------------------------------------------------------------------------------------------------ before a job


def look_around(order: LookAround) -> Sight:
    # sshd says: the client's address and port, then its own.
    _, _, address, _ = os.environ.get("SSH_CONNECTION", "- - 127.0.0.1 -").split()
    seen = order.shared is None or order.shared.exists()
    return Sight(address=address, port=free_port(), sees_shared=seen, version=scaletrain.__version__)


def interface_to(address: str) -> str | None:
    """The network interface from whose IPv4 address one reaches ``address``; None where that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # UDP: this chooses a route and sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", os.fsencode(name)))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None


# ------------------------------------------------------------------------------------------------------------ during a job


def run_ranks(order: RunRanks) -> int:
    """Returns the exit code of the ranks. Raises StorageError."""
    count, cores = order.slots[order.node], len(os.sched_getaffinity(0))
    # gloo would resolve the host name, which on many machines gives 127.0.0.1, and then wait for minutes.
    needed = defaults(os.environ, ranks=count, cores=cores, interface=interface_to(order.address))
    plan = on_nodes(order.argv, order.slots, order.address, order.port, needed)
    mine = [process for process in plan.processes if process.node == order.node]
    with Watch(order.limits, order.stacks, alone=len(order.slots) == 1) as watch:
        ranks = _Ranks(mine, grace_s=order.grace_s, peer_grace_s=order.peer_grace_s, logs=order.logs, watch=watch)
        return _run(ranks, order)


def _run(ranks: _Ranks, order: RunRanks) -> int:
    with socket.socket(socket.AF_UNIX) as door, signals_to(ranks.request_stop):
        door.bind(_door(order.job, order.node))
        door.listen()
        ranks.watch(door, partial(ranks.answer, door))
        ranks.watch(sys.stdin.buffer, ranks.hold_on)
        try:
            ranks.start()
            ranks.wait()
        finally:
            ranks.end()
    if ranks.abandoned or ranks.stall:
        return PeerLostError.exit_code  # There is nobody left to tell why, or it was said.
    if ranks.requested is None:
        show(ranks)
    codes = [member.code for member in ranks.failed or ranks.members if member.code]
    if not codes:
        return 0
    killed = next((-code for code in codes if code < 0), None)
    if killed is not None:
        return 128 + killed
    return codes[0] if codes[0] < 128 else ScaletrainError.exit_code  # Above are signals, and 255 is ssh's own.


def _door(job: str, node: str) -> str:
    """A name in the abstract namespace of Unix sockets: it leaves no file, and goes with the process that holds it."""
    return f"\0scaletrain-{hashlib.sha256(f'{job} {node}'.encode()).hexdigest()}"  # such a name has room for 107 bytes


class _Ranks(Group):
    """The ranks of a job on this node."""

    abandoned = False
    """Whether the launcher has gone."""
    visitors: tuple[socket.socket, ...] = ()
    """Connections of those who asked for something; they end with this process, which shows that it has gone."""

    def hold_on(self) -> bool:
        """Called when there is something on the line to the launcher; it never says anything, so that is its end."""
        if os.read(sys.stdin.fileno(), 4096):
            return True
        self.abandoned = True
        self.cut_short()
        return False

    def answer(self, door: socket.socket) -> bool:
        """Do what is asked at the door, if it is this user (or root) who asks."""
        with contextlib.suppress(OSError):
            visitor, _ = door.accept()
            visitor.settimeout(1.0)
            # Who it is comes first: anybody on the machine may knock, and whoever says nothing would be waited for.
            _, user, _ = _UCRED.unpack(visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            asked = int.from_bytes(visitor.recv(1)) if user in (0, os.getuid()) else None
            if asked not in PASSED_ON:
                visitor.close()
                return True
            self.visitors += (visitor,)
            if asked == signal.SIGKILL:
                self.cut_short()
            else:
                self.request_stop(asked)
            visitor.sendall(b".")
        return True


def pass_on(order: PassOn) -> int:
    """Returns the exit code: `NOBODY` if there is no such job on this node. Raises TimeoutError."""
    last_try = time.monotonic() + order.patience_s
    while True:
        with socket.socket(socket.AF_UNIX) as door, contextlib.suppress(ConnectionError):
            door.settimeout(_END_S)
            door.connect(_door(order.job, order.node))
            door.sendall(bytes([order.number]))
            answer = door.recv(1)
            while answer and order.number == signal.SIGKILL:
                answer = door.recv(1)
            return 0
        if time.monotonic() >= last_try:
            return NOBODY
        time.sleep(0.1)
