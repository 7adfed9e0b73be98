"""A page about a run or a lineage, whether it is going, done or broken: one HTML file.

It takes no lock and changes nothing else: what a job is writing at the moment may be missing from the page.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scaletrain
from scaletrain import durable, report
from scaletrain.continual import store
from scaletrain.errors import InputError, StorageError
from scaletrain.recipes import records


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What the page is about, and where it goes."""

    run: Path
    """Folder of a training run (its `output`), or of a lineage."""
    output: Path | None = None
    """The HTML file; none: `report.html` in the folder."""


Config = ReportConfig


def main(config: ReportConfig) -> dict[str, Any]:
    """Writes the page. Returns where it is, and what it is about.

    Raises InputError for a folder that is neither a run's nor a lineage's, StorageError where the page cannot be written.
    """
    kind = kind_of(config.run)
    made = f"Made by scaletrain {scaletrain.__version__} on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."
    origin = f"Read from {config.run.resolve()}"
    if kind == "lineage":
        page = report.lineage_page(records.read_lineage(config.run, time.time()), origin, made)
    else:
        page = report.run_page(records.read_run(config.run, time.time()), origin, made)
    output = config.output or config.run / "report.html"
    text = report.render(page).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        durable.write(output, text)
    except OSError as error:
        raise StorageError(f"output: got {str(output)!r}; the page cannot be written there: {error}. Make room") from error
    return {"report": str(output), "kind": kind, "status": page.status.text, "bytes": len(text)}


def kind_of(folder: Path) -> str:
    """``run`` or ``lineage``, by the files that are there. Raises InputError, naming folders below that would do."""
    if (folder / store.LEDGER).is_file():
        return "lineage"
    if any((folder / name).is_file() for name in records.RUN_FILES):
        return "run"
    below = sorted({file.parent for name in (store.LEDGER, *records.RUN_FILES) for file in folder.glob(f"*/{name}")})
    remedy = f"Give one of {', '.join(map(str, below))}" if below else "Give the folder that the verb calls output"
    rule = f"neither a run ({' or '.join(records.RUN_FILES)}) nor a lineage ({store.LEDGER}) lies there"
    raise InputError("run", str(folder), rule, remedy)
