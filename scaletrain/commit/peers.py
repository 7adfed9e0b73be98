"""What a commit needs of the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from scaletrain.errors import ScaletrainError, StorageError

T = TypeVar("T")


class Peers(Protocol):
    """The ranks that commit together, as one of them sees them. A lost peer raises PeerLostError."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather(self, tree: Any) -> list[Any]:
        """The JSON value that every rank gave, in rank order, on every rank."""

    def raise_together(self, error: Exception | None, what: str) -> None:
        """Raises on every rank, with the same exit code, where any rank gave an error."""


class Alone:
    """One rank without peers."""

    rank = 0
    world = 1

    def gather(self, tree: Any) -> list[Any]:
        return [tree]

    def raise_together(self, error: Exception | None, what: str) -> None:
        if error is not None:
            raise error


def phase(peers: Peers, work: Callable[[], T], what: str) -> T:
    """Runs one rank's part of a phase; no rank goes on before all have done theirs.

    An OSError of ``work`` becomes a StorageError. Raises on every rank where it raised on any.
    """
    error: Exception | None = None
    try:
        result = work()
    except ScaletrainError as failure:
        error = failure
    except OSError as failure:
        where = "" if failure.filename is None else f" ({failure.filename})"
        error = StorageError(f"{what}: {failure.strerror or failure}{where}; free space or choose another output folder")
        error.__cause__ = failure
    except Exception as failure:  # a bug on one rank must not leave the others waiting
        error = failure
    peers.raise_together(error, what)
    return result
