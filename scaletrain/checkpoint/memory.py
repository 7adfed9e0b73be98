"""How much memory this machine has left for a copy of the state. Reads what Linux says; elsewhere nothing is known."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

from scaletrain import dist
from scaletrain.errors import ConfigError

ROOT = Path("/")


def check(need_bytes: int, root: Path = ROOT) -> None:
    """Raises ConfigError on every rank where the copies of all ranks of a machine do not fit into its memory. Collective."""
    asked = dist.gather([socket.gethostname(), need_bytes, available_bytes(root)])
    needs: dict[str, int] = {}
    for host, need, _ in asked:
        needs[host] = needs.get(host, 0) + need
    for host, _, available in asked:
        if available is not None and needs[host] > available:
            rule = (
                f"the copies of the state that the ranks on {host} write from take {needs[host]} bytes ({need_bytes} on rank "
                f"{dist.rank()}), and {available} bytes of its memory are free"
            )
            raise ConfigError(
                "checkpoint.asynchronous", True, rule, "Set checkpoint.asynchronous=false, which writes without a copy."
            )


def available_bytes(root: Path = ROOT) -> int | None:
    """What a process can still take: of the machine, and of every control group that it is in. None where nothing says so.

    Files that are merely cached count as free: the kernel lets go of them.
    """
    return min((*_machine(root), *_groups(root)), default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        names = ("memory.max", "memory.current", "")
        base = root / "sys/fs/cgroup"
        if controllers:  # version 1 has a hierarchy per controller, and totals of its own name
            if "memory" not in controllers.split(","):
                continue
            names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), base / "memory"
        folder = base / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if group.is_relative_to(base):
                yield from _group(group, *names)


def _group(folder: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    most, used = ("".join(_lines(folder / name)) for name in (limit, usage))
    if not most.isdigit() or not used.isdigit():
        return  # "max", or a group without a limit of its own
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    cached = sum(int(value) for name, value in pairs if name in (f"{prefix}inactive_file", f"{prefix}active_file"))
    yield max(0, int(most) - int(used) + cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
