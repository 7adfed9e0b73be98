"""Raw text to a prepared folder: cleaned, tokenised, in indexed tar shards, with a manifest that is written last.

The folder is a function of the source and the settings: the same bytes for any number of processes, and whether or not the run
was interrupted. Each split is read from its source once; a validation share is taken by a hash of each document's text, so that
equal texts land on one side. The folder counts as prepared if and only if ``manifest.json`` verifies.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from scaletrain.config import to_tree
from scaletrain.data import dataset, encode, index, words
from scaletrain.data import tokenizer as tokenizers
from scaletrain.data.clean import DROPPED, CleanConfig, clean, dropped, share, text_hash
from scaletrain.data.duplicates import DeduplicateConfig, ExactConfig, Known, MinHashConfig, require_usable
from scaletrain.data.journal import SPLITS, Journal, clear, locked, require_ours, require_same
from scaletrain.data.shards import storage, write_atomically, write_json
from scaletrain.data.sources import SourceConfig, StdlibConfig
from scaletrain.data.splits import SplitWriter
from scaletrain.data.tokenizer import PretrainedConfig, TokenizerConfig, WordPieceConfig
from scaletrain.errors import ConfigError, CorpusError

_LENGTH_BINS = 8
_LATER: tuple[tuple[str, str, Any], ...] = (
    ("", "segmenter", "none"),
    ("clean", "unwrap", False),
    ("tokenizer", "nfkc", False),
    ("tokenizer", "character_sets", []),
)
"""Settings that came later: in which part, their name, and the value that changes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """From raw text to a prepared folder."""

    output: Path
    """The folder to write: new, empty, or one that an interrupted run with the same settings left."""
    source: SourceConfig = field(default_factory=StdlibConfig)
    """Where the training text comes from."""
    validation: SourceConfig | None = None
    """Where held-out text comes from; what also occurs in train is left out."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Instead of a source of its own: share of the documents that is held out."""
    seed: int = 0
    """Which documents ``validation_fraction`` picks."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """What happens to a document before it is tokenised."""
    deduplicate: DeduplicateConfig = field(default_factory=ExactConfig)
    """Which documents count as repeating an earlier one, and are dropped."""
    tokenizer: TokenizerConfig = field(default_factory=WordPieceConfig)
    """Train a vocabulary on the training text, or load one."""
    max_tokens: Annotated[int, Field(ge=8, le=1 << 20)] = 126
    """Longest chunk, without special tokens; longer documents are cut into pieces, between words where possible."""
    segmenter: words.Segmenter = "none"
    """Where words start in Chinese, for whole-word masking; the model reads characters as before. Needs scaletrain[chinese]."""
    chunks_per_shard: Annotated[int, Field(ge=1)] = 16_384
    """A shard ends with the document that reaches this many chunks."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes that tokenise; none given: one per core. The bytes do not depend on it."""

    def __post_init__(self) -> None:
        if self.validation is not None and self.validation_fraction:
            rule = "held-out text comes from 'validation' or from a fraction of 'source', not from both"
            raise ConfigError("validation_fraction", self.validation_fraction, rule, "Leave one of them out")


def prepare(config: PrepareConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Prepare the folder ``config.output`` and return the report that is also written there as ``report.json``.

    The report has, for each split, documents read, kept and dropped by reason, chunks, tokens and their histogram; the seconds of
    this call; and in ``tokens_per_s`` how fast it cleaned, tokenised and wrote (learning the vocabulary left out).

    Continues what an interrupted run with the same settings began; does nothing when the folder is complete. ``fresh``: remove
    what an earlier run made and start over. Raises CorpusError for a source that is missing or empty, TokenizerError, ConfigError
    for a folder of something else or with other settings, StorageError when the disk is full or read-only.
    """
    folder, started = config.output, time.monotonic()
    if not fresh and (folder / "manifest.json").exists():
        return finished(config)
    require_ours(folder)
    require_inputs(config)
    with ExitStack() as held:
        held.enter_context(locked(folder))
        if fresh:
            clear(folder)
        journal = held.enter_context(closing(Journal.open(folder, settings(config))))
        if journal.parts is not None:
            rule = f"{folder} was begun in {journal.parts} parts"
            raise ConfigError("--part", None, rule, "Run the parts and then --merge, or start over with --fresh")
        make_tokenizer(config, journal)
        written, tokenising = 0, time.monotonic()
        for split, writer in split_writers(config, journal):
            written += writer.encode(source_of(config, split).documents(), recipe(config, split), processes(config))
        ended = time.monotonic()
        speed = {"seconds": round(ended - started, 3), "tokens_per_s": round(written / (ended - tokenising), 1)}
        return complete(config, journal, speed)


def settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the folder's bytes, as a plain tree.

    Settings that came later are left out where they change nothing: a folder made before them is still the same one.
    """
    tree = {key: value for key, value in to_tree(config).items() if key not in ("output", "processes")}
    for place, name, neutral in _LATER:
        part = tree[place] if place else tree
        if part.get(name) == neutral:
            del part[name]
    if "segmenter" in tree:
        tree["segmenter"] = words.described(config.segmenter)
    return tree


def splits(config: PrepareConfig) -> tuple[str, ...]:
    """The splits that are made, in order: what is in train is not in validation."""
    return SPLITS if config.validation or config.validation_fraction else SPLITS[:1]


def source_of(config: PrepareConfig, split: str) -> SourceConfig:
    """Where the text of a split comes from."""
    return config.validation if split == "validation" and config.validation is not None else config.source


def processes(config: PrepareConfig) -> int:
    """How many processes tokenise."""
    return config.processes or len(os.sched_getaffinity(0))


def require_inputs(config: PrepareConfig) -> None:
    """Raise before anything is written: CorpusError for a source that is missing or empty, ConfigError for a library that is."""
    require_usable(config.deduplicate)
    words.load(config.segmenter)
    for source in (config.source, config.validation):
        if source is not None and next(iter(source.documents()), None) is None:
            raise CorpusError(
                f"source {source.name}", "no documents", "a corpus holds at least one", "Check the path and the field"
            )


def finished(config: PrepareConfig) -> dict[str, Any]:
    """The report of a folder that is complete and whole, made with the same settings."""
    folder = config.output
    manifest = dataset.read_manifest(folder)
    require_same(folder, manifest["config"], settings(config))
    for split in manifest["splits"]:
        dataset.Dataset.open(folder, split)
    return {"status": "already prepared", "output": str(folder), "digest": manifest["digest"], **manifest["report"]}


def complete(config: PrepareConfig, journal: Journal, speed: dict[str, float]) -> dict[str, Any]:
    """Write report and manifest of a folder whose splits are written; the report."""
    folder, manifest = journal.folder, _manifest(config, journal)
    report = {"status": "prepared", "output": str(folder), "digest": manifest["digest"], **manifest["report"], **speed}
    write_json(folder / "report.json", report)
    write_json(folder / "manifest.json", manifest)
    journal.remove()
    return report


def make_tokenizer(config: PrepareConfig, journal: Journal) -> None:
    """Train or load the tokenizer into the folder, unless the journal knows it."""
    folder = journal.folder / "tokenizer"
    if journal.tokenizer is not None:
        tokenizers.require_fit(folder, journal.tokenizer)
        return
    if isinstance(config.tokenizer, PretrainedConfig):
        made = tokenizers.load(config.tokenizer)
    else:
        reader = _TrainingTexts(config)
        made = tokenizers.train(config.tokenizer, reader.texts, max_tokens=config.max_tokens)
        journal.documents = reader.documents
    # By way of a temporary folder, since the library reports a full disk in ways of its own.
    with tempfile.TemporaryDirectory() as temporary:
        made.save_pretrained(temporary)
        with storage(journal.folder):
            folder.mkdir(exist_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            write_atomically(folder / file.name, file.read_bytes())
    tokenizers.Vocabulary.open(folder)
    journal.tokenizer = tokenizers.folder_digest(folder)
    journal.save()


class _TrainingTexts:
    """The clean training documents, each once: what a vocabulary is learned from."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.documents = 0

    def texts(self) -> Iterator[str]:
        """Read the source from its start."""
        config, seen = self._config, set[bytes]()
        training_share = getattr(config.tokenizer, "training_share", 1.0)
        self.documents = 0
        for document in config.source.documents():
            self.documents += 1
            text = clean(document, config.clean)
            if dropped(text, config.clean):
                continue
            hashed = text_hash(text)
            held_out = share(hashed, "validation", config.seed) < config.validation_fraction
            if not held_out and hashed not in seen and share(hashed, "tokenizer") < training_share:
                seen.add(hashed)
                yield text


def recipe(config: PrepareConfig, split: str) -> encode.Recipe:
    """What decides the bytes of a document's chunks in a split."""
    return encode.Recipe(
        tokenizer=str(config.output / "tokenizer"),
        max_tokens=config.max_tokens,
        clean=config.clean,
        held_out=config.validation_fraction,
        seed=config.seed,
        validation=split == "validation",
        segmenter=config.segmenter,
        near=config.deduplicate if isinstance(config.deduplicate, MinHashConfig) else None,
    )


def split_writers(config: PrepareConfig, journal: Journal) -> Iterator[tuple[str, SplitWriter]]:
    """What writes the shards of each split."""
    known = Known(config.deduplicate, journal.logs, SPLITS)
    for split in splits(config):
        expected = journal.documents if source_of(config, split) is config.source else None
        yield split, SplitWriter(journal, split, known, chunks_per_shard=config.chunks_per_shard, expected=expected)


def _manifest(config: PrepareConfig, journal: Journal) -> dict[str, Any]:
    """What ``dataset`` reads, and the part of the report that is the same for every run with these settings."""
    vocabulary = tokenizers.Vocabulary.open(journal.folder / "tokenizer")
    report: dict[str, Any] = {"vocab_size": vocabulary.size, "splits": {}}
    described = {}
    for split, state in journal.splits.items():
        totals = {name: sum(shard[name] for shard in state.shards) for name in ("chunks", "tokens")}
        digest = dataset.split_digest(state.shards, vocabulary.digest, config.max_tokens)
        described[split] = {"digest": digest, **totals, "shards": state.shards}
        reasons = {reason: state.counts.get(reason, 0) for reason in DROPPED}
        documents = {"read": state.documents, "kept": state.counts.get("kept", 0), "held_out": state.counts.get("held_out", 0)}
        if split == "validation" and config.validation_fraction:  # the others of that source were counted in the pass over train
            documents |= {"read": state.documents - documents["held_out"], "held_out": 0}
        lengths = length_histogram(journal.folder, state.shards, config.max_tokens)
        report["splits"][split] = {"documents": {**documents, "dropped": reasons}, **totals, "lengths": lengths}
    manifest = {
        "format": dataset.FORMAT,
        "max_tokens": config.max_tokens,
        "tokenizer": {"digest": vocabulary.digest, "vocab_size": vocabulary.size, "files": _files(journal.folder / "tokenizer")},
        "splits": described,
        "report": report,
        "config": settings(config),
    }
    return {"digest": dataset.canonical_digest(manifest), **manifest}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a folder, for those who have no way to list it."""
    contents = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}


def length_histogram(folder: Path, shards: list[dict[str, Any]], max_tokens: int) -> dict[str, int]:
    """How many chunks have how many tokens, in eight bins of equal width: '1-16' -> chunks."""
    lengths = np.concatenate([index.load((folder / shard["file"]).with_suffix(".idx")).records["tokens"] for shard in shards])
    edges = np.unique(np.linspace(0, max_tokens, _LENGTH_BINS + 1).astype(np.int64))
    counts = np.bincount(np.searchsorted(edges, lengths, side="left"), minlength=len(edges))
    return {f"{low + 1}-{high}": int(counts[position]) for position, (low, high) in enumerate(itertools.pairwise(edges), 1)}
