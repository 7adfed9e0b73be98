"""Masked language modelling: predict the tokens that were hidden (Devlin et al., arXiv 1810.04805).

The head runs on the chosen tokens only. Masks are keyed by the chunk, so what is hidden does not depend on how a step is dealt.

Beside it, chunks can be cut into pairs about which a second head answers a question (``data.pairs``): a second term of the loss,
with a count of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from scaletrain.data.collate import Frame, Slot, arrange, slot_seed
from scaletrain.data.masking import MaskRule, chunk_keys, mask
from scaletrain.data.pairs import NO_QUESTION, PairKind, PairRule, pair
from scaletrain.data.plan import Picks
from scaletrain.data.slots import Dealing
from scaletrain.data.spans import SpanConfig
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.errors import ConfigError, CorpusError

TERM, PAIR_TERM = "mlm", "pair"

Outputs = Tensor | tuple[Tensor, Tensor]
"""Logits of the chosen tokens; with pairs also those of the answers."""

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
    pair: Literal["none"] | PairKind = "none"
    """A second question, about chunks cut in two: `sop`, whether the parts stand in order (ALBERT), or `nsp`, whether they are of
    one text (BERT)."""
    pair_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of its loss beside that of the hidden tokens."""

    def __post_init__(self) -> None:
        if self.masked_share + self.random_share > 1:
            value, rule = self.masked_share + self.random_share, "masked_share and random_share together are at most 1"
            raise ConfigError("task.masked_share + task.random_share", value, rule, "Lower one of them")

    def identity(self) -> dict[str, str]:
        """What may not change within a run. Settings that came later are in it where they are set, so that old runs go on."""
        unset = {"spans": self.spans is None, "pair": self.pair == "none", "pair_weight": self.pair == "none"}
        return {name: str(value) for name, value in asdict(self).items() if not unset.get(name)}


class MaskedLanguageModelling:
    """The task of pretraining. ``corpora`` are the digests of the plan's corpora, in its order.

    ``token_types``: whether the model tells the second part of a pair by them.
    """

    def __init__(
        self,
        config: MlmConfig,
        vocabulary: Vocabulary,
        dealing: Dealing,
        corpora: Sequence[str],
        seed: int,
        token_types: bool = False,
    ) -> None:
        self._seed = self._mask_seed = seed
        self._corpora = tuple(corpora)
        self._config, self._vocabulary, self._dealing = config, vocabulary, dealing
        self._rule, self._pairs = self._masked_at(config.mask_rate), None
        self.signature = f"{TERM}:{dealing.layout}"
        self.weights: Mapping[str, float] = {TERM: 1.0}
        if config.pair != "none":
            self._pairs = PairRule(config.pair, vocabulary.sep, vocabulary.starts_word)
            self.signature = f"{TERM}+{config.pair}:{dealing.layout}"
            self.weights = {TERM: 1.0, PAIR_TERM: config.pair_weight}
        ids = vocabulary.cls, vocabulary.sep, vocabulary.pad
        self._frame = Frame(*ids, dealing.layout, dealing.pad_multiple, token_types and self._pairs is not None)

    def for_evaluation(self, corpora: Sequence[str]) -> MaskedLanguageModelling:
        """The same task on held-out corpora: at the evaluation's rate, with masks that no run's seed changes."""
        types = self._frame.token_types
        task = MaskedLanguageModelling(self._config, self._vocabulary, self._dealing, corpora, self._seed, types)
        task._rule, task._mask_seed = task._masked_at(self._config.evaluation_mask_rate), EVALUATION_SEED
        return task

    def collate(self, step: int, index: int, samples: Picks, chunks: Sequence[NDArray[np.int32]]) -> Slot:
        """One slot: `rows` and `labels` [n_rows] hold the chosen tokens, or one dummy row, counted 0, where none was chosen.

        With pairs also `pair_labels` [samples], of a slot without samples [1]: NO_QUESTION where a sample is no pair.
        """
        keys = chunk_keys(self._mask_seed, self._corpora, samples)
        tokens = np.concatenate([*chunks, np.empty(0, np.int32)])
        lengths, seconds, answers = np.array([len(chunk) for chunk in chunks], dtype=np.int64), None, None
        if self._pairs:
            tokens, lengths, seconds, answers = pair(chunks, samples, keys, self._pairs)
        masked = mask(tokens, lengths, keys, self._rule)
        arranged = arrange(masked.tokens, lengths, self._frame, seconds)
        count = len(masked.selected)
        rows, labels = arranged.places[masked.selected], masked.labels
        chunk_of_row = np.repeat(np.arange(len(chunks)), lengths)[masked.selected]
        if not count:
            rows = labels = chunk_of_row = np.zeros(1, dtype=np.int64)
        targets, counts = {"labels": labels, "chunk_of_row": chunk_of_row}, {TERM: count}
        if answers is not None:
            counts[PAIR_TERM] = int((answers != NO_QUESTION).sum())
            targets["pair_labels"] = answers if len(answers) else np.full(1, NO_QUESTION)
        return Slot(
            step=step,
            index=index,
            signature=self.signature,
            seed=slot_seed(self._seed, step, index),
            inputs=arranged.inputs | {"rows": torch.from_numpy(rows)},
            targets={name: torch.from_numpy(value) for name, value in targets.items()},
            counts=counts,
            samples=samples,
            real_tokens=arranged.real_tokens,
            padded_tokens=arranged.padded_tokens,
        )

    def terms(self, outputs: Outputs, slot: Slot) -> dict[str, Tensor]:
        """Cross entropies in nats, summed in fp32: over the rows of the logits [n_rows, vocabulary], 0 in a dummy slot, and with
        pairs over the samples of the second logits [samples, 2] that have a question."""
        logits, answers = _apart(outputs)
        labels = slot.targets["labels"].to(logits.device, non_blocking=True)
        total = functional.cross_entropy(logits.float(), labels, reduction="sum")
        terms = {TERM: total if slot.counts[TERM] else total * 0.0}
        if answers is not None:
            labels = slot.targets["pair_labels"].to(logits.device, non_blocking=True)
            terms[PAIR_TERM] = functional.cross_entropy(answers.float(), labels, ignore_index=NO_QUESTION, reduction="sum")
        return terms

    @property
    def columns(self) -> int:
        """See ``score``."""
        return 6 if self._pairs else 3

    def score(self, outputs: Outputs, slot: Slot) -> NDArray[np.float64]:
        """Per chunk: summed cross entropy, number of chosen tokens, and how many of them the largest logit names; with pairs the
        same of its question."""
        logits, answers = _apart(outputs)
        table = np.zeros((len(slot.samples), self.columns))
        if slot.counts[TERM]:
            np.add.at(table[:, :3], slot.targets["chunk_of_row"].numpy(), _scores(logits, slot.targets["labels"]))
        if answers is not None:
            asked = slot.targets["pair_labels"] != NO_QUESTION
            table[asked.numpy()[: len(table)], 3:] = _scores(answers[asked], slot.targets["pair_labels"][asked])
        return table

    def summary(self, table: NDArray[np.float64]) -> dict[str, float]:
        """``loss`` (mean over predictions, in nats), ``perplexity`` and ``accuracy``; with pairs ``pair_loss`` and
        ``pair_accuracy``. CorpusError if nothing was hidden, or nothing asked."""
        rule, remedy = "nothing in it is to be predicted, so there is no loss to speak of", "set evaluation.every_steps=0"
        loss, accuracy = _means(table[:, :3], rule, remedy)
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy}
        if self._pairs:
            rule = f"none of its chunks makes a pair for task.pair={self._pairs.kind}: too short, or no other in their slots"
            remedy = "raise data.slots.micro_batch_tokens and evaluation.chunks_per_pass"
            found["pair_loss"], found["pair_accuracy"] = _means(table[:, 3:], rule, remedy)
        return found

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


def _apart(outputs: Outputs) -> tuple[Tensor, Tensor | None]:
    return (outputs, None) if isinstance(outputs, Tensor) else outputs


def _scores(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Cross entropy, 1, and whether the largest logit is that of the label, for each row: [rows, 3]."""
    labels = labels.to(logits.device)
    losses = functional.cross_entropy(logits.float(), labels, reduction="none").double()
    correct = (logits.argmax(dim=-1) == labels).double()
    return torch.stack([losses, torch.ones_like(losses), correct], dim=1).cpu().numpy()


def _means(table: NDArray[np.float64], rule: str, remedy: str) -> tuple[float, float]:
    """Mean loss and accuracy. Raises CorpusError, with the ``rule`` and the ``remedy``, where nothing was counted."""
    loss, counted, correct = (math.fsum(column) for column in table.T)
    if not counted:
        raise CorpusError("the held-out text", f"{len(table)} samples", rule, f"Hold out more text, or {remedy}")
    return loss / counted, correct / counted
