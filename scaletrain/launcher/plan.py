"""What is to be started where, as data: pure, so that it can be printed, compared and tested without starting anything."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

LOCALHOST = "localhost"
"""The node that this machine is to the local launcher."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the user asked to have run."""

    argv: tuple[str, ...]
    """The command that every rank runs."""
    output: Path | None
    """The run folder, where rank 0 leaves ``exit.json``; None where the verb has none."""
    once_only: frozenset[str] = frozenset()
    """Words of the command that are meant for its first start: a job that is started again with ``--fresh`` would get nowhere."""

    def attempt(self, number: int) -> Job:
        """The job as it is started for the ``number``-th time, counted from 0."""
        return self if number == 0 else replace(self, argv=tuple(word for word in self.argv if word not in self.once_only))


@dataclass(frozen=True, slots=True)
class Process:
    """One process: a rank on its node, or (``rank`` is then the number of the node) what carries a command to a node."""

    node: str
    rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Only what is added to the environment."""

    def text(self) -> str:
        """A shell command."""
        added = "".join(f"{name}={shlex.quote(value)} " for name, value in self.env.items())
        return f"{added}{shlex.join(self.argv)}"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All processes of a job, in the order of their ranks."""

    processes: tuple[Process, ...]
    carriers: tuple[Process, ...] = ()
    """What runs on this machine to have them started on others, one per node; none where the ranks are started directly."""

    def text(self) -> str:
        """One shell command per process, those of a node under what carries them there: what a dry run prints."""
        carried = {carrier.node: [f"# to {carrier.node}", carrier.text()] for carrier in self.carriers}
        lines = []
        for process in self.processes:
            lines += carried.pop(process.node, [])
            lines += [f"# rank {process.rank} on {process.node}", process.text()]
        return "\n".join(lines)


def on_nodes(argv: tuple[str, ...], slots: Mapping[str, int], address: str, port: int, shared: Mapping[str, str]) -> LaunchPlan:
    """A plan for ``slots[node]`` processes on each node, counted through in that order, meeting at ``address``:``port``.

    ``shared`` is added to the environment of all of them.
    """
    ranks = [(node, local_rank) for node, count in slots.items() for local_rank in range(count)]
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    processes = []
    for rank, (node, local_rank) in enumerate(ranks):
        numbers = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": len(ranks), "LOCAL_WORLD_SIZE": slots[node]}
        own = {name: str(number) for name, number in numbers.items()} | meeting
        added = {name: value for name, value in shared.items() if name not in own}
        processes.append(Process(node=node, rank=rank, argv=argv, env=own | added))
    return LaunchPlan(tuple(processes))


def on_one_node(argv: tuple[str, ...], *, ranks: int, port: int, cores: int, environment: Mapping[str, str]) -> LaunchPlan:
    """A plan for ``ranks`` processes on this machine, meeting at ``port``. What the user has set in ``environment`` stays."""
    # gloo listens on the address that the host name resolves to, which on many machines is none: name the interface instead.
    shared = defaults(environment, ranks=ranks, cores=cores, interface="lo")
    return on_nodes(argv, {LOCALHOST: ranks}, "127.0.0.1", port, shared)


def defaults(environment: Mapping[str, str], *, ranks: int, cores: int, interface: str | None) -> dict[str, str]:
    """What ``ranks`` processes on one node need that ``environment`` does not say.

    ``cores`` are shared out evenly as OpenMP threads, for without that each rank would take them all. ``interface`` is where
    gloo listens.
    """
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // ranks))} | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
    return {name: value for name, value in wanted.items() if name not in environment}
