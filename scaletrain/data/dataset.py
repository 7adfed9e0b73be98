"""One split of a prepared folder: random access to its token chunks, each checked against the CRC-32 in the index.

The folder's manifest lists shards with their digests; an index beside every shard says where each chunk lies. Reading a chunk
is one ``pread`` of its span. A split is identified by a digest of what it holds and how it was tokenised, not of where it lies
or how it was made, so that a copy is the same data set and a changed one is not.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scaletrain import outside
from scaletrain.data import index, npy, words
from scaletrain.data.checksum import crc32
from scaletrain.data.files import Files
from scaletrain.data.tokenizer import folder_digest
from scaletrain.errors import CorpusError, TokenizerError

FORMAT = 1
_FILES_MAX = 64
_REMEDY = "Run 'scaletrain prepare' again, with --fresh if the folder cannot be repaired"


def canonical_digest(tree: object) -> str:
    """SHA-256 of the canonical JSON of ``tree``: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def split_digest(shards: Sequence[Mapping[str, Any]], tokenizer_digest: str, max_tokens: int) -> str:
    """The identity of a split: its shards' contents in order, the tokenizer that made them, and the longest chunk."""
    contents = [[shard["sha256"], shard["index_sha256"]] for shard in shards]
    return canonical_digest({"shards": contents, "tokenizer": tokenizer_digest, "max_tokens": max_tokens})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises CorpusError when it is missing, damaged or of another format."""
    file = folder / "manifest.json"
    try:
        return check_manifest(outside.read_json(file), str(file))
    except (FileNotFoundError, NotADirectoryError):
        rule = "a prepared folder has a manifest.json" if folder.exists() else "the prepared folder must exist"
        raise CorpusError(str(folder), "no manifest.json" if folder.exists() else "no such folder", rule, _REMEDY) from None
    except ValueError:
        raise CorpusError(str(file), "not JSON", "the manifest is written whole or not at all", _REMEDY) from None


def check_manifest(tree: object, name: str) -> dict[str, Any]:
    """The manifest that was read from ``name``. Raises CorpusError when it is damaged or of another format."""
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise CorpusError(f"{name}: format", found, f"this program reads format {FORMAT}", _REMEDY)
    expected = canonical_digest({key: value for key, value in tree.items() if key != "digest"})
    if tree.get("digest") != expected:
        raise CorpusError(f"{name}: digest", tree.get("digest"), f"its contents have {expected}", _REMEDY)
    return tree


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar with its index and the number of its first chunk."""

    file: Path
    first: int
    index: index.Index
    fault: CorpusError | None = None
    """Why it cannot be read as a whole, where it is already known."""


class Dataset:
    """One split of a prepared folder. Made by ``open``; ``read`` may be called from many threads.

    ``lengths`` has shape [chunks]: the tokens of each chunk, without special tokens. At two bytes for each (four where chunks are
    very long) it is all that a rank's memory holds of a corpus: the indexes are mapped, and shared by the ranks of a machine.
    """

    chunks: int
    tokens: int
    digest: str
    lengths: npt.NDArray[np.integer[Any]]
    max_tokens: int
    vocab_size: int
    tokenizer_digest: str
    tokenizer_folder: Path

    def __init__(
        self, folder: Path, split: str, manifest: Mapping[str, Any], shards: Sequence[Shard], files: Files | None = None
    ) -> None:
        self.folder, self.split = folder, split
        self.max_tokens, self.vocab_size = int(manifest["max_tokens"]), int(manifest["tokenizer"]["vocab_size"])
        self.tokenizer_digest, self.tokenizer_folder = manifest["tokenizer"]["digest"], folder / "tokenizer"
        self.digest = manifest["splits"][split]["digest"]
        self.lengths = np.empty(
            sum(len(shard.index.records) for shard in shards), np.uint16 if self.max_tokens < 65_000 else np.int32
        )
        for shard in shards:
            self.lengths[shard.first : shard.first + len(shard.index.records)] = shard.index.records["tokens"]
        self.lengths.setflags(write=False)
        self.chunks, self.tokens = len(self.lengths), int(self.lengths.sum(dtype=np.int64))
        self._shards, self._firsts = list(shards), [shard.first for shard in shards]
        self._files = files or Files(_FILES_MAX)

    @property
    def faults(self) -> list[tuple[CorpusError, int]]:
        """Of each shard that is missing or has another size: what is wrong, and the number of its chunks."""
        return [(shard.fault, len(shard.index.records)) for shard in self._shards if shard.fault is not None]

    @classmethod
    def open(cls, folder: Path, split: str = "train", *, tolerant: bool = False, files: Files | None = None) -> Dataset:
        """Open a split after checking that manifest, tokenizer, indexes and shards belong together (sizes, not every byte).

        ``tolerant``: a shard that is missing or has another size is no error here; ``faults`` has it, and reading from it is one.
        ``files``: what gives the shards where they do not lie in the folder; it finds out for itself what they are.
        Raises CorpusError when the folder or split is missing, empty or damaged, and TokenizerError when the tokenizer in the
        folder is not the one that made the shards.
        """
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise CorpusError(
                f"{folder}: split", split, f"it has {', '.join(manifest['splits'])}", "Prepare one with a validation set"
            )
        described = manifest["splits"][split]
        if not described["chunks"]:
            raise CorpusError(f"{folder}: split", split, "a split holds at least one chunk", _REMEDY)
        expected, found = manifest["tokenizer"]["digest"], folder_digest(folder / "tokenizer")
        if found != expected:
            raise TokenizerError(f"{folder / 'tokenizer'}: digest", found, f"the shards were made with {expected}", _REMEDY)
        if described["digest"] != split_digest(described["shards"], expected, manifest["max_tokens"]):
            raise CorpusError(f"{folder}: digest of {split!r}", described["digest"], "it does not match its shards", _REMEDY)
        firsts = itertools.accumulate((shard["chunks"] for shard in described["shards"]), initial=0)
        shards = [
            open_shard(folder, shard, first, here=files is None)
            for shard, first in zip(described["shards"], firsts, strict=False)
        ]
        for shard in shards:
            if shard.fault is not None and not tolerant:
                raise shard.fault
        return cls(folder, split, manifest, shards, files)

    def fetch(self, chunk: int) -> None:
        """Brings the shard of a chunk to this machine where it is not there yet, which may take minutes; `read` would, too.

        Raises CorpusError for one that is missing or damaged at its source, and StorageError where that does not answer.
        """
        self._files.fetch(self._shard(chunk).file)

    def shard_of(self, chunk: int) -> int:
        """The number of the shard that a chunk lies in."""
        return bisect.bisect_right(self._firsts, chunk) - 1

    def read(self, chunk: int) -> npt.NDArray[np.int32]:
        """The token ids of one chunk, shape [lengths[chunk]], int32, without special tokens.

        Raises what ``stored`` raises.
        """
        return words.plain(self.stored(chunk))

    def stored(self, chunk: int) -> npt.NDArray[np.int32]:
        """One chunk as it is stored: ids, or their complements where words start against the vocabulary's rule (``words``).

        Raises CorpusError when the bytes are not those that were indexed, StorageError when the disk fails.
        """
        shard, offset, span = self._span(chunk)
        crc = crc32(span)
        expected = int(shard.index.records[chunk - shard.first]["crc32"])
        if crc != expected:
            self._files.close(shard.file)
            raise index.damaged(shard.file, self._key(span), offset, expected, crc)
        try:
            member = next(index.members(lambda at, count: span[at : at + count], len(span), str(shard.file)))
            ids = npy.decode(memoryview(span)[member.data : member.data + member.size])
        except (ValueError, StopIteration):
            raise CorpusError(str(shard.file), f"byte {offset}", "a chunk is one .npy of integers", _REMEDY) from None
        return ids

    def key(self, chunk: int) -> str:
        """The sample key of one chunk, from its tar header: document and piece, equal however the shards are cut."""
        return self._key(self._span(chunk)[2])

    def verify(self) -> None:
        """Read every byte once and compare all CRCs; raises CorpusError at the first that differs."""
        for shard in self._shards:
            index.verify(shard.index, self._files.local(shard.file))

    def _span(self, chunk: int) -> tuple[Shard, int, bytes]:
        shard = self._shard(chunk)
        record = shard.index.records[chunk - shard.first]
        offset, length = int(record["offset"]), int(record["length"])
        if shard.fault is not None and not shard.file.exists():
            raise shard.fault  # known since it was opened: not a matter of trying again
        return shard, offset, self._files.whole(shard.file, offset, length, _REMEDY)

    def _shard(self, chunk: int) -> Shard:
        if not 0 <= chunk < self.chunks:
            raise IndexError(f"chunk: got {chunk}; {self.folder} has chunks 0 to {self.chunks - 1}")
        return self._shards[bisect.bisect_right(self._firsts, chunk) - 1]

    @staticmethod
    def _key(span: bytes) -> str:
        try:
            return next(index.members(lambda at, count: span[at : at + count], len(span), "")).key
        except (CorpusError, StopIteration):
            return "?"


@dataclass(frozen=True, slots=True)
class AsStored:
    """A data set for a task that masks: its chunks come with the marks of their words."""

    dataset: Dataset

    @property
    def digest(self) -> str:
        return self.dataset.digest

    def fetch(self, chunk: int) -> None:
        """As ``Dataset.fetch``."""
        self.dataset.fetch(chunk)

    def shard_of(self, chunk: int) -> int:
        """As ``Dataset.shard_of``."""
        return self.dataset.shard_of(chunk)

    def read(self, chunk: int) -> npt.NDArray[np.int32]:
        """What ``Dataset.stored`` gives."""
        return self.dataset.stored(chunk)


def open_shard(folder: Path, described: Mapping[str, Any], first: int, *, here: bool = True) -> Shard:
    """Check one index, and a shard that is ``here``, against the manifest."""
    try:
        file, fault = outside.plain(folder, described["file"]), None
        outside.plain(folder, str(Path(described["file"]).with_suffix(".idx")))
    except ValueError as error:
        raise CorpusError(f"{folder}: manifest.json", str(error), "shards are plain files in the folder", _REMEDY) from None
    try:
        size = file.stat().st_size if here else described["bytes"]
        if size != described["bytes"]:
            fault = CorpusError(str(file), f"{size} bytes", f"the manifest says {described['bytes']}", _REMEDY)
    except FileNotFoundError:
        fault = CorpusError(str(file), "no such file", "the manifest lists it", _REMEDY)
    loaded = index.load(file.with_suffix(".idx"), shard_bytes=described["bytes"])
    found = hashlib.sha256(file.with_suffix(".idx").read_bytes()).hexdigest()
    if found != described["index_sha256"] or len(loaded.records) != described["chunks"]:
        raise CorpusError(str(file.with_suffix(".idx")), found, f"the manifest says {described['index_sha256']}", _REMEDY)
    return Shard(file, first, loaded, fault)
