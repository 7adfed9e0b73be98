"""How good a classifier is on labelled texts: exact, on any number of ranks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from scaletrain import dist, durable
from scaletrain.data import curate, tables
from scaletrain.data.freeze import thaw
from scaletrain.data.sources.files import expand
from scaletrain.data.tables import ColumnsConfig, Example
from scaletrain.errors import ConfigError
from scaletrain.model import Block, ClassifierConfig
from scaletrain.recipes.starting import model_folder, named, open_start
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
    with Session(config.output, config.compute.device) as session:
        origin = open_start(ClassifierConfig(start=config.model))
        student = Student(config.compute, origin.classifier, origin.tokenizer_folder, session.device, scenario=config.scenario)
        task = chosen_task(student.blocks, config.task)
        examples = _read(config)
        _warn_of_overlap(model_folder(Path(config.model)), task, examples)
        table = student.score(student.encode(named(task, examples)))
        confusion = Confusion.of(table[:, 1], table[:, 2], len(student.labels))
        result = {"task": task, "examples": len(examples), **student.task([], 0).summary(table)}
        labels = confusion.per_label(student.labels)

        def write() -> None:
            report = {**result, "labels": labels, "mistakes": confusion.worst(student.labels)}
            durable.write(config.output / "report.json", json.dumps(report, indent=1).encode())
            print(report_text(labels), flush=True)

        dist.from_first("writing the report", write)
        return result if dist.rank() == 0 else None


def _read(config: EvaluateConfig) -> list[Example]:
    files = expand([str(path) for path in config.files], tables.SUFFIXES, "files")
    rows = curate.with_text([row for file in files for row in tables.examples(file, config.columns)], "error")
    curate.check_keys(rows)
    return [example for _, example in rows]


def chosen_task(blocks: tuple[Block, ...], asked: str | None) -> str:
    """The task that is asked for, or the only one."""
    known = [block.task for block in blocks]
    if asked is None and len(known) == 1:
        return known[0]
    if asked is None or asked not in known:
        raise ConfigError("task", asked, f"the model knows {', '.join(known)}", "Name the one that the texts are of")
    return asked


def _warn_of_overlap(folder: Path | None, task: str, examples: Sequence[Example]) -> None:
    """Texts that were trained on flatter a model; its run or lineage knows which they were."""
    if folder is None or dist.rank():
        return
    for data in (folder.parent / "task", folder.parents[2] / "tasks" / task):
        if (data / "task.json").exists() and (found := curate.seen(examples, thaw(data).splits["train"])):
            warnings.warn(f"{found} of {len(examples)} texts stand in the training data of {task}", stacklevel=2)
