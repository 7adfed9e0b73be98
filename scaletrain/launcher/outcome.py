"""How a job ended: what rank 0 recorded in ``RUN/exit.json``; the processes are asked only where there is no record.

Another job may be at work in the folder, which ours is then refused. So nothing in it is touched, and a record counts only if it
was not there before and is not that of whoever held the folder then.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain import lease, outside
from scaletrain.errors import PeerLostError, ScaletrainError
from scaletrain.launcher.group import Group


@dataclass(frozen=True, slots=True)
class Record:
    """Where rank 0 of this launch is to leave its record, and what was there before."""

    path: Path
    before: tuple[int, int] | None
    """Inode and time of change of an earlier record; None where there was none."""
    token: int
    """Of whoever has held the folder last; 0: nobody."""


def forget(output: Path | None) -> Record | None:
    """Note what there is from an earlier launch, or from a job that runs, so that it is not taken for this one's."""
    if output is None:
        return None
    seen = lease.newest(output)
    return Record(output / "exit.json", _read(output / "exit.json")[1], seen.token if seen else 0)


def outcome(group: Group, record: Record | None) -> int:
    """The exit code of the job: rank 0's record where there is one, else what the processes of ``group`` say."""
    found = recorded(record)
    said = None if found is None else int(found["code"])
    if group.stall is not None and said is None:
        return PeerLostError.exit_code  # and it was said who
    if group.requested is None and said != 0:
        show(group)
    if said is not None:
        return said
    codes = [member.code or 0 for member in group.failed]
    if any(code > 0 for code in codes) and not any(code < 0 for code in codes):
        return codes[0]
    if group.requested is not None:
        return 128 + group.requested
    if codes:
        return PeerLostError.exit_code
    if record is None:
        return 0
    print(f"error: {record.path}: missing; every rank ended with 0, but none recorded the end of the run", file=sys.stderr)
    return ScaletrainError.exit_code


def show(group: Group) -> None:
    """Say who failed first, with their last words; not those that only repeat what rank 0 has said itself."""
    # Whoever ended with a code has said why; one that was killed, perhaps by us and for another's fault, has not.
    spoken = {member.code for member in group.members if member.planned.rank == 0 and (member.code or 0) > 0}
    for member in group.failed:
        if member.planned.rank == 0 or member.code not in spoken:
            for line in group.explain(member):
                print(line, file=sys.stderr)


def recorded(record: Record | None) -> dict[str, Any] | None:
    """What ``exit.json`` says: code, step, reason. None where there is no whole record of this launch."""
    if record is None:
        return None
    data, identity = _read(record.path)
    try:
        said = outside.parse_json(data)
    except ValueError:
        return None
    if not isinstance(said, dict) or identity == record.before:
        return None
    code, token = said.get("code"), said.get("lease")
    if isinstance(token, int) and token <= record.token:
        return None  # another job's, which had the folder when this one was started, and ended meanwhile
    return said if isinstance(code, int) and 0 <= code <= 255 else None


def _read(file: Path) -> tuple[bytes, tuple[int, int] | None]:
    """What is in it, and which file it is. Opened first: NFS then asks the server and not its memory."""
    try:
        with outside.open_plain(file) as stream:
            found = os.fstat(stream.fileno())
            return stream.read(), (found.st_ino, found.st_mtime_ns)
    except (OSError, ValueError):
        return b"", None
