"""The connections to the nodes of a job: what the launcher holds, while the ranks are on other machines."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from scaletrain.launcher.group import Group, Member
from scaletrain.launcher.node import NOBODY
from scaletrain.launcher.plan import Process
from scaletrain.launcher.transport import SSH_FAILED, start, stop

ANSWER_S = 10.0
"""How long a node may take to do what it is asked."""


class Nodes(Group):
    """One connection per node, which ends with the exit code of the node's ranks; node 0 has rank 0 and speaks.

    Signals are passed on by orders of their own, since a connection carries none. Closing one ends the ranks at its other side.
    """

    stdin = subprocess.PIPE
    settling_s = 1.0  # What follows from the death of a rank may arrive before the news of it.

    def __init__(
        self, carriers: Sequence[Process], pass_on: Callable[[int, int], Process], *, grace_s: float, peer_grace_s: float
    ) -> None:
        """``pass_on(node, number)`` is what carries a signal to a node. The graces are those that the ranks have."""
        super().__init__(carriers, grace_s=grace_s + ANSWER_S, peer_grace_s=peer_grace_s)
        self._pass_on = pass_on
        self._asked: list[int] = []
        """Signals that are still to be passed on: not from within a handler, which may interrupt the start of a process."""
        self._orders: dict[subprocess.Popen[str], Process] = {}
        self._killed_s = float("inf")
        self._lost: list[Member] = []
        """Those whose connection ended before the ranks had."""

    def send(self, number: int) -> None:
        """Have a signal passed on to every rank of every node."""
        if number != signal.SIGKILL:
            self._asked.append(number)
        elif self._killed_s == float("inf"):
            self._killed_s = time.monotonic()
            self._asked.append(number)
        elif time.monotonic() > self._killed_s + ANSWER_S:
            super().send(number)

    def code_of(self, member: Member) -> int | None:
        code = super().code_of(member)
        if code is None or 0 <= code <= 128:
            return code
        if code < 0 or code == SSH_FAILED:
            self._lost.append(member)
            return -signal.SIGHUP
        return 128 - code

    def explain(self, member: Member) -> list[str]:
        said = [line.decode(errors="replace").rstrip() for line in member.tail]
        return [f"error: the connection to {member.planned.node} broke", *said] if member in self._lost else said

    def _listen(self, timeout_s: float) -> None:
        super()._listen(timeout_s)
        while self._asked:
            number = self._asked.pop(0)
            running = [member.planned for member in self.members if member.code is None]
            self._orders |= {start(order): order for order in (self._pass_on(each.rank, number) for each in running)}
        for process in [process for process in self._orders if process.poll() is not None]:
            self._report(process, self._orders.pop(process))

    def end(self) -> None:
        """Leave no process behind, here or on a node, or say where."""
        super().end()
        # Closing the connection was the order to end. Where a node has not said that it is done, wait until it has; pdsh also
        # ends with 0 when its ssh was killed.
        unsure = [
            member for member in self.members if member.code is None or member in self._lost or (self.failed and not member.code)
        ]
        self._orders |= {start(order): order for order in (self._pass_on(each.planned.rank, signal.SIGKILL) for each in unsure)}
        last_moment = time.monotonic() + ANSWER_S
        for process, order in self._orders.items():
            self._report(process, order, max(0.0, last_moment - time.monotonic()))

    def _report(self, process: subprocess.Popen[str], order: Process, timeout_s: float = 0.0) -> None:
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            errors = "no answer"
        stop(process)
        if process.returncode not in (0, NOBODY):
            said = (errors.strip().splitlines() or ["no reason given"])[-1]
            print(f"warning: {order.node} did not do what it was asked, its ranks may still run: {said}", file=sys.stderr)
