"""What is to be started where, as data: pure, so that it can be printed, compared and tested without starting anything."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Job:
    """What the user asked to have run."""

    argv: tuple[str, ...]
    """The command that every rank runs."""
    output: Path | None
    """The run folder, where rank 0 leaves ``exit.json``; None where the verb has none."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process on one node."""

    node: str
    rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Only what is added to the environment."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All processes of a job, in the order of their ranks."""

    processes: tuple[Process, ...]

    def text(self) -> str:
        """One shell command per process: what a dry run prints."""
        lines = []
        for process in self.processes:
            added = " ".join(f"{name}={shlex.quote(value)}" for name, value in process.env.items())
            lines += [f"# rank {process.rank} on {process.node}", f"{added} {shlex.join(process.argv)}"]
        return "\n".join(lines)


def on_one_node(argv: tuple[str, ...], *, ranks: int, port: int, cores: int, environment: Mapping[str, str]) -> LaunchPlan:
    """A plan for ``ranks`` processes on this machine, meeting at ``port``.

    ``cores`` are shared out evenly as OpenMP threads, for without that each rank would take them all. What the user has already
    set in ``environment`` stays.
    """
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # gloo listens on the address that the host name resolves to, which on many machines is none: name the interface instead.
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {name: value for name, value in defaults.items() if name not in environment}
    return LaunchPlan(
        tuple(
            Process(node="localhost", rank=rank, argv=argv, env={"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared)
            for rank in range(ranks)
        )
    )
