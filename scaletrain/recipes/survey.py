"""``scaletrain inspect data``: what is in a folder of prepared shards or of tars that others wrote, with every byte verified."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import scaletrain
from scaletrain import durable, report
from scaletrain.data import urls
from scaletrain.errors import ConfigError, CorpusError, StorageError
from scaletrain.recipes import holdings
from scaletrain.report import Part, SurveyRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class SurveyConfig:
    """Which data, and what is done with it."""

    data: str
    """A prepared folder, or one with tars that others wrote; on this machine."""
    verify: bool = True
    """Read every byte and compare every CRC-32; without it no token is counted either."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes that read; none given: one per core."""
    index_folder: Path | None = None
    """Where the indexes of tars that others wrote are; none given: each beside its tar."""
    output: Path | None = None
    """The HTML file with the pictures; none: `inspect.html` in the folder, where it can be written."""


Config = SurveyConfig


def main(config: SurveyConfig) -> dict[str, Any]:
    """Prints what there is, writes a page with pictures, and returns the figures.

    Raises ConfigError for a URL, and CorpusError, having looked at everything, printed the figures and named each damaged sample,
    where there is one.
    """
    if urls.is_remote(config.data):
        rule = "what lies elsewhere is not inspected from here; a run that reads it checks every shard that it copies"
        raise ConfigError("data", urls.shown(config.data), rule, "Inspect it where it lies, or copy it first")
    folder = Path(config.data)
    reading = holdings.Reading(config.processes or len(os.sched_getaffinity(0)), config.verify, config.index_folder)
    look = holdings.of_prepared if (folder / "manifest.json").exists() else holdings.of_tars
    survey = look(folder, reading)
    speed = survey.bytes_read / 1e9 / max(survey.seconds, 1e-9)
    verified = None
    if survey.bytes_read:
        verified = f"Every CRC of {report.size(survey.bytes_read)} compared in {survey.seconds:.2f} s, {speed:.2f} GB/s."
    record = SurveyRecord(
        name=folder.resolve().name,
        kind=survey.kind,
        facts=survey.facts,
        parts=survey.parts,
        verified=verified,
        damaged=[(fault.where, fault.problem) for fault in survey.faults],
    )
    for line in _lines(record):
        print(line)
    page = _write(record, config)
    print(f"page: {page}" if page else "page: none written")
    result = {
        "data": config.data,
        "kind": survey.kind,
        **survey.facts,
        "parts": {part.name: _figures(part) for part in survey.parts},
        "verified_bytes": survey.bytes_read,
        "gb_per_s": round(speed, 3),
        "damaged": [asdict(fault) for fault in survey.faults],
        "page": str(page) if page else None,
    }
    if survey.faults:
        print(json.dumps(result), flush=True)
        raise _error(folder, survey.faults)
    return result


def _error(folder: Path, faults: Sequence[holdings.Fault]) -> CorpusError:
    remedy = "Restore the shards that are named from a copy, or prepare the folder again with --fresh"
    return CorpusError(str(folder), f"{len(faults)} faults", "every byte is the one that was indexed", remedy)


def _figures(part: Part) -> dict[str, Any]:
    histograms = {histogram.title: dict(histogram.bars) for histogram in part.histograms}
    return {**part.counts, "bytes": part.bytes, "dropped": dict(part.dropped), "histograms": histograms}


def _lines(record: SurveyRecord) -> Iterator[str]:
    """The page in text."""
    facts = ", ".join(f"{report.spaced(name)} {report.written(value)}" for name, value in record.facts.items())
    yield f"{record.name}: {record.kind}" + (f" ({facts})" if facts else "")
    for part in record.parts:
        counts = ", ".join(f"{count:,} {report.spaced(name)}" for name, count in part.counts.items())
        lost = ", ".join(f"{count:,} {report.spaced(reason)}" for reason, count in part.dropped.items() if count)
        yield f"{part.name}: {counts}, {part.bytes:,} bytes" + (f"; dropped: {lost}" if lost else "")
        for histogram in part.histograms:
            yield f"  {histogram.unit} by {histogram.x_name}"
            yield from (f"    {line}" for line in report.bar_lines(histogram))
    yield record.verified or "No byte was compared with anything."
    for where, problem in record.damaged:
        yield f"damaged: {where}: {problem}"


def _write(record: SurveyRecord, config: SurveyConfig) -> Path | None:
    """The page's place. A folder of data that cannot be written to is no fault; a place that was asked for is."""
    file = config.output or Path(config.data) / "inspect.html"
    made = f"Made by scaletrain {scaletrain.__version__} on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."
    text = report.render(report.survey_page(record, f"Read from {Path(config.data).resolve()}", made))
    try:
        if config.output:
            file.parent.mkdir(parents=True, exist_ok=True)
        durable.write(file, text.encode())
    except OSError as error:
        if config.output:
            raise StorageError(f"output: got {str(file)!r}; the page cannot be written there: {error}. Make room") from error
        print(f"warning: {file} cannot be written ({error}); output=FILE puts the page elsewhere", file=sys.stderr)
        return None
    return file
