"""Hostfiles: one ``host slots=N`` per line, as DeepSpeed's launcher and MPI read them; ``#`` begins a comment.

Read strictly: a host becomes an argument of ssh or pdsh, to which ``-oProxyCommand=...`` or ``^file`` are no hosts but orders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaletrain.errors import ConfigError

MAX_SLOTS = 1024
"""Per host; more is a slip of the keyboard."""

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
"""A host name, an IPv4 address, or an alias of the ssh configuration."""

_USAGE = "Write one `host slots=N` per line"


@dataclass(frozen=True, slots=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int
    """How many ranks it runs."""
    where: str
    """``file:line``, for what is said about it."""


def read(path: Path) -> tuple[Host, ...]:
    """The hosts of the file at ``path``, in its order. Raises ConfigError with ``file:line``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("backend.hostfile", str(path), f"must be a readable file: {reason}", f"{_USAGE}.") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> tuple[Host, ...]:
    """The hosts in ``text``; ``where`` names it in errors. Raises ConfigError."""
    hosts: dict[str, Host] = {}
    for host in _lines(text, where):
        if host.name.lower() in hosts:
            rule = f"each host stands once; it is already at {hosts[host.name.lower()].where}"
            raise ConfigError(host.where, host.name, rule, "Add up its slots on one line.")
        hosts[host.name.lower()] = host
    if not hosts:
        raise ConfigError(where, "", "a hostfile names at least one host", f"{_USAGE}.")
    return tuple(hosts.values())


def _lines(text: str, where: str) -> Iterator[Host]:
    # Not splitlines, which also breaks lines at characters that an editor does not count.
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.partition("#")[0].split()
        if words:
            yield _host(words, f"{where}:{number}")


def _host(words: Sequence[str], where: str) -> Host:
    name, *settings = words
    if not NAME.fullmatch(name):
        rule = "a host is a name of letters, digits, dots, dashes and underscores that begins and ends with a letter or digit"
        remedy = "User, port and jump hosts belong into the ssh configuration." if re.search("[@:]", name) else f"{_USAGE}."
        raise ConfigError(where, name, rule, remedy)
    if len(settings) != 1 or not settings[0].startswith("slots="):
        rule = "a host is followed by slots=N, its number of ranks, and by nothing else"
        raise ConfigError(where, " ".join(settings), rule, f"Write `{name} slots=N`.")
    count = settings[0].removeprefix("slots=")
    if not re.fullmatch("[0-9]{1,9}", count) or not 1 <= int(count) <= MAX_SLOTS:
        rule = f"slots is the number of ranks on that host, 1 to {MAX_SLOTS}"
        raise ConfigError(where, settings[0], rule, "Put a # before a host that is to run none.")
    return Host(name, int(count), where)


def select(hosts: Sequence[Host], include: Sequence[str], exclude: Sequence[str]) -> tuple[Host, ...]:
    """The hosts named in ``include`` (none: all) without those in ``exclude``, in the hostfile's order. Raises ConfigError."""
    known = [host.name for host in hosts]
    for field, names in (("backend.include", include), ("backend.exclude", exclude)):
        for name in names:
            if name not in known:
                raise ConfigError(field, name, "must be a host of the hostfile", f"It has: {', '.join(known)}.")
    left = tuple(host for host in hosts if (not include or host.name in include) and host.name not in exclude)
    if not left:
        raise ConfigError(
            "backend.exclude", list(exclude), "at least one host must be left", f"The hosts are: {', '.join(known)}."
        )
    return left
