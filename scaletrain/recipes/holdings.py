"""What a folder of data holds: of a prepared one by its manifest and indexes, of tars that others wrote by their headers."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaletrain.data import foreign, index, survey
from scaletrain.data.dataset import Shard, open_shard, read_manifest
from scaletrain.data.sources.files import expand
from scaletrain.data.tokenizer import folder_digest, token_texts
from scaletrain.errors import CorpusError, TokenizerError
from scaletrain.report import Histogram, Part, by_power, by_width

LENGTH_BARS = 16
FREQUENT = 30


class Reading(NamedTuple):
    """How the folder is read."""

    processes: int
    verify: bool
    index_folder: Path | None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it was written: a sample by its number in the split and its key, or a whole file."""

    file: str
    problem: str
    split: str | None = None
    sample: int | None = None
    key: str | None = None
    offset: int | None = None

    @property
    def where(self) -> str:
        return (
            self.file if self.sample is None else f"{self.file}: sample {self.key!r}, number {self.sample}, at byte {self.offset}"
        )


@dataclass(frozen=True, slots=True)
class Holdings:
    """What was found, and how many bytes were compared in how many seconds."""

    kind: str
    facts: Mapping[str, str | int]
    parts: tuple[Part, ...]
    faults: list[Fault]
    bytes_read: int = 0
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------------------- prepared folders


def of_prepared(folder: Path, reading: Reading) -> Holdings:
    """Of what `scaletrain prepare` wrote. Raises CorpusError for a manifest that cannot be trusted; all else is a fault."""
    manifest = read_manifest(folder)
    texts, faults = _token_texts(folder, manifest)
    parts, bytes_read, seconds = [], 0, 0.0
    for split, described in manifest["splits"].items():
        shards, lost = _shards(folder, described["shards"])
        began = time.monotonic()
        checked = list(_check(shards, manifest["tokenizer"]["vocab_size"], reading)) if reading.verify else []
        seconds += time.monotonic() - began
        faults += lost + [_named(damage, split) for each in checked for damage in each.damaged]
        bytes_read += sum(each.bytes for each in checked)
        documents = manifest.get("report", {}).get("splits", {}).get(split, {}).get("documents", {})
        parts.append(_split(split, described, documents, shards, checked, texts))
    facts = {
        "digest": manifest["digest"],
        "tokenizer": manifest["tokenizer"]["digest"],
        "vocabulary": manifest["tokenizer"]["vocab_size"],
        "max_tokens": manifest["max_tokens"],
    }
    return Holdings("prepared data", facts, tuple(parts), faults, bytes_read, seconds)


def _token_texts(folder: Path, manifest: Mapping[str, Any]) -> tuple[Mapping[int, str], list[Fault]]:
    expected, file = manifest["tokenizer"]["digest"], str(folder / "tokenizer")
    try:
        found = folder_digest(folder / "tokenizer")
        faults = [] if found == expected else [Fault(file, f"digest {found}, the shards were made with {expected}")]
        return token_texts(folder / "tokenizer"), faults
    except TokenizerError as error:
        return {}, [Fault(file, str(error))]


def _shards(folder: Path, described: Sequence[Mapping[str, Any]]) -> tuple[list[Shard], list[Fault]]:
    """The shards whose indexes are whole, and what is wrong with the others and with files that are missing or cut short."""
    shards, faults, first = [], [], 0
    for each in described:
        try:
            shards.append(open_shard(folder, each, first))
        except CorpusError as error:
            faults.append(Fault(str(folder / each["file"]), f"{each['chunks']} samples without an index: {error}"))
        else:
            if shards[-1].fault is not None:
                faults.append(Fault(str(shards[-1].file), _missing(shards[-1])))
        first += each["chunks"]
    return shards, faults


def _missing(shard: Shard) -> str:
    there = _there(shard)
    lost = len(shard.index.records) - len(there)
    return f"{_said(shard.fault, shard.file)}; {lost} of its {len(shard.index.records)} samples are not there"


def _said(error: CorpusError | None, file: Path) -> str:
    """An error without the name of the file that it is about, which stands before it."""
    return str(error).removeprefix(f"{file}: ")


def _there(shard: Shard) -> index.Records:
    """The samples that end before the file does."""
    size = shard.file.stat().st_size if shard.file.exists() else 0
    records: index.Records = shard.index.records
    there: index.Records = records[records["offset"] + records["length"] <= size]
    return there


def _check(shards: Sequence[Shard], vocab_size: int, reading: Reading) -> Iterator[survey.Checked]:
    parts = [part for shard in shards for part in survey.stretches(shard.file, shard.first, _there(shard))]
    return survey.check_all(parts, vocab_size, reading.processes)


def _named(damage: survey.Damage, split: str | None) -> Fault:
    return Fault(str(damage.file), damage.problem, split, damage.sample, damage.key, damage.offset)


def _split(
    name: str,
    described: Mapping[str, Any],
    documents: Mapping[str, Any],
    shards: Sequence[Shard],
    checked: Sequence[survey.Checked],
    texts: Mapping[int, str],
) -> Part:
    lengths = np.concatenate([np.empty(0, np.int64), *(shard.index.records["tokens"].astype(np.int64) for shard in shards)])
    counts: dict[str, float] = {f"documents_{key}": count for key, count in documents.items() if key != "dropped"}
    counts |= {"chunks": described["chunks"], "tokens": described["tokens"], "shards": len(described["shards"])}
    if len(lengths):
        counts["mean_tokens_per_chunk"] = round(float(lengths.mean()), 1)
        counts["median_tokens_per_chunk"] = float(np.median(lengths))
    histograms = [
        Histogram(title="Length", unit="chunks", x_name="tokens per chunk", bars=by_width(_tally(lengths), LENGTH_BARS))
    ]
    occurrences = np.sum([each.occurrences for each in checked], axis=0) if checked else np.empty(0, np.int64)
    if len(occurrences):
        bars = by_power(_tally(occurrences), 4, none="never")
        histograms.append(Histogram(title="Frequency", unit="tokens of the vocabulary", x_name="occurrences", bars=bars))
    return Part(
        name=name,
        counts=counts,
        bytes=sum(shard["bytes"] for shard in described["shards"]),
        dropped=documents.get("dropped", {}),
        histograms=tuple(histograms),
        frequent=tuple(_frequent(occurrences, texts)),
    )


def _tally(values: survey.I64) -> dict[int, int]:
    """How often each value comes."""
    found, times = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), times.tolist(), strict=True))


def _frequent(occurrences: survey.I64, texts: Mapping[int, str]) -> Iterator[tuple[str, int, float]]:
    total = max(int(occurrences.sum()), 1)
    for token in np.argsort(-occurrences, kind="stable")[:FREQUENT].tolist():
        if occurrences[token]:
            yield texts.get(token, f"token {token}"), int(occurrences[token]), int(occurrences[token]) / total


# ------------------------------------------------------------------------------------------------------- tars that others wrote


def of_tars(folder: Path, reading: Reading) -> Holdings:
    """Of plain tars; nothing is written, and those without an index are read by their headers. Faults: what cannot be indexed."""
    tars = expand([str(folder)], (".tar",), "data")
    looked = list(_look_at_all(tars, reading))
    sizes = np.concatenate([np.empty(0, np.int64), *(each.records["length"].astype(np.int64) for each in looked)])
    faults, bytes_read, first, parts = [each.fault for each in looked if each.fault], 0, 0, list[survey.Stretch]()
    for tar, each in zip(tars, looked, strict=True):
        parts += survey.stretches(tar, first, each.records) if each.indexed else []
        first += len(each.records)
    began = time.monotonic()
    for checked in survey.check_all(parts, 0, reading.processes) if reading.verify else ():
        bytes_read += checked.bytes
        faults += [_named(damage, None) for damage in checked.damaged]
    seconds = time.monotonic() - began
    members: Counter[str] = sum((each.members for each in looked), Counter())
    counts = {"samples": len(sizes), "tars": len(tars), "tars_with_index": sum(each.indexed for each in looked)}
    bars = by_power(_tally(sizes), 4, none="0")
    part = Part(
        name="tars",
        counts=counts | {f"members_.{suffix}": count for suffix, count in members.most_common()},
        bytes=sum(tar.stat().st_size for tar in tars),
        dropped={},
        histograms=(Histogram(title="Size", unit="samples", x_name="bytes in the tar", bars=bars),),
    )
    return Holdings("tars that others wrote", {}, (part,), faults, bytes_read, seconds)


class _Looked(NamedTuple):
    records: index.Records
    members: Counter[str]
    indexed: bool
    fault: Fault | None = None


def _look_at_all(tars: Sequence[Path], reading: Reading) -> Iterator[_Looked]:
    if reading.processes == 1 or len(tars) < 2:
        yield from map(_look, tars, itertools.repeat(reading.index_folder))
        return
    with ProcessPoolExecutor(min(reading.processes, len(tars)), get_context("spawn")) as pool:
        yield from pool.map(_look, tars, itertools.repeat(reading.index_folder))


def _look(tar: Path, index_folder: Path | None) -> _Looked:
    try:
        known = foreign.indexed(tar, index_folder)
        found = known or index.build(tar)
        return _Looked(np.array(found.records), _suffixes(tar), known is not None)
    except CorpusError as error:
        return _Looked(np.empty(0, index.RECORD), Counter(), False, Fault(str(tar), _said(error, tar)))


def _suffixes(tar: Path) -> Counter[str]:
    """How many members there are of each kind: what follows the first dot of the base name; up to a header that is damaged."""
    counts: Counter[str] = Counter()
    with tar.open("rb", buffering=0) as file, contextlib.suppress(CorpusError):
        size = os.fstat(file.fileno()).st_size
        for member in index.members(lambda at, count: os.pread(file.fileno(), count, at), size, str(tar)):
            counts.update([member.name[len(member.key) + 1 :]] if member.key else [])
    return counts
