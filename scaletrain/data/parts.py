"""A prepare that is split over machines which share a file system: part i of n encodes, a merge writes the shards.

Part i reads the whole source, encodes every n-th batch of it, counting from i, and keeps the result in pieces under ``parts/``.
What needs all of the text is done in one place: the tokenizer by the part that comes first (the others wait), duplicates and the
ends of shards by the merge, which takes the batches of all parts in the order of the source. So the folder has the bytes that one
process would have written, whatever the number of parts and in whatever order they ran, were killed and ran again.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from scaletrain import outside
from scaletrain.data import batches, encode
from scaletrain.data import prepare as whole
from scaletrain.data.encode import Batch, Encoded
from scaletrain.data.index import RECORD
from scaletrain.data.journal import Journal, clear_parts, clear_pieces, locked, require_ours
from scaletrain.data.pieces import PieceWriter, frames, in_order
from scaletrain.data.prepare import PrepareConfig
from scaletrain.data.shards import write_json
from scaletrain.errors import ConfigError, CorpusError

_PIECE_BYTES = 1 << 26
_WAITING = "waiting: a job still holds one of the parts"


@dataclass(frozen=True, slots=True)
class Part:
    """One of the jobs that share a prepare."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """'2/7' is part 2 of 7. Raises ConfigError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError("--part", text, "a part is I/N with 1 <= I <= N", "Give for example --part 1/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def folder(self, output: Path) -> Path:
        """Where its pieces are."""
        return output / "parts" / f"{self.number}-of-{self.of}"


@dataclass(slots=True)
class Progress:
    """How far a part has come in a split: everything up to and with the last batch of its last whole piece."""

    documents: int = 0
    """Documents of the source that were read, those of other parts included."""
    source_hash: str = ""
    """The running hash of these."""
    batches: int = 0
    """Batches of the source that were read."""
    pieces: int = 0
    tokens: int = 0
    """Encoded by this part; some may turn out to be duplicates."""
    done: bool = False


@dataclass(slots=True)
class PartJournal:
    """What a part has done, in ``progress.json`` of its folder, which is replaced after every piece."""

    folder: Path
    splits: dict[str, Progress] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> PartJournal:
        """As it was left; empty where the part has not begun. Raises CorpusError when it cannot be read."""
        try:
            tree = outside.read_json(folder / "progress.json")
            return cls(folder, {name: Progress(**state) for name, state in tree.items()})
        except FileNotFoundError:
            return cls(folder)
        except (ValueError, TypeError, AttributeError):
            rule = "it says how far a part has come"
            raise CorpusError(str(folder / "progress.json"), "another content", rule, f"Remove {folder}") from None

    def save(self) -> None:
        """Raises StorageError."""
        write_json(self.folder / "progress.json", {name: dataclasses.asdict(state) for name, state in self.splits.items()})

    def piece(self, split: str, number: int) -> Path:
        """The file of a piece."""
        return self.folder / split / f"{number:06d}.piece"

    def pieces(self, split: str) -> list[Path]:
        """The files of all whole pieces of a split, in order."""
        return [self.piece(split, number) for number in range(self.splits[split].pieces)]


def prepare_part(config: PrepareConfig, part: Part, *, fresh: bool = False) -> dict[str, Any]:
    """Encode one part of the source; a short report. Continues what an interrupted run of this part began.

    ``fresh`` discards what this part has left, and only that. Raises what ``prepare`` raises, and ConfigError when the other
    parts have other settings, when another job is at this part, or when the folder is prepared without parts.
    """
    output, started = config.output, time.monotonic()
    require_ours(output)
    if (output / "manifest.json").exists():
        return whole.finished(config)
    whole.require_inputs(config)
    folder = part.folder(output)
    with locked(output, waiting=f"waiting: another job holds {output}, to make the tokenizer or to merge"):
        if (output / "manifest.json").exists():
            return whole.finished(config)
        with closing(Journal.open(output, whole.settings(config), part.of)) as journal:
            if journal.parts != part.of:
                begun = "without parts" if journal.parts is None else f"in {journal.parts} parts"
                remedy = "Use a new output folder, or remove this one"
                raise ConfigError("--part", str(part), f"{output} was begun {begun}", remedy)
            whole.make_tokenizer(config, journal)
    with locked(folder, what="part"):
        if fresh:
            clear_pieces(folder)
        own, tokenising = PartJournal.open(folder), time.monotonic()
        written = sum(_encode(config, own, part, split) for split in whole.splits(config))
        ended = time.monotonic()
    return {
        "status": "part prepared",
        "output": str(output),
        "part": str(part),
        "tokens": sum(state.tokens for state in own.splits.values()),
        "seconds": round(ended - started, 3),
        "tokens_per_s": round(written / (ended - tokenising), 1),
    }


def _encode(config: PrepareConfig, own: PartJournal, part: Part, split: str) -> int:
    """Encode what is missing of one split; the tokens."""
    state = own.splits.setdefault(split, Progress())
    if state.done:
        return 0
    before = state.tokens
    ahead, last = deque[_Position](), _Position(state.documents, state.source_hash, state.batches)

    def mine() -> Iterator[Batch]:
        nonlocal last
        documents = whole.source_of(config, split).documents()
        for read in batches.read(documents, split=split, known=last.documents, known_hash=last.source_hash, batches=last.batches):
            last = _Position(read.documents, read.hashes[-1], read.number + 1)
            if read.number % part.of == part.number - 1:
                ahead.append(last)
                yield read.batch

    pieces = _Pieces(own, split)
    try:
        with tqdm(desc=f"{split} {part}", unit=" documents", disable=None) as bar:
            for encoded in encode.run(whole.recipe(config, split), mine(), whole.processes(config)):
                pieces.add(encoded, ahead.popleft())
                bar.update(len(encoded.outcomes))
        pieces.end(last, done=True)
    finally:
        pieces.discard()
    return state.tokens - before


class _Position(NamedTuple):
    """How a source stands after a batch; see ``Progress``."""

    documents: int
    source_hash: str
    batches: int


class _Pieces:
    """Writes the pieces of one split of a part and keeps its account."""

    def __init__(self, journal: PartJournal, split: str) -> None:
        self._journal, self._split, self._state = journal, split, journal.splits[split]
        self._piece: PieceWriter | None = None
        self._tokens = 0

    def add(self, encoded: Encoded, after: _Position) -> None:
        """A batch that ends at ``after``; a piece that is large enough ends with it."""
        if self._piece is None:
            self._piece = PieceWriter(self._journal.piece(self._split, self._state.pieces))
        self._piece.add(after.documents - len(encoded.outcomes), encoded)
        self._tokens += int(np.frombuffer(encoded.records, RECORD)["tokens"].sum())
        if self._piece.bytes >= _PIECE_BYTES:
            self.end(after, done=False)

    def end(self, after: _Position, *, done: bool) -> None:
        """Make everything up to ``after`` durable."""
        state, piece = self._state, self._piece
        if piece is not None:
            piece.finish()
        self._piece, state.pieces = None, state.pieces + (piece is not None)
        state.documents, state.source_hash, state.batches = after
        state.tokens, self._tokens, state.done = state.tokens + self._tokens, 0, done
        self._journal.save()

    def discard(self) -> None:
        """Leave nothing behind of a piece that was not finished."""
        if self._piece is not None:
            self._piece.discard()


def merge(config: PrepareConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Write the prepared folder from its parts; the report of ``prepare``. The parts' pieces are removed at the end.

    Continues what an interrupted merge began; does nothing when the folder is complete. ``fresh`` writes all shards again. Raises
    ConfigError when a part is missing or unfinished, or when parts read different text; CorpusError for a damaged piece.
    """
    output, started = config.output, time.monotonic()
    require_ours(output)
    if (output / "manifest.json").exists():
        report = whole.finished(config)
        clear_parts(output, waiting=_WAITING)
        return report
    if not (output / "progress.json").exists():
        raise ConfigError("--merge", str(output), "no part was prepared there", "Run the parts first: --part 1/N to --part N/N")
    with locked(output), closing(Journal.open(output, whole.settings(config))) as journal:
        if journal.parts is None:
            raise ConfigError("--merge", str(output), "it was begun without parts", "Run the same command without --merge")
        parts = _finished_parts(output, journal.parts, whole.splits(config))
        if fresh:
            journal.restart()
        written, merging = 0, time.monotonic()
        for split, writer in whole.split_writers(config, journal):
            last = parts[0].splits[split]
            encoded = in_order([frames(part.pieces(split)) for part in parts], writer.documents, last.documents)
            written += writer.merge(encoded, last.source_hash)
        ended = time.monotonic()
        speed = {"seconds": round(ended - started, 3), "tokens_per_s": round(written / (ended - merging), 1)}
        report = whole.complete(config, journal, speed)
    clear_parts(output, waiting=_WAITING)
    return report


def _finished_parts(output: Path, count: int, splits: tuple[str, ...]) -> list[PartJournal]:
    """All parts of a folder. Raises ConfigError, naming those that are missing, unfinished, or of another text."""
    parts = {Part(number, count): PartJournal.open(Part(number, count).folder(output)) for number in range(1, count + 1)}
    missing = [str(part) for part, journal in parts.items() if not journal.splits]
    done = {
        part for part, journal in parts.items() if all(split in journal.splits and journal.splits[split].done for split in splits)
    }
    unfinished = [str(part) for part, journal in parts.items() if journal.splits and part not in done]
    if missing or unfinished:
        said = [f"{', '.join(names)} {what}" for names, what in ((missing, "missing"), (unfinished, "unfinished")) if names]
        raise ConfigError("--merge", "; ".join(said), f"all {count} parts are done", "Run these parts (again), then merge")
    for split in splits:
        read = {part: (journal.splits[split].documents, journal.splits[split].source_hash) for part, journal in parts.items()}
        for part, text in read.items():
            if text != read[Part(1, count)]:
                value = f"{text[0]} documents in part {part}, {read[Part(1, count)][0]} in part 1/{count}"
                rule = "all parts read the same text"
                raise ConfigError(f"source of {split}", value, rule, "Give all machines the same files; --fresh repeats a part")
    return list(parts.values())
