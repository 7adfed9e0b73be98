"""Fine-tuning: an encoder and labelled texts in, a classifier out. Start it again and it continues."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from scaletrain import checkpoint, dist, durable, model
from scaletrain.config import dump, to_tree
from scaletrain.continual.method import Active
from scaletrain.data.labelled import Labelled
from scaletrain.data.slots import Dealing
from scaletrain.model import Block, ClassifierConfig
from scaletrain.recipes.stage import Kept, Stage, StageConfig, StageData, start_dealing
from scaletrain.recipes.starting import TaskConfig, frozen, named, open_start, write_model
from scaletrain.recipes.student import ComputeConfig, Learning, Student
from scaletrain.tasks.confusion import Confusion, report_text
from scaletrain.train.control import ControlConfig, Session, StopRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that a fine-tuned classifier follows from."""

    output: Path
    """The run's folder: the frozen data, checkpoints, metrics, the model, the report, and exit.json."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of the head's first weights, the order and dropout."""
    model: ClassifierConfig
    """What it starts from, and the head."""
    task: TaskConfig
    """What it learns."""
    training: StageConfig = field(default_factory=StageConfig)
    """How it learns."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """What runs it."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """How long the job may run, and when it takes the folder of another one over."""


Config = FinetuneConfig


def main(config: FinetuneConfig, *, fresh: bool = False) -> dict[str, Any] | None:
    """Trains, or continues, evaluates on the test split, and writes RUN/model. Returns the figures, on rank 0.

    ``fresh`` sets what is there aside. Raises RequeueError, after a checkpoint, where the run was asked to stop.
    """
    with StopRequest(config.control) as stop, Session(config.output, config.compute.device, stop) as session:
        for name in ("checkpoints", "metrics.jsonl", "tensorboard", "task", "model", "report.json") if fresh else ():
            checkpoint.set_aside(config.output / name)
        dealing = start_dealing(config.output)
        begun = dist.from_first("looking for checkpoints", (config.output / "checkpoints").exists)
        data = frozen(config.task, config.output / "task", begun=begun)
        origin = open_start(config.model)
        origin.classifier.drop_blocks()
        model.grow(origin.classifier, Block(config.task.name, data.labels), config.seed)
        student = Student(
            config.compute,
            origin,
            session.device,
            learning=Learning(config.training.optimizer, config.model.head_learning_rate_factor),
            dealing=Dealing(**dealing) if dealing else None,
            stop=stop,
        )
        train, validation = (named(config.task.name, data.splits[split]) for split in ("train", "validation"))
        read_with = {f"task.data.{key}": repr(value) for key, value in to_tree(config.task.data).items()}
        start = {"model.pooling": origin.classifier.head.pooling, "model.start": origin.digest}
        identity = {"task.name": config.task.name, **read_with, **start}
        stage = Stage(config.training, config.output, student, StageData(train, validation), config.seed, identity)
        settings = _resolved(config, student.dealing)
        dist.from_first("writing the run's settings", lambda: dump(settings, config.output / "config.yaml"))
        kept = stage.run(lambda _: Active(), session, stop)
        return _finish(config, student, data, kept)


def _resolved(config: FinetuneConfig, dealing: Dealing) -> FinetuneConfig:
    """The settings with what the fresh start decided: they give the same run on another number of ranks."""
    slots = replace(config.compute.slots, slot_multiple=dealing.slot_multiple)
    return replace(config, compute=replace(config.compute, slots=slots))


def _finish(config: FinetuneConfig, student: Student, data: Labelled, kept: Kept) -> dict[str, Any] | None:
    split = "test" if data.splits["test"] else "validation"
    examples = data.splits[split]
    result: dict[str, Any] = {"step": kept.step, "steps": kept.steps, "split": split, "examples": len(examples)}
    report: dict[str, Any] = {}
    if examples:
        table = student.score(student.encode(named(config.task.name, examples)))
        result |= student.task([], 0).summary(table)
        result["majority_baseline"] = data.majority(split)
        confusion = Confusion.of(table[:, 1], table[:, 2], len(data.labels))
        report = {"labels": confusion.per_label(data.labels), "mistakes": confusion.worst(data.labels)}

    def write() -> None:
        facts = {"task": config.task.name, "step": kept.step, "data": dict(data.report), **result}
        write_model(config.output / "model", student.classifier, kept.checkpoint, student.tokenizer_folder, facts)
        text = json.dumps({**result, **report, "config": asdict(config.training.selection)}, indent=1)
        durable.write(config.output / "report.json", text.encode())
        if report:
            print(f"\n{split}: {len(examples)} examples\n{report_text(report['labels'])}", flush=True)

    dist.from_first("writing the model", write)
    return result if dist.rank() == 0 else None
