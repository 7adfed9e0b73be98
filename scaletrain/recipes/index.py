"""``scaletrain index``: indexes for tars that others wrote, or a check of every byte against them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from scaletrain.data import foreign, index
from scaletrain.data.sources.files import expand
from scaletrain.errors import CorpusError


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Which tars."""

    tars: tuple[str, ...]
    """Tar files (not compressed), globs, or folders that are searched whole."""
    index_folder: Path | None = None
    """Where the indexes go; none given: each beside its tar, as NAME.tar.stidx."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes that read; none given: one per core."""
    check: bool = False
    """Read every byte and compare it with the indexes that are there, instead of making any."""


Config = IndexConfig


def main(config: IndexConfig) -> dict[str, Any]:
    """Makes the indexes that are missing, or checks those there are; prints a line per tar and returns the totals.

    Raises CorpusError for a tar that cannot be indexed, or, having checked them all, where some are damaged.
    """
    tars = expand(config.tars, (".tar",), "tars")
    processes = config.processes or len(os.sched_getaffinity(0))
    began = time.monotonic()
    made = 0
    if config.check:
        _check(tars, config, processes)
    else:
        for tar, new in foreign.build(tars, config.index_folder, processes):
            made += new
            found = foreign.indexed(tar, config.index_folder)
            print(f"{tar}: {len(found.records) if found else 0:,} samples{'' if new else ', indexed before'}")
    samples = sum(len(each.records) for tar in tars if (each := foreign.indexed(tar, config.index_folder)))
    size = sum(tar.stat().st_size for tar in tars)
    seconds = max(time.monotonic() - began, 1e-9)
    return {"tars": len(tars), "samples": samples, "bytes": size, "made": made, "gb_per_s": round(size / 1e9 / seconds, 3)}


def _check(tars: Sequence[Path], config: IndexConfig, processes: int) -> None:
    """Raises CorpusError, with a note for each, where any tar is not the one that its index was made for."""
    faults = []
    for tar, fault in _verdicts(tars, config.index_folder, processes):
        print(fault or f"{tar}: whole")
        faults += [fault] if fault else []
    if faults:
        said = f"{len(faults)} of {len(tars)} damaged"
        error = CorpusError("tars", said, "every byte is the one that was indexed", "Restore them from a copy")
        for fault in faults:
            error.add_note(fault)
        raise error


def _verdicts(tars: Sequence[Path], folder: Path | None, processes: int) -> Iterator[tuple[Path, str]]:
    with ProcessPoolExecutor(min(processes, len(tars)), get_context("spawn")) as pool:
        yield from zip(tars, pool.map(_fault, tars, [folder] * len(tars)), strict=True)


def _fault(tar: Path, folder: Path | None) -> str:
    """What is wrong with a tar; empty where nothing is."""
    found = foreign.indexed(tar, folder)
    if found is None:
        return f"{tar}: no index that fits it"
    try:
        index.verify(found, tar)
    except CorpusError as error:
        return str(error)
    return ""
