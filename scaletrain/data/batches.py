"""The raw documents of a split in batches, with a running hash that shows whether the source is the same as before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from scaletrain.data.encode import Batch
from scaletrain.errors import ConfigError

_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 2048


@dataclass(frozen=True, slots=True)
class Read:
    """A batch, and how the source stands after it."""

    number: int
    """Of the batch in its source, when all of it is read in one go."""
    batch: Batch
    hashes: list[str]
    """The running hash of the source after each document of the batch."""

    @property
    def documents(self) -> int:
        """Documents of the source up to the end of the batch."""
        return self.batch.first + len(self.hashes)


def read(documents: Iterator[str], *, split: str, known: int = 0, known_hash: str = "", batches: int = 0) -> Iterator[Read]:
    """The documents after the first ``known`` ones, in groups of about the same amount of text.

    ``known_hash`` is the running hash of what is read past, ``batches`` the number of the first batch. Where a source is cut
    depends on its text and on ``known`` alone. Raises ConfigError when the known documents are not what they were.
    """
    running = ""
    for _ in range(known):
        running = _chain(running, next(documents, ""))
    if running != known_hash:
        rule = f"its first {known} documents are not those that the interrupted run read"
        raise ConfigError(f"source of {split}", "a changed source", rule, "Restore it, or start over with --fresh")
    first, group, hashes, characters = known, list[str](), list[str](), 0
    for document in documents:
        running = _chain(running, document)
        group.append(document)
        hashes.append(running)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS or len(group) >= _BATCH_DOCUMENTS:
            yield Read(batches, Batch(first, group), hashes)
            first, group, hashes, characters, batches = first + len(group), [], [], 0, batches + 1
    if group:
        yield Read(batches, Batch(first, group), hashes)


def _chain(running: str, document: str) -> str:
    """The running hash after one more document (raw text may hold lone surrogates)."""
    return hashlib.blake2b(running.encode() + document.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
