"""Writing one split: its encoded documents in source order into shards, continued from the journal."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
from tqdm import tqdm

from scaletrain.data import batches
from scaletrain.data.clean import DROPPED
from scaletrain.data.duplicates import Known
from scaletrain.data.encode import KEPT, OTHER_SPLIT, Batch, Encoded, Recipe, run
from scaletrain.data.index import RECORD, Records
from scaletrain.data.journal import Journal, SplitState
from scaletrain.data.shards import ShardWriter
from scaletrain.errors import ConfigError, CorpusError

_OUTCOMES = {**dict(enumerate(DROPPED)), KEPT: "kept", OTHER_SPLIT: "held_out"}


class SplitWriter:
    """Writes the shards of one split that the journal does not have yet."""

    def __init__(self, journal: Journal, split: str, known: Known, *, chunks_per_shard: int, expected: int | None) -> None:
        """``known``: what is in use already. ``expected``: how many documents the source has, for the progress bar."""
        self._journal, self._split, self._known = journal, split, known
        self._chunks_per_shard, self._expected = chunks_per_shard, expected
        self._dropped = journal.logs["dropped.jsonl"]
        self._state = journal.splits.setdefault(split, SplitState())
        self._shard: ShardWriter | None = None

    @property
    def documents(self) -> int:
        """How many documents of the source are dealt with: the number of the next one that is wanted."""
        return self._state.documents

    def encode(self, documents: Iterator[str], recipe: Recipe, processes: int) -> int:
        """Encode what is missing and write it; the tokens written.

        Raises CorpusError when the split ends up empty, ConfigError when the source is not what it was before an interruption,
        StorageError.
        """
        state, ahead = self._state, deque[str]()

        def missing() -> Iterator[Batch]:
            for read in batches.read(documents, split=self._split, known=state.documents, known_hash=state.source_hash):
                ahead.extend(read.hashes)
                yield read.batch

        # Runs one step ahead of the hashes that it takes: a document is encoded after it was read.
        hashes = (ahead.popleft() for _ in repeat(None))
        return self._write(run(recipe, missing(), processes), hashes)

    def merge(self, encoded: Iterable[Encoded], source_hash: str) -> int:
        """Write documents that were encoded before, from number ``documents`` on; the tokens written.

        ``source_hash`` tells the whole of them from any others. Raises what ``encode`` raises.
        """
        if self._state.documents and self._state.source_hash != source_hash:
            rule = "its parts are not those that the interrupted merge read"
            raise ConfigError(f"source of {self._split}", "a changed source", rule, "Start over with --merge --fresh")
        return self._write(encoded, repeat(source_hash))

    def _write(self, encoded: Iterable[Encoded], hashes: Iterator[str]) -> int:
        """``hashes`` gives what the journal says of the source after each document."""
        state = self._state
        if state.done:
            return 0
        before = sum(shard["tokens"] for shard in state.shards)
        try:
            with tqdm(desc=self._split, total=self._expected, initial=state.documents, unit=" documents", disable=None) as bar:
                for batch in encoded:
                    self._collect(batch, hashes)
                    bar.update(len(batch.outcomes))
            if not state.shards and self._shard is None:
                rule = f"none of its {state.documents} documents is left after cleaning: {state.counts}"
                raise CorpusError(self._split, "no text", rule, "Check the source and the settings of 'clean'")
            self._end_shard(done=True)
        finally:
            if self._shard is not None:
                self._shard.discard()
        written: int = sum(shard["tokens"] for shard in state.shards) - before
        return written

    def _collect(self, encoded: Encoded, hashes: Iterator[str]) -> None:
        """Give the documents of one batch, in order, to the shards."""
        state, data = self._state, memoryview(encoded.data)
        records: Records = np.frombuffer(encoded.records, RECORD)
        ends = np.cumsum(np.frombuffer(encoded.chunks, "<u4"), dtype=np.int64).tolist()
        width = len(encoded.signatures) // max(encoded.outcomes.count(KEPT), 1)
        first = begin = signed = 0  # samples from ``first`` on wait to be written together
        for number, (outcome, end) in enumerate(zip(encoded.outcomes, ends, strict=True)):
            reason, details = _OUTCOMES[outcome], dict[str, Any]()
            if outcome == KEPT:
                hashed, signature = encoded.hashes[16 * number : 16 * number + 16], encoded.signatures[signed : signed + width]
                signed += width
                repeated = self._known.judge(self._split, state.documents, hashed, signature)
                reason, details = repeated or (reason, details)
            if outcome != OTHER_SPLIT and reason != "kept":
                line = {"split": self._split, "document": state.documents, "reason": reason, **details}
                self._dropped.add(json.dumps(line).encode() + b"\n")
            state.counts[reason] = state.counts.get(reason, 0) + 1
            state.documents += 1
            state.source_hash = next(hashes)
            if reason != "kept" and end > begin:
                self._add(data, records[first:begin])
                first = end
            elif reason == "kept" and self._chunks + end - first >= self._chunks_per_shard:
                self._add(data, records[first:end])
                self._end_shard(done=False)
                first = end
            begin = end
        self._add(data, records[first:])

    @property
    def _chunks(self) -> int:
        """In the shard that is being written."""
        return self._shard.chunks if self._shard is not None else 0

    def _add(self, data: memoryview, records: Records) -> None:
        """Write samples that lie one after the other in ``data``."""
        if not len(records):
            return
        if self._shard is None:
            name = f"{self._split}/{len(self._state.shards):06d}"
            self._shard = ShardWriter(self._journal.folder, name)
        start, last = int(records["offset"][0]), records[-1]
        moved = records.copy()
        moved["offset"] -= np.uint64(start)
        self._shard.add(data[start : int(last["offset"]) + int(last["length"])], moved)

    def _end_shard(self, *, done: bool) -> None:
        written = self._shard.finish() if self._shard is not None else None
        self._shard = None
        self._journal.finish_shard(self._split, written, done=done)
