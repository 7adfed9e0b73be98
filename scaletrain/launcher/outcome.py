"""How a job ended: what rank 0 recorded in ``RUN/exit.json``; the processes are asked only where there is no record."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from scaletrain.errors import PeerLostError, ScaletrainError, StorageError
from scaletrain.launcher.group import Group


def forget(output: Path | None) -> Path | None:
    """Remove the record of an earlier launch, which must not be taken for this one's; return where the new one is to be.

    Raises StorageError.
    """
    if output is None:
        return None
    record = output / "exit.json"
    try:
        with contextlib.suppress(NotADirectoryError):  # The run folder is not a folder: rank 0 says so better.
            record.unlink(missing_ok=True)
    except OSError as error:
        rule = "the record of the last launch is removed before a new one"
        raise StorageError(f"{record}: got {error.strerror!r}; {rule}. Make the run folder writable") from error
    return record


def outcome(group: Group, record: Path | None) -> int:
    """The exit code of the job: rank 0's record where there is one, else what the processes of ``group`` say."""
    said = _recorded(record)
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
    print(f"error: {record}: missing; every rank ended with 0, but none recorded the end of the run", file=sys.stderr)
    return ScaletrainError.exit_code


def show(group: Group) -> None:
    """Say who failed first, with their last words; not those that only repeat what rank 0 has said itself."""
    # Whoever ended with a code has said why; one that was killed, perhaps by us and for another's fault, has not.
    spoken = {member.code for member in group.members if member.planned.rank == 0 and (member.code or 0) > 0}
    for member in group.failed:
        if member.planned.rank == 0 or member.code not in spoken:
            for line in group.explain(member):
                print(line, file=sys.stderr)


def _recorded(record: Path | None) -> int | None:
    """The ``code`` in ``exit.json``; None where there is no whole record."""
    try:
        said = json.loads(record.read_bytes()) if record else None
    except (OSError, ValueError):
        return None
    code = said.get("code") if isinstance(said, dict) else None
    return code if isinstance(code, int) and 0 <= code <= 255 else None
