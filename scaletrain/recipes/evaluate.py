"""How good a classifier is on labelled texts: exact, on any number of ranks."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from scaletrain import dist, durable
from scaletrain.continual.store import EVALUATION
from scaletrain.data import curate, tables
from scaletrain.data.curate import Row
from scaletrain.data.freeze import MANIFEST, thaw
from scaletrain.data.sources.files import expand
from scaletrain.data.tables import ColumnsConfig, Example
from scaletrain.errors import ConfigError, CorpusError
from scaletrain.model import Block
from scaletrain.recipes.starting import model_folder, named, open_classifier
from scaletrain.recipes.student import ComputeConfig, Student
from scaletrain.tasks.classification import Scenario
from scaletrain.tasks.confusion import Confusion, report_text
from scaletrain.train.control import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Which classifier, and on what."""

    model: str
    """A model folder, a fine-tuning run, or a lineage, which stands for its published model."""
    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Labelled texts, as a task's `data.test`."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Which column holds what."""
    output: Path
    """The folder for report.json, and exit.json."""
    task: str | None = None
    """The task that the texts are of; empty where the model knows one only."""
    scenario: Scenario = "class"
    """`class`: any label of any task may be the answer. `task`: those of the task only."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """What runs it."""


Config = EvaluateConfig


def main(config: EvaluateConfig) -> dict[str, Any] | None:
    """Evaluates; returns the figures on rank 0 and leaves them, with the per-class report, in report.json."""
    if (config.output / "config.yaml").exists():
        rule = "a run or a lineage is there, which has an exit.json, and perhaps a report.json, of its own"
        raise ConfigError("output", str(config.output), rule, "Choose another folder")
    with Session(config.output, config.compute.device) as session:
        origin = open_classifier(config.model)
        student = Student(config.compute, origin, session.device, scenario=config.scenario)
        block = chosen_block(student.blocks, config.task)
        rows = _read(config)
        examples = [example for _, example in curate.distinct(rows)]
        _check_labels(rows, block)
        counts = {"examples": len(examples), "duplicates": len(rows) - len(examples)}
        counts["in_train"] = dist.from_first("reading what the model was trained on", lambda: _seen(config, examples))
        table = student.score(student.encode(named(block.task, examples)))
        confusion = Confusion.of(table[:, 1], table[:, 2], len(student.labels))
        result = {"task": block.task, **counts, **student.task([], 0).summary(table)}
        labels = confusion.per_label(student.labels)

        def write() -> None:
            report = {**result, "labels": labels, "mistakes": confusion.worst(student.labels)}
            durable.write(config.output / "report.json", json.dumps(report, indent=1).encode())
            print(report_text(labels), flush=True)

        dist.from_first("writing the report", write)
        return result if dist.rank() == 0 else None


def _read(config: EvaluateConfig) -> list[Row]:
    files = expand([str(path) for path in config.files], tables.SUFFIXES, "files")
    rows = [row for file in files for row in tables.examples(file, config.columns)]
    if config.columns.key is not None:
        curate.check_keys(rows)
    return curate.with_text(rows, "error")


def _check_labels(rows: Sequence[Row], block: Block) -> None:
    for where, example in rows:
        if example.label not in block.labels:
            close = difflib.get_close_matches(example.label, block.labels, n=1)
            rule = f"{block.task} has been learned with {len(block.labels)} labels: {', '.join(block.labels[:20])}"
            remedy = f"Did you mean {close[0]!r}?" if close else "Correct the label, or leave the example out"
            raise CorpusError(where, example.label, rule, remedy)


def chosen_block(blocks: Sequence[Block], asked: str | None) -> Block:
    """That of the task that is asked for, or the only one."""
    found = [block for block in blocks if asked in (None, block.task)]
    if len(found) != 1:
        known = ", ".join(block.task for block in blocks)
        raise ConfigError("task", asked, f"the model knows {known}", "Name the one that the texts are of")
    return found[0]


def _seen(config: EvaluateConfig, examples: Sequence[Example]) -> int | None:
    """How many texts the model was trained on, for whichever task, with a warning: they flatter it.

    None where its data is not beside it.
    """
    folder = model_folder(Path(config.model))
    assert folder is not None, "the model was opened"
    version = folder.resolve().parent  # if it is the LINEAGE/versions/VERSION/model of a lineage
    if (version / EVALUATION).exists():
        tasks = json.loads((version / EVALUATION).read_bytes())["tasks"]
        places = [version.parent.parent / "tasks" / task for task in tasks]
    else:
        places = [folder.parent / "task"]
    trained = [example for place in places if (place / MANIFEST).exists() for example in thaw(place).splits["train"]]
    if not trained:
        return None
    found = curate.seen(examples, trained)
    if found:
        warnings.warn(f"{found} of {len(examples)} texts stand in the model's training data: they flatter it", stacklevel=2)
    return found
