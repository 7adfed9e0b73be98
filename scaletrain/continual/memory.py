"""The memory of a stream: which old examples are kept for replay.

Every example draws a number, a hash of the seed, its task and its key, and the ``capacity`` lowest are kept (bottom-k). That
is a uniform sample without replacement, as a reservoir's is (Vitter, "Random sampling with a reservoir", 1985), but it does
not depend on the order in which examples came, on how they were spread over ranks, or on preparing the data again, and needs
no count of what was seen: what is kept of the whole is what is kept of all that was kept of its parts.

With ``balance: class`` every label of every task is a group with an equal share of the capacity; the first groups by name have
what does not divide. A share only shrinks as groups are added, so that nothing that was dropped is ever wanted again. What a
group is too small to use stays free.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from scaletrain import durable, outside
from scaletrain.data import keyed
from scaletrain.data.labelled import Example
from scaletrain.errors import CheckpointError, CorpusError, StorageError

FILE = "memory.jsonl"
Balance = Literal["class", "none"]


@dataclass(frozen=True, slots=True)
class Remembered:
    """An example of an earlier task."""

    task: str
    example: Example
    draw: int
    """64 bits; the lowest are kept."""


def remember(
    memory: Iterable[Remembered], task: str, examples: Iterable[Example], *, capacity: int, balance: Balance, seed: int
) -> tuple[Remembered, ...]:
    """The memory after a task, out of the one before it and the task's training examples. Pure, and the same done twice.

    ``memory`` was filled with the same seed. Raises CorpusError for two examples of the task with one key.
    """
    new = (Remembered(task, example, draw(seed, task, example.key)) for example in examples)
    return lowest([*memory, *new], capacity, balance)


def draw(seed: int, task: str, key: str) -> int:
    """The number that an example draws, uniform in [0, 2**64)."""
    return keyed.key("memory", seed, task, key)


def lowest(candidates: Iterable[Remembered], capacity: int, balance: Balance) -> tuple[Remembered, ...]:
    """Those that a memory of ``capacity`` examples keeps, by rising draw. The same one given twice counts once.

    ``lowest([*lowest(a), *lowest(b)]) == lowest([*a, *b])``. Raises CorpusError for two examples of a task with one key.
    """
    distinct: dict[tuple[str, str], Remembered] = {}
    for candidate in candidates:
        before = distinct.setdefault((candidate.task, candidate.example.key), candidate)
        if before != candidate:
            rule = "two different examples have this key, so that it cannot say which is kept"
            raise CorpusError(f"key of an example of task {candidate.task}", candidate.example.key, rule, "Give each its own")
    by_group: dict[tuple[str, ...], list[Remembered]] = defaultdict(list)
    for candidate in distinct.values():
        by_group[(candidate.task, candidate.example.label) if balance == "class" else ()].append(candidate)
    kept: list[Remembered] = []
    for group, quota in _quotas(sorted(by_group), capacity):
        kept += sorted(by_group[group], key=_order)[:quota]
    return tuple(sorted(kept, key=_order))


def save_memory(folder: Path, memory: Sequence[Remembered]) -> None:
    """Write ``memory.jsonl`` into ``folder``, durably: one line per example, with its text. Raises StorageError."""
    lines = (json.dumps({"task": kept.task, **asdict(kept.example), "draw": kept.draw}) + "\n" for kept in memory)
    try:
        durable.write(folder / FILE, "".join(lines).encode())
    except OSError as error:
        rule = f"the memory must be written there ({error.strerror or error})"
        raise StorageError(f"{folder / FILE}: {rule}; free space or choose another folder") from error


def load_memory(folder: Path) -> tuple[Remembered, ...]:
    """What ``save_memory`` wrote. Raises CheckpointError, naming the line, for a file that is not that."""
    path = folder / FILE
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(str(path), error.strerror, "a version holds the memory of its stream", "Restore the file") from None
    memory = []
    for number, line in enumerate(lines, start=1):
        try:
            tree = outside.parse_json(line)
            task, number_drawn = tree.pop("task"), tree.pop("draw")
            memory.append(Remembered(task, Example(**tree), number_drawn))
        except (ValueError, TypeError, KeyError, AttributeError):
            rule = "a line holds one example: task, key, text, pair, label, draw"
            shown = line[:80].decode(errors="replace")
            raise CheckpointError(f"{path}:{number}", shown, rule, "Restore the file") from None
    return tuple(memory)


def _quotas(groups: Sequence[tuple[str, ...]], capacity: int) -> list[tuple[tuple[str, ...], int]]:
    """Each group's share of the capacity."""
    if not groups:
        return []
    share, left = divmod(capacity, len(groups))
    return [(group, share + (place < left)) for place, group in enumerate(groups)]


def _order(candidate: Remembered) -> tuple[int, str, str]:
    """By draw; the names decide where two draws are the same."""
    return candidate.draw, candidate.task, candidate.example.key
