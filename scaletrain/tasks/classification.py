"""Text classification, of one task or of many that share an encoder.

The model's logits are those of all blocks, one block of labels per task, side by side. Which of them a sample may be sorted into
is the scenario's rule (van de Ven and Tolias, arXiv 1904.07734): every label seen so far (class-incremental), those of its own
task, which is known (task-incremental), or one set of labels that all tasks share (domain-incremental). The rule is a mask over
columns, so that every slot runs the same modules whatever tasks its samples are of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scaletrain.data.collate import Frame, Slot, arrange, slot_seed
from scaletrain.data.examples import Examples
from scaletrain.data.plan import Picks
from scaletrain.tasks.confusion import Confusion

TERM = "classification"

Scenario = Literal["class", "task", "domain"]


class Term(Protocol):
    """A further part of the loss that is a sum over samples, such as distillation."""

    @property
    def weight(self) -> float: ...

    def sum(self, outputs: Tensor, slot: Slot) -> Tensor:
        """Summed over the samples of the slot: an fp32 scalar."""


def visible_columns(scenario: Scenario, blocks: Sequence[int]) -> NDArray[np.bool_]:
    """Which columns a sample of each task competes among, [tasks, columns], for blocks of so many labels.

    Domain-incremental: there is one block, and its row serves all tasks.
    """
    ends = np.cumsum(blocks)
    columns = np.arange(ends[-1])
    own = (columns >= (ends - blocks)[:, None]) & (columns < ends[:, None])
    return own if scenario == "task" else np.ones_like(own)


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """Cross entropy over the columns that a sample's task may see, on samples of any mixture of tasks."""

    corpora: Sequence[Examples]
    """What ``Picks.corpus`` counts in."""
    visible: NDArray[np.bool_]
    """[tasks, columns], as of ``visible_columns``."""
    frame: Frame
    seed: int
    further: Mapping[str, Term] = field(default_factory=dict)
    """Further terms of the loss by name, each divided by the number of the step's samples."""
    cached: Mapping[str, Sequence[NDArray[np.float32]]] = field(default_factory=dict)
    """What slots carry as targets beside the labels: name -> for each corpus an array [chunks, ...]."""

    def over(self, corpora: Sequence[Examples]) -> Classification:
        """The same task on other data, for evaluation: without further terms."""
        return replace(self, corpora=corpora, further={}, cached={})

    @property
    def signature(self) -> str:
        return f"{TERM}:{self.frame.layout}:{self.visible.shape[1]}"

    @property
    def weights(self) -> dict[str, float]:
        return {TERM: 1.0, **{name: term.weight for name, term in self.further.items()}}

    def collate(self, step: int, index: int, samples: Picks, chunks: Sequence[NDArray[np.int32]]) -> Slot:
        """One slot: `labels` int64 [samples] are columns, `tasks` int64 [samples] rows of ``visible``.

        Without samples: one dummy row, counted 0.
        """
        lengths = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
        arranged = arrange(
            np.concatenate([*chunks, np.empty(0, np.int32)]),
            lengths,
            self.frame,
            self._of(samples, [corpus.boundary for corpus in self.corpora]),
        )
        targets = {
            "labels": self._of(samples, [corpus.target for corpus in self.corpora]),
            "tasks": self._of(samples, [corpus.task for corpus in self.corpora]).astype(np.int64),
            **{name: self._of(samples, arrays) for name, arrays in self.cached.items()},
        }
        if not len(samples):  # any label that task 0 may see
            targets = {name: np.zeros((1, *value.shape[1:]), value.dtype) for name, value in targets.items()}
            targets["labels"][0] = int(np.argmax(self.visible[0]))
        return Slot(
            step=step,
            index=index,
            signature=self.signature,
            seed=slot_seed(self.seed, step, index),
            inputs=arranged.inputs,
            targets={name: torch.from_numpy(value) for name, value in targets.items()},
            counts=dict.fromkeys(self.weights, len(samples)),
            samples=samples,
            real_tokens=arranged.real_tokens,
            padded_tokens=arranged.padded_tokens,
        )

    def terms(self, outputs: Tensor, slot: Slot) -> dict[str, Tensor]:
        """Cross entropy in nats, and the further terms, summed over the samples of ``outputs`` [samples, columns], in fp32."""
        losses = {TERM: functional.cross_entropy(*self._seen(outputs, slot), reduction="sum")}
        losses |= {name: term.sum(outputs, slot) for name, term in self.further.items()}
        return losses if len(slot.samples) else {name: loss * 0.0 for name, loss in losses.items()}

    columns = 4

    def score(self, outputs: Tensor, slot: Slot) -> NDArray[np.float64]:
        """Per sample: its cross entropy, its label's column, the column predicted, and the probability of that one."""
        logits, labels = self._seen(outputs, slot)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        probability, predicted = logits.softmax(dim=-1).max(dim=-1)
        rows = torch.stack([losses.double(), labels.double(), predicted.double(), probability.double()], dim=1)
        return rows.cpu().numpy()[: len(slot.samples)]

    def summary(self, table: NDArray[np.float64]) -> dict[str, float]:
        """``loss`` (mean, in nats), ``accuracy``, and F1 averaged over labels, plainly and by their number of examples."""
        confusion = Confusion.of(table[:, 1], table[:, 2], self.visible.shape[1])
        return {
            "loss": math.fsum(table[:, 0]) / len(table),
            "accuracy": confusion.accuracy,
            "macro_f1": confusion.macro_f1,
            "weighted_f1": confusion.weighted_f1,
        }

    def _seen(self, outputs: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
        """fp32 logits with the columns that each sample may not see at minus infinity, and the labels."""
        labels = slot.targets["labels"].to(outputs.device, non_blocking=True)
        if self.visible.all():
            return outputs.float(), labels
        hidden = ~torch.from_numpy(self.visible[slot.targets["tasks"].numpy()]).to(outputs.device, non_blocking=True)
        return outputs.float().masked_fill(hidden, -torch.inf), labels

    def _of(self, samples: Picks, arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        """Rows of per-corpus arrays, one per sample."""
        first = arrays[0]
        found = np.empty((len(samples), *first.shape[1:]), first.dtype)
        for corpus in np.unique(samples.corpus):
            mine = samples.corpus == corpus
            found[mine] = arrays[corpus][samples.chunk[mine]]
        return found


@dataclass(frozen=True, slots=True)
class Logits:
    """A scorer that keeps all logits of every sample: what a teacher has to say."""

    collate_task: Classification

    @property
    def columns(self) -> int:
        return int(self.collate_task.visible.shape[1])

    def score(self, outputs: Tensor, slot: Slot) -> NDArray[np.float64]:
        return outputs.double().cpu().numpy()[: len(slot.samples)]
