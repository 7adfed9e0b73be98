"""Masked language modelling: predict the tokens that were hidden (Devlin et al., arXiv 1810.04805).

The head runs on the chosen tokens only. Masks are keyed by the chunk, so what is hidden does not depend on how a step is dealt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from scaletrain.data.collate import Frame, Slot, arrange, slot_seed
from scaletrain.data.masking import MaskRule, chunk_keys, mask
from scaletrain.data.plan import Picks
from scaletrain.data.slots import Dealing
from scaletrain.data.spans import SpanConfig
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.errors import ConfigError, CorpusError

TERM = "mlm"

EVALUATION_SEED = 0
"""Masks of an evaluation do not follow the run's seed: all runs are measured on the same ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlmConfig:
    """How much is hidden, and behind what."""

    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.30
    """Share of tokens to predict in training; more than BERT's 15 % trains better (Wettig et al., arXiv 2202.08005)."""
    evaluation_mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """The same on held-out text; BERT's rate, whatever training uses, so that losses can be compared."""
    masked_share: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Of the tokens to predict, the share replaced by the mask token."""
    random_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of the tokens to predict, the share replaced by a random one; the rest stays as it is."""
    whole_word: bool = False
    """Hide words, not pieces of words."""
    spans: SpanConfig | None = None
    """Hide runs of words, and replace each as one (SpanBERT); `spans: {}` takes the paper's lengths."""

    def __post_init__(self) -> None:
        if self.masked_share + self.random_share > 1:
            value, rule = self.masked_share + self.random_share, "masked_share and random_share together are at most 1"
            raise ConfigError("task.masked_share + task.random_share", value, rule, "Lower one of them")

    def identity(self) -> dict[str, str]:
        """What may not change within a run. Settings that came later are in it where they are set, so that old runs go on."""
        later = {"spans"}
        return {name: str(value) for name, value in asdict(self).items() if name not in later or value is not None}


class MaskedLanguageModelling:
    """The task of pretraining. ``corpora`` are the digests of the plan's corpora, in its order."""

    def __init__(self, config: MlmConfig, vocabulary: Vocabulary, dealing: Dealing, corpora: Sequence[str], seed: int) -> None:
        self._seed = self._mask_seed = seed
        self._corpora = tuple(corpora)
        self._config, self._vocabulary, self._dealing = config, vocabulary, dealing
        self._frame = Frame(vocabulary.cls, vocabulary.sep, vocabulary.pad, dealing.layout, dealing.pad_multiple)
        self._rule = self._masked_at(config.mask_rate)
        self.signature = f"{TERM}:{dealing.layout}"
        self.weights: Mapping[str, float] = {TERM: 1.0}

    def for_evaluation(self, corpora: Sequence[str]) -> MaskedLanguageModelling:
        """The same task on held-out corpora: at the evaluation's rate, with masks that no run's seed changes."""
        task = MaskedLanguageModelling(self._config, self._vocabulary, self._dealing, corpora, self._seed)
        task._rule, task._mask_seed = task._masked_at(self._config.evaluation_mask_rate), EVALUATION_SEED
        return task

    def collate(self, step: int, index: int, samples: Picks, chunks: Sequence[NDArray[np.int32]]) -> Slot:
        """One slot: `rows` and `labels` [n_rows] hold the chosen tokens, or one dummy row, counted 0, where none was chosen."""
        lengths = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
        tokens = np.concatenate([*chunks, np.empty(0, np.int32)])
        masked = mask(tokens, lengths, chunk_keys(self._mask_seed, self._corpora, samples), self._rule)
        arranged = arrange(masked.tokens, lengths, self._frame)
        count = len(masked.selected)
        rows, labels = arranged.places[masked.selected], masked.labels
        chunk_of_row = np.repeat(np.arange(len(chunks)), lengths)[masked.selected]
        if not count:
            rows = labels = chunk_of_row = np.zeros(1, dtype=np.int64)
        return Slot(
            step=step,
            index=index,
            signature=self.signature,
            seed=slot_seed(self._seed, step, index),
            inputs=arranged.inputs | {"rows": torch.from_numpy(rows)},
            targets={"labels": torch.from_numpy(labels), "chunk_of_row": torch.from_numpy(chunk_of_row)},
            counts={TERM: count},
            samples=samples,
            real_tokens=arranged.real_tokens,
            padded_tokens=arranged.padded_tokens,
        )

    def terms(self, outputs: Tensor, slot: Slot) -> dict[str, Tensor]:
        """Cross entropy in nats, summed over the rows of ``outputs`` [n_rows, vocabulary], in fp32; 0 in a dummy slot."""
        labels = slot.targets["labels"].to(outputs.device, non_blocking=True)
        total = functional.cross_entropy(outputs.float(), labels, reduction="sum")
        return {TERM: total if slot.counts[TERM] else total * 0.0}

    columns = 3

    def score(self, outputs: Tensor, slot: Slot) -> NDArray[np.float64]:
        """Per chunk: summed cross entropy, number of chosen tokens, and how many of them the largest logit names."""
        table = np.zeros((len(slot.samples), self.columns))
        if not slot.counts[TERM]:
            return table
        labels = slot.targets["labels"].to(outputs.device)
        losses = functional.cross_entropy(outputs.float(), labels, reduction="none").double().cpu().numpy()
        correct = (outputs.argmax(dim=-1) == labels).cpu().numpy()
        np.add.at(table, slot.targets["chunk_of_row"].numpy(), np.column_stack([losses, np.ones(len(losses)), correct]))
        return table

    def summary(self, table: NDArray[np.float64]) -> dict[str, float]:
        """``loss`` (mean over predictions, in nats), ``perplexity`` and ``accuracy``. CorpusError if nothing was hidden."""
        loss, predictions, correct = (math.fsum(column) for column in table.T)
        if not predictions:
            rule = "nothing in it is to be predicted, so there is no loss to speak of"
            remedy = "Hold out more text, or set evaluation.every_steps=0."
            raise CorpusError("the held-out text", f"{len(table)} samples", rule, remedy)
        mean = loss / predictions
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": correct / predictions}

    def _masked_at(self, rate: float) -> MaskRule:
        known = self._vocabulary
        return MaskRule(
            rate=rate,
            masked=self._config.masked_share,
            randomised=self._config.random_share,
            mask_id=known.mask,
            vocab_size=known.size,
            special=known.special,
            starts_word=known.starts_word if self._config.whole_word or self._config.spans else None,
            spans=self._config.spans,
        )
