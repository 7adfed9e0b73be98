"""How the ranks of a job come to run, and how their end is told.

A launcher is given the command line of a verb and the folder of its run. It starts that command once per rank with the rank
variables set, owns the processes, and answers with the exit code that rank 0 recorded in ``RUN/exit.json``. Nothing here imports
torch: a launcher also runs on login nodes.

To add one: a module beside ``local.py`` with a config dataclass and ``run``, and its line in `Backend` and in `launch`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from scaletrain.launcher import deepspeed, local
from scaletrain.launcher.deepspeed import DeepspeedConfig
from scaletrain.launcher.local import LocalConfig
from scaletrain.launcher.plan import Job

__all__ = ["Backend", "DeepspeedConfig", "Job", "LaunchConfig", "LocalConfig", "launch"]


def _name(backend: Any) -> Any:
    """Settings without a name are those of the local launcher, so that `scaletrain launch backend.ranks=2` is enough."""
    return backend.get("name", "local") if isinstance(backend, dict) else getattr(backend, "name", None)


# The kinds of launcher, told apart by their `name`.
Backend = Annotated[
    Annotated[LocalConfig, Tag("local")] | Annotated[DeepspeedConfig, Tag("deepspeed")],
    Discriminator(_name),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Where and on how many ranks a job runs."""

    backend: Backend = field(default_factory=LocalConfig)
    """The launcher: ``local`` runs all ranks on this machine, ``deepspeed`` those of a hostfile."""


def launch(
    config: LaunchConfig,
    arguments: Sequence[str],
    output: Path | None,
    *,
    dry_run: bool = False,
    once_only: Sequence[str] = (),
) -> int:
    """Run ``scaletrain`` with ``arguments`` (a verb and what follows it) on every rank; answer with the exit code of the job.

    ``output`` is the run folder in which rank 0 leaves ``exit.json``. Without one (or without a record) the job's end is read
    from its processes. Those of the arguments that are ``once_only`` are left out where a failed job is
    started again. A dry run prints the plan and starts nothing. Raises ConfigError and StorageError.
    """
    # The module by name, not the script: the interpreter of the ranks is then the one that is running now.
    job = Job(argv=(sys.executable, "-m", "scaletrain", *arguments), output=output, once_only=frozenset(once_only))
    match config.backend:
        case LocalConfig():
            return local.run(config.backend, job, dry_run=dry_run)
        case DeepspeedConfig():
            return deepspeed.run(config.backend, job, dry_run=dry_run)
