"""What a classifier starts from, and the folder that a task's data is frozen in: what fine-tuning and streams have in common."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from scaletrain import checkpoint, dist, model
from scaletrain.checkpoint import Checkpoint
from scaletrain.continual.store import published_model
from scaletrain.data import labelled
from scaletrain.data.freeze import MANIFEST, freeze, thaw
from scaletrain.data.labelled import Example, Labelled, LabelledConfig
from scaletrain.errors import CheckpointError, ModelError
from scaletrain.model import Classifier, ClassifierConfig
from scaletrain.model.folder import is_model_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """A text classification task."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """What it is called from now on: letters, digits, dots, dashes and underscores."""
    data: LabelledConfig
    """Its examples."""


def frozen(task: TaskConfig, folder: Path, *, begun: bool) -> Labelled:
    """The task's data out of ``folder``, where rank 0 puts it. Collective.

    Once training has ``begun``, what is there wins over the files that it was read from: a run that continues must not see other
    data. Before, what an earlier start put there is read again: its settings may have been corrected.
    """

    def put() -> None:
        if begun and (folder / MANIFEST).exists():
            return
        read = labelled.read(task.data)
        shutil.rmtree(folder, ignore_errors=True)
        freeze(read, folder)

    dist.from_first("reading the task's examples", put)
    return thaw(folder)


def named(task: str, examples: Sequence[Example]) -> list[tuple[str, Example]]:
    """Each with the name of its task."""
    return [(task, example) for example in examples]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a classifier was made from."""

    classifier: Classifier
    tokenizer_folder: Path
    digest: str
    """Of the weights, as far as they are told apart by name: of the checkpoint's or model folder's manifest."""


def open_start(config: ClassifierConfig, seed: int = 0) -> Origin:
    """The classifier that ``config.start`` stands for, with the blocks that it comes with. Collective.

    A lineage stands for its published model, a fine-tuning run for its model, a pretraining run for its newest checkpoint;
    else it is a model folder, or an encoder of Hugging Face's by folder or name.
    """
    folder = model_folder(Path(config.start))
    if folder is None and (Path(config.start) / "checkpoints").is_dir():
        return _pretrained(config, Path(config.start), seed)
    started = model.start(config, folder, seed)
    return Origin(started.classifier, started.tokenizer_folder, started.digest)


def open_classifier(path: str) -> Origin:
    """The trained classifier that a path leads to: see `model_folder`. Raises ModelError where it leads to none. Collective."""
    if model_folder(Path(path)) is None:
        remedy = "Give a model folder, a fine-tuning run that has ended, or a lineage"
        raise ModelError("model", path, "no classifier is there", remedy)
    return open_start(ClassifierConfig(start=path))


def model_folder(path: Path) -> Path | None:
    """The model folder that a path leads to: itself, that of a fine-tuning run, or the published one of a lineage.

    Also one that is not whole any more: reading it says what is wrong.
    """
    if (path / "ledger.jsonl").exists():
        return published_model(path)
    return next((folder for folder in (path, path / "model") if is_model_folder(folder)), None)


def _pretrained(config: ClassifierConfig, run: Path, seed: int) -> Origin:
    newest = checkpoint.newest(run / "checkpoints")
    if newest is None:
        raise CheckpointError("model.start", str(run), "it has no checkpoint", "Give a run that has been saved at least once")
    hf_config = hf_config_of(newest, "model.start", run)
    classifier = Classifier.from_masked_lm(config, hf_config, checkpoint.weights(newest), seed)
    return Origin(classifier, run / "tokenizer", digest_of(*(entry["sha256"] for entry in newest.manifest["files"])))


def hf_config_of(chosen: Checkpoint, setting: str, run: Path) -> Mapping[str, Any]:
    """What a pretraining run has trained. Raises CheckpointError, which names the ``setting``, for a run of another kind."""
    if "hf_config" not in chosen.progress.fixed:
        rule = "it is a fine-tuning run without a model: it has not ended yet"
        raise CheckpointError(setting, str(run), rule, "The command that began it continues it; its end writes the model")
    found: Mapping[str, Any] = chosen.progress.fixed["hf_config"]
    return found


def write_model(
    folder: Path, classifier: Classifier, kept: Checkpoint, tokenizer_folder: Path, facts: Mapping[str, object]
) -> None:
    """The checkpoint's weights as a model folder. On one rank."""
    described = model.describe(classifier)
    model.write_model(
        folder,
        hf_config=described["hf_config"],
        head=classifier.head,
        state=checkpoint.weights(kept),
        tokenizer_folder=tokenizer_folder,
        facts=facts,
    )


def digest_of(*parts: str) -> str:
    """SHA-256 of some texts, as hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
