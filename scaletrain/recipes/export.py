"""A pretrained encoder or a classifier, as a folder that plain transformers loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from scaletrain import checkpoint
from scaletrain.checkpoint import Checkpoint
from scaletrain.errors import CheckpointError, ConfigError
from scaletrain.export import export, export_classifier
from scaletrain.model import ClassifierConfig
from scaletrain.recipes.starting import hf_config_of, model_folder, open_start


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Which model, and where to."""

    run: Path
    """A pretraining run, of which a checkpoint is exported with its language-model head; or a classifier: a fine-tuning run, a
    model folder, or a lineage, which stands for its published model."""
    output: Path
    """The folder to write: new, empty, or an earlier export, which is replaced once the new one is proven."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Of a pretraining run: the checkpoint of this step; empty: the newest that is whole."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the folder."""
    probe_texts: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "The exported model must give the same logits as the one that was trained.",
        "Return a new list containing all items from the iterable in ascending order.",
        "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    )
    """Raw texts on which the reloaded folder is compared with the model before the export."""


Config = ExportConfig


def main(config: ExportConfig) -> dict[str, Any]:
    """Exports, and returns the report: the folder, its size, and the largest difference of a logit after reloading it."""
    if (folder := model_folder(config.run)) is not None:
        return _classifier(config, folder)
    chosen = _chosen(config)
    source = {"run": config.run.name, "step": chosen.progress.step, "files": chosen.manifest["files"]}
    report = export(
        checkpoint.weights(chosen),
        hf_config_of(chosen, "run", config.run),
        config.run / "tokenizer",
        config.output,
        probe_texts=config.probe_texts,
        dtype=config.dtype,
        source=source,
    )
    return {**asdict(report), "folder": str(report.folder), "step": chosen.progress.step}


def _classifier(config: ExportConfig, folder: Path) -> dict[str, Any]:
    if config.step is not None:
        raise ConfigError("step", config.step, f"{config.run} has one model", "Leave it out")
    origin = open_start(ClassifierConfig(start=str(config.run)))
    report = export_classifier(
        origin.classifier,
        origin.tokenizer_folder,
        config.output,
        probe_texts=config.probe_texts,
        dtype=config.dtype,
        source={"model": folder.name if folder.name != "model" else folder.parent.name, "digest": origin.digest},
    )
    return {
        **asdict(report),
        "folder": str(report.folder),
        "labels": sum(len(block.labels) for block in origin.classifier.head.blocks),
    }


def _chosen(config: ExportConfig) -> Checkpoint:
    folder = config.run / "checkpoints"
    if config.step is None:
        newest = checkpoint.newest(folder)
        if newest is None:
            raise CheckpointError("run", str(config.run), "it has no checkpoint", "Give the folder that `pretrain` calls output.")
        return newest
    found = {each.progress.step: each for each in checkpoint.find(folder)}
    if config.step not in found:
        rule = f"{config.run} has checkpoints of the steps {sorted(found)}"
        raise CheckpointError("step", config.step, rule, "Leave `step` out to take the newest.")
    return found[config.step]
