"""An encoder under a head that grows: one linear block of labels per task, their logits side by side.

No parameter ever changes its shape. A new task is a new block, and what was there before stays what it was, to the byte.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from scaletrain.config import decode, to_tree
from scaletrain.errors import ModelError
from scaletrain.model.attention import Documents
from scaletrain.model.config import POOLED, Layout, dropouts
from scaletrain.model.layout import Arrangement
from scaletrain.model.network import PREFIX, config_of, fill, from_config, quiet, recompute, seeded

Pooling = Literal["mean", "first"]
ENCODER, BLOCKS = "encoder.", "blocks."
"""What parameter names begin with; after the first follows the name that plain Transformers' AutoModel has for it."""


@dataclass(frozen=True, slots=True)
class Block:
    """The labels of one task, in the order of its columns. Raises ModelError for none, or for one that is there twice."""

    task: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ModelError(f"labels of {self.task}", self.labels, "a block has one column per label", "Name each label once")


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What stands on the encoder. Raises ModelError for two blocks of one task."""

    pooling: Pooling
    dropout: float
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        tasks = [block.task for block in self.blocks]
        if len(set(tasks)) != len(tasks):
            raise ModelError("head.blocks", tasks, "a task has one block", "Give the new task another name")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        tree: dict[str, Any] = to_tree(self)
        return tree

    @classmethod
    def of_json(cls, tree: Mapping[str, Any]) -> HeadSpec:
        """Raises ConfigError, which names the key, for anything that `to_json` does not give."""
        return decode(cls, tree)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """The encoder to start from, and the head on it."""

    start: str
    """A pretraining or fine-tuning run, a lineage, a model folder, or any encoder for Transformers by its folder or hub name."""
    pooling: Pooling | None = None
    """What of the last layer the head sees: the `mean` of all tokens, or the `first` one, through the encoder's own pooler where
    it has one. Unset: that of the model folder that is started from, else `mean`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Before the head."""
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Every dropout of encoder and attention; unset: what it has."""
    layout: Layout = "padded"
    """`padded`: rows of one length with a mask. `unpadded`: one row of texts end to end, attention inside each."""
    attention_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention of the padded layout. DeBERTa always runs its own."""
    gradient_checkpointing: bool = False
    """Recompute each block of the encoder in the backward pass: less memory for about a third more time."""
    head_learning_rate_factor: Annotated[float, Field(ge=0)] = 10.0
    """Learning rate of the head relative to the encoder's: a new head has further to go."""

    def starting_at(self, folder: Path) -> ClassifierConfig:
        """The same classifier from another start."""
        return replace(self, start=str(folder))


class Classifier(nn.Module):
    """Logits of all tasks, built on every rank and partitioned afterwards. Made without blocks; `grow` adds them.

    All blocks are computed in every forward pass, so that all ranks run the same modules whatever their samples are; what a loss
    or a prediction may see of the logits is decided outside. Raises ModelError for a layout that the encoder does not have.
    """

    def __init__(self, encoder: PreTrainedModel, pooling: Pooling, dropout: float, layout: Layout = "padded") -> None:
        super().__init__()
        self._arrangement = Arrangement(encoder, layout)
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        self.head = HeadSpec(pooling, dropout)
        self.layout = layout
        self._firsts: Tensor | None = None
        if pooler := getattr(encoder, "pooler", None):
            pooler.register_forward_pre_hook(self._narrow)

    @classmethod
    def from_masked_lm(
        cls, config: ClassifierConfig, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], seed: int = 0
    ) -> Classifier:
        """The encoder of a `MaskedLanguageModel`, from the `hf_config` of its description and its full weights by name.

        Masked language models have no pooler: with `pooling` first, one starts from the seed, with a warning. Raises ModelError
        if the encoder's names or shapes do not fit.
        """
        classifier = new(config, config_of(hf_config), config.pooling or "mean", seed)
        prefix = f"{PREFIX}{classifier.encoder.base_model_prefix}."
        found = {ENCODER + name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
        missing = {name: weight for name, weight in classifier.named_parameters() if name not in found and is_pooler(name)}
        if missing:
            warn_of_new_pooler(config.start)
        fill(classifier, found | missing)
        return classifier

    @property
    def network(self) -> PreTrainedModel:
        """The encoder, as other parts of the library call it."""
        return self.encoder

    @property
    def max_positions(self) -> int:
        """Longest text in tokens, special tokens included."""
        return self._arrangement.max_positions

    @property
    def uses_token_types(self) -> bool:
        """Whether it tells the second text of a pair from the first by `token_type_ids`."""
        return self._arrangement.token_types

    def columns(self, number: int) -> slice:
        """Where the logits of a block lie among all."""
        start = sum(len(block.labels) for block in self.head.blocks[:number])
        return slice(start, start + len(self.head.blocks[number].labels))

    def drop_blocks(self) -> None:
        """Leaves the encoder, and a head without a task."""
        self.blocks, self.head = nn.ModuleList(), replace(self.head, blocks=())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits [samples, columns of all blocks], of inputs as `Arrangement.inputs` takes them; a sample is a row or a document.

        `token_type_ids`, of the shape of `input_ids`, is 1 in the second text of a pair. Raises ModelError for the inputs of the
        other layout, for token types where the encoder has none, and without a block.
        """
        if not self.blocks:
            raise ModelError("head.blocks", [], "a classifier needs the labels of at least one task", "Grow a block first")
        inputs = self._arrangement.inputs(input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens)
        documents: Documents | None = inputs.get("documents")
        self._firsts = documents.boundaries[:-1] if documents else None
        try:
            output = self.encoder(**inputs)
            pooled = self.dropout(self._pooled(output, attention_mask, documents))
        finally:
            self._firsts = None
        return torch.cat([block(pooled) for block in self.blocks], dim=1)

    def _pooled(self, output: Any, attention_mask: Tensor | None, documents: Documents | None) -> Tensor:
        hidden: Tensor = output.last_hidden_state
        if self.head.pooling == "mean":
            return token_mean(hidden, attention_mask, documents)
        if (through := getattr(output, "pooler_output", None)) is not None:
            return through  # type: ignore[no-any-return]
        return hidden[:, 0] if self._firsts is None else hidden[0, self._firsts]

    def _narrow(self, _pooler: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The pooler takes the first token of each row: of the unpadded row it is given those of all documents, as rows."""
        return None if self._firsts is None else (inputs[0][0, self._firsts][:, None],)


def token_mean(hidden: Tensor, attention_mask: Tensor | None, documents: Documents | None) -> Tensor:
    """Mean over the real tokens of each sample, in fp32: [batch, length, width] -> [samples, width]."""
    wide = hidden.float()
    if documents is not None:
        # Not an indexed addition: that one adds in another order every time on a GPU. The boundaries were checked on the host.
        mean = torch.segment_reduce(wide[0], "mean", lengths=documents.boundaries.diff(), axis=0, unsafe=True)
    elif attention_mask is None:
        mean = wide.mean(1)
    else:
        real = attention_mask[..., None].to(wide.dtype)
        mean = (wide * real).sum(1) / real.sum(1)
    return mean.to(hidden.dtype)


def grow(classifier: Classifier, block: Block, seed: int) -> None:
    """Adds a block: weights from a normal distribution as wide as the encoder's own (`initializer_range`), biases zero.

    They follow from the seed and the task's name alone. Raises ModelError for a task that has a block already.
    """
    head = replace(classifier.head, blocks=(*classifier.head.blocks, block))
    config = classifier.encoder.config
    key = hashlib.blake2b(f"{seed}\0{block.task}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") & (2**63 - 1))
    linear = nn.utils.skip_init(nn.Linear, int(config.hidden_size), len(block.labels))
    with torch.no_grad():
        linear.weight.normal_(0.0, float(getattr(config, "initializer_range", 0.02)), generator=generator)
        linear.bias.zero_()
    classifier.blocks.append(linear)
    classifier.head = head


def new(config: ClassifierConfig, hf_config: PretrainedConfig, pooling: Pooling, seed: int) -> Classifier:
    """A classifier without blocks whose encoder starts from the seed. The process's random state is left as it was."""
    set_dropout(config, hf_config)
    options = pooler_option(hf_config, pooling)
    with seeded(seed), quiet():
        return assemble(config, from_config(AutoModel, hf_config, config.attention_implementation, **options), pooling)


def assemble(config: ClassifierConfig, encoder: PreTrainedModel, pooling: Pooling) -> Classifier:
    """A classifier without blocks around an encoder."""
    classifier = Classifier(encoder, pooling, config.dropout, config.layout)
    if config.gradient_checkpointing:
        recompute(encoder)
    return classifier


def set_dropout(config: ClassifierConfig, hf_config: PretrainedConfig) -> None:
    for key, value in dropouts(hf_config.model_type, config.encoder_dropout).items():
        setattr(hf_config, key, value)


def pooler_option(hf_config: PretrainedConfig, pooling: Pooling) -> dict[str, bool]:
    """How an AutoModel is told to have a pooler only if its output is used: ZeRO-3 and Fisher passes walk all parameters."""
    return {"add_pooling_layer": pooling == "first"} if hf_config.model_type in POOLED else {}


def is_pooler(name: str) -> bool:
    """Of a parameter, with or without the prefix."""
    return name.removeprefix(ENCODER).startswith("pooler.")


def warn_of_new_pooler(source: str) -> None:
    warnings.warn(f"{source} has no pooler: that of pooling=first starts from random values", stacklevel=3)
