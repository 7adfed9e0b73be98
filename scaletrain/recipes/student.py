"""A classifier in an engine, with all that turns examples into its slots: what is trained, evaluated and asked."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from scaletrain import dist, engine, model
from scaletrain.data import keyed
from scaletrain.data.collate import Frame, Slot
from scaletrain.data.examples import Encoder, Examples, concatenate
from scaletrain.data.labelled import Example
from scaletrain.data.loader import Loader, LoaderConfig
from scaletrain.data.plan import CorpusShape, EvalPlan, Picks
from scaletrain.data.slots import Dealing, DealtPlan, SlotConfig
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.engine import Engine, EngineConfig, OptimizerConfig, Zero3Config
from scaletrain.errors import ConfigError
from scaletrain.model import Block, Classifier
from scaletrain.recipes.starting import Origin
from scaletrain.tasks.classification import TERM, Classification, Logits, Scenario, visible_columns
from scaletrain.train.control import StopRequest
from scaletrain.train.evaluate import evaluate

Named = tuple[str, Example]
"""The name of a task, and an example of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """What runs a classifier, and in what pieces."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a GPU."""
    engine: EngineConfig = field(default_factory=Zero3Config)
    """What runs the model."""
    max_tokens: Annotated[int, Field(ge=3)] = 128
    """Longer texts are cut to so many tokens, special tokens included; pairs lose from the longer text."""
    slots: SlotConfig = field(default_factory=SlotConfig)
    """How a step is cut into micro-batches."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How examples are made ready."""
    samples_per_pass: Annotated[int, Field(ge=1)] = 256
    """Examples that are evaluated together."""


@dataclass(frozen=True, slots=True)
class Learning:
    """How weights follow gradients."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    head_factor: float = 1.0
    """Of the learning rate, for the head."""
    idle: Collection[int] = ()
    """Numbers of the blocks that no sample trains: they are not decayed either."""


class Student:
    """One classifier, placed in an engine. All methods that compute are collective."""

    def __init__(
        self,
        config: ComputeConfig,
        origin: Origin,
        device: torch.device,
        *,
        scenario: Scenario = "class",
        learning: Learning | None = None,
        dealing: Dealing | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """``learning``: None for one that is only evaluated. ``dealing``: the rule that a run was started with; None on a fresh
        start. ``stop``: what may interrupt an evaluation."""
        classifier, learning = origin.classifier, learning or Learning()
        if config.max_tokens > classifier.max_positions:
            rule = f"the encoder has {classifier.max_positions} positions"
            raise ConfigError("compute.max_tokens", config.max_tokens, rule, f"Set it to at most {classifier.max_positions}")
        self._config, self.scenario, self.tokenizer_folder, self._stop = config, scenario, origin.tokenizer_folder, stop
        self.start_digest = origin.digest
        self._encoder = Encoder(origin.tokenizer_folder, config.max_tokens)
        self.classifier = classifier
        self.blocks: tuple[Block, ...] = classifier.head.blocks
        self.dealing = dealing or Dealing.of(config.slots, classifier.layout, dist.world())
        self.dealing.check(config.slots, classifier.layout)
        self.brings_multiple = dealing is None and config.slots.slot_multiple is None
        self._frame = frame_of(origin.tokenizer_folder, classifier, self.dealing.pad_multiple)
        self.visible = visible_columns(scenario, [len(block.labels) for block in self.blocks])
        optimizer = learning.optimizer
        groups = model.parameter_groups(classifier, optimizer.weight_decay, learning.head_factor, learning.idle)
        self.engine: Engine = engine.create(config.engine, classifier, groups, optimizer, device)

    @property
    def labels(self) -> list[str]:
        """Of the columns; with more than one task, ``task/label``."""
        several = len(self.blocks) > 1
        return [f"{block.task}/{label}" if several else label for block in self.blocks for label in block.labels]

    def encode(self, examples: Sequence[Named]) -> Examples:
        """Examples of any of the blocks' tasks as token arrays. Raises CorpusError for a label that a task does not have."""
        parts = []
        for task, run in itertools.groupby(examples, key=lambda pair: pair[0]):
            number, columns = self._columns(task)
            own = [example for _, example in run]
            parts.append(self._encoder.encode(own, columns, number))
        return concatenate(parts)

    def _columns(self, task: str) -> tuple[int, dict[str, int]]:
        """The number of a task's block, and the column of each of its labels."""
        # Domain-incremental: there is one block, whatever the task is called.
        number = 0 if self.scenario == "domain" else [block.task for block in self.blocks].index(task)
        first = sum(len(block.labels) for block in self.blocks[:number])
        return number, {label: first + place for place, label in enumerate(self.blocks[number].labels)}

    def task(self, corpora: Sequence[Examples], seed: int) -> Classification:
        """Learning the examples of ``corpora``."""
        return Classification(corpora, self.visible, self._frame, seed)

    def loader(self, dealt: DealtPlan, task: Classification) -> Loader:
        return Loader(dealt, task.corpora, task.collate, dist.rank(), dist.world(), self._config.loader)

    def score(self, examples: Examples) -> NDArray[np.float64]:
        """``Classification.score`` of every example, in order: [examples, 4]."""
        return self._evaluated(examples, self.task([examples], 0))

    def logits(self, examples: Examples) -> NDArray[np.float32]:
        """Of the weights as they are now, without dropout: [examples, columns]."""
        return self._evaluated(examples, Logits(self.task([examples], 0))).astype(np.float32)

    def singles(self, examples: Examples, count: int, seed: int) -> list[Slot]:
        """This rank's slots of one sample each, of ``count`` examples (or all) chosen by key; filled up to whole rounds."""
        keys = np.array([keyed.key(seed, "singles", key) for key in examples.keys], dtype=np.uint64)
        chosen = np.sort(np.argsort(keys, kind="stable")[:count])
        task, mine = self.task([examples], seed), []
        for number in range(dist.rank(), -(-len(chosen) // dist.world()) * dist.world(), dist.world()):
            chunk = chosen[number : number + 1]
            picks = Picks(np.zeros(len(chunk), np.int16), np.zeros(len(chunk), np.int64), chunk.astype(np.int64))
            mine.append(task.collate(0, number, picks, [examples.read(int(each)) for each in chunk]))
        return mine

    def loss(self, outputs: torch.Tensor, slot: Slot) -> torch.Tensor:
        """The classification loss of a slot, summed over its samples."""
        return self.task([], 0).terms(outputs, slot)[TERM]

    def _evaluated(self, examples: Examples, scorer: Classification | Logits) -> NDArray[np.float64]:
        plan = EvalPlan([CorpusShape(examples.digest, examples.chunks)], self._config.samples_per_pass)
        dealt = DealtPlan(plan, [examples.lengths], self.dealing)
        collating = scorer if isinstance(scorer, Classification) else scorer.collate_task
        with self.loader(dealt, collating) as loader:
            return evaluate(self.engine, scorer, loader.batches(), plan.samples, self._stop)


def frame_of(tokenizer_folder: Path, classifier: Classifier, pad_multiple: int = 1) -> Frame:
    """How a classifier's inputs are laid out."""
    known = Vocabulary.open(tokenizer_folder)
    return Frame(known.cls, known.sep, known.pad, classifier.layout, pad_multiple, classifier.uses_token_types)
