"""Writing one split: documents in source order through the tokenising processes into shards, continued from the journal."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from scaletrain.data.clean import DROPPED
from scaletrain.data.encode import KEPT, OTHER_SPLIT, Batch, Encoded, Recipe, run
from scaletrain.data.index import RECORD, Records
from scaletrain.data.journal import Journal, SplitState
from scaletrain.data.shards import ShardWriter
from scaletrain.errors import ConfigError, CorpusError

_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 2048
_OUTCOMES = {**dict(enumerate(DROPPED)), KEPT: "kept", OTHER_SPLIT: "held_out"}


class SplitWriter:
    """Writes the shards of one split that the journal does not have yet."""

    def __init__(self, journal: Journal, split: str, *, chunks_per_shard: int, expected: int | None = None) -> None:
        """``expected``: how many documents the source has, for the progress bar."""
        self._journal, self._split, self._expected = journal, split, expected
        self._chunks_per_shard = chunks_per_shard
        self._state = journal.splits.setdefault(split, SplitState())
        self._shard: ShardWriter | None = None
        self._ahead: deque[str] = deque()
        """The running hash of the source after each document that is in work."""

    def run(self, documents: Iterator[str], recipe: Recipe, processes: int) -> int:
        """Write what is missing; the tokens written.

        Raises CorpusError when the split ends up empty, ConfigError when the source is not what it was before an interruption,
        StorageError.
        """
        state = self._state
        if state.done:
            return 0
        before = sum(shard["tokens"] for shard in state.shards)
        try:
            self._skip_known(documents)
            with tqdm(desc=self._split, total=self._expected, initial=state.documents, unit=" documents", disable=None) as bar:
                for encoded in run(recipe, self._batches(documents), processes):
                    self._collect(encoded, recipe.clean.deduplicate)
                    bar.update(len(encoded.outcomes))
            if not state.shards and self._shard is None:
                rule = f"none of its {state.documents} documents is left after cleaning: {state.counts}"
                raise CorpusError(self._split, "no text", rule, "Check the source and the settings of 'clean'")
            self._end_shard(done=True)
        finally:
            if self._shard is not None:
                self._shard.discard()
        written: int = sum(shard["tokens"] for shard in state.shards) - before
        return written

    def _skip_known(self, documents: Iterator[str]) -> None:
        """Read past what an earlier run dealt with, and make sure that it is still the same text."""
        running = ""
        for _ in range(self._state.documents):
            running = _chain(running, next(documents, ""))
        if running != self._state.source_hash:
            rule = f"its first {self._state.documents} documents are not those that the interrupted run read"
            raise ConfigError(f"source of {self._split}", "a changed source", rule, "Restore it, or start over with --fresh")

    def _batches(self, documents: Iterator[str]) -> Iterator[Batch]:
        """Documents in groups of about the same amount of text; where they are cut does not show in the result."""
        first, running = self._state.documents, self._state.source_hash
        group: list[str] = []
        characters = 0
        for document in documents:
            running = _chain(running, document)
            self._ahead.append(running)
            group.append(document)
            characters += len(document)
            if characters >= _BATCH_CHARACTERS or len(group) >= _BATCH_DOCUMENTS:
                yield Batch(first, group)
                first, group, characters = first + len(group), [], 0
        if group:
            yield Batch(first, group)

    def _collect(self, encoded: Encoded, deduplicate: bool) -> None:
        """Give the documents of one batch, in order, to the shards."""
        state, data = self._state, memoryview(encoded.data)
        records: Records = np.frombuffer(encoded.records, RECORD)
        ends = np.cumsum(np.frombuffer(encoded.chunks, "<u4"), dtype=np.int64).tolist()
        begin = 0
        for number, (outcome, end) in enumerate(zip(encoded.outcomes, ends, strict=True)):
            reason = _OUTCOMES[outcome]
            if reason == "kept" and deduplicate and not self._journal.see(encoded.hashes[16 * number : 16 * number + 16]):
                reason = "duplicate"
            state.counts[reason] = state.counts.get(reason, 0) + 1
            state.documents += 1
            state.source_hash = self._ahead.popleft()
            if reason == "kept":
                self._add(data, records[begin:end])
            begin = end

    def _add(self, data: memoryview, records: Records) -> None:
        """One document's samples; the shard ends with it when it is large enough."""
        if self._shard is None:
            name = f"{self._split}/{len(self._state.shards):06d}"
            self._shard = ShardWriter(self._journal.folder, name)
        start, last = int(records["offset"][0]), records[-1]
        moved = records.copy()
        moved["offset"] -= np.uint64(start)
        self._shard.add(data[start : int(last["offset"]) + int(last["length"])], moved)
        if self._shard.chunks >= self._chunks_per_shard:
            self._end_shard(done=False)

    def _end_shard(self, *, done: bool) -> None:
        written = self._shard.finish() if self._shard is not None else None
        self._shard = None
        self._journal.finish_shard(self._split, written, done=done)


def _chain(running: str, document: str) -> str:
    """The running hash after one more document (raw text may hold lone surrogates)."""
    return hashlib.blake2b(running.encode() + document.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
