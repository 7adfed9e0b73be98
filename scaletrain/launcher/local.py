"""All ranks on this machine, in one process group that the launcher owns."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from scaletrain.launcher.group import KEPT_LINES as KEPT_LINES
from scaletrain.launcher.group import Group, signals_to
from scaletrain.launcher.outcome import forget, outcome, recorded
from scaletrain.launcher.plan import Job, LaunchPlan, on_one_node
from scaletrain.launcher.restart import Ending, Restarts, again
from scaletrain.launcher.watch import Limits, Watch


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
    limits: Limits = field(default_factory=Limits)
    """How long a rank may give no sign of life before the job is ended."""
    restarts: Restarts = field(default_factory=Restarts)
    """What follows from a failure."""


def run(config: LocalConfig, job: Job, *, dry_run: bool = False) -> int:
    """Start the ranks, wait for them, answer with the job's exit code. Raises StorageError."""
    if dry_run:
        print(_plan(config, job).text())
        return 0
    return again(config.restarts, lambda number: _once(config, job.attempt(number), number), job.output)


def _plan(config: LocalConfig, job: Job) -> LaunchPlan:
    cores, port = len(os.sched_getaffinity(0)), config.port or free_port()
    return on_one_node(job.argv, ranks=config.ranks, port=port, cores=cores, environment=os.environ)


def _once(config: LocalConfig, job: Job, number: int) -> Ending:
    record = forget(job.output)
    stacks = job.output / "stacks" / f"attempt-{number}" if job.output else None
    with Watch(config.limits, stacks) as watch:
        group = Group(
            _plan(config, job).processes,
            grace_s=config.grace_s,
            peer_grace_s=config.peer_grace_s,
            logs=config.logs,
            watch=watch,
        )
        with signals_to(group.request_stop):
            try:
                group.start()
                group.wait()
            finally:
                group.end()
    return Ending(outcome(group, record), group.requested is not None, group.stall, recorded(record))


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now, at any of its addresses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
