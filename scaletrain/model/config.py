"""Which encoder to train, by its sizes or from a pretrained folder, translated into a Hugging Face configuration."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from scaletrain.errors import ConfigError, ModelError, TokenizerError

Architecture = Literal["bert", "roberta", "modernbert", "distilbert", "deberta-v2", "deberta-v3"]
Layout = Literal["padded", "unpadded"]

MODEL_TYPES: dict[str, str] = {
    "bert": "bert",
    "roberta": "roberta",
    "modernbert": "modernbert",
    "distilbert": "distilbert",
    "deberta-v2": "deberta-v2",
    "deberta-v3": "deberta-v2",
}
"""Architecture -> the `model_type` by which Transformers knows it."""

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "bert": ("padded", "unpadded"),
    "roberta": ("padded", "unpadded"),
    "modernbert": ("padded", "unpadded"),
    "distilbert": ("padded", "unpadded"),
    # Its relative positions are taken from the place in the row, and its attention is its own: documents would leak.
    "deberta-v2": ("padded",),
}
"""`model_type` -> layouts that keep the documents of a batch apart."""

POOLED = frozenset({"bert", "roberta"})
"""`model_type` of the encoders that have a pooler: a dense layer with tanh on the first token."""

_COMMON = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
}
_SIZES = {
    **dict.fromkeys(("bert", "roberta", "modernbert", "deberta-v2"), _COMMON),
    "distilbert": {"hidden": "dim", "layers": "n_layers", "heads": "n_heads", "intermediate": "hidden_dim"},
}
_DROPOUTS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "modernbert": ("embedding_dropout", "attention_dropout", "mlp_dropout"),
    "distilbert": ("dropout", "attention_dropout"),
    "deberta-v2": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}

# As published with DeBERTa-v2 and -v3 (He et al., 2021: arXiv:2006.03654 and arXiv:2111.09543): relative positions in log
# buckets, their keys shared with the content's, no absolute positions. v2 adds a convolution beside the first layer.
_DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "roberta": {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "deberta-v2": {**_DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"},
    "deberta-v3": {**_DEBERTA, "legacy": False},
}

# Keys that a model reads although the configuration class does not declare them.
_UNDECLARED: dict[str, tuple[str, ...]] = {
    "modernbert": ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"),
    "deberta-v2": (
        *("attention_head_size", "share_att_key", "position_buckets", "norm_rel_ebd", "embedding_size"),
        *("conv_kernel_size", "conv_groups", "conv_act"),
    ),
}

# Set from the fields above or from the tokenizer, or they would make something else than an encoder out of the model.
_DERIVED = {
    "max_position_embeddings",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "cls_token_id",
    "sep_token_id",
}
_NOT_OURS = {"model_type", "architectures", "dtype", "is_decoder", "is_encoder_decoder", "add_cross_attention", "return_dict"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The encoder: either `architecture` with its sizes (random weights), or `pretrained`."""

    architecture: Architecture | None = None
    """Which encoder to build with random weights."""

    pretrained: str | None = None
    """Folder or hub name of a model to start from. Only safetensors are read, and no code that comes with it is run."""

    layers: Annotated[int, Field(ge=1)] | None = None
    """Number of transformer blocks."""

    hidden: Annotated[int, Field(ge=1)] | None = None
    """Width of the hidden states; a multiple of `heads`."""

    heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads per block."""

    intermediate: Annotated[int, Field(ge=1)] | None = None
    """Width inside the feed-forward part; unset: 4 x hidden (ModernBERT, whose part is gated: 1.5 x hidden)."""

    max_positions: Annotated[int, Field(ge=2)] | None = None
    """Longest row in tokens, [CLS] and [SEP] included; unset: 512. RoBERTa's offset is added to it, not taken from it."""

    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Every dropout of encoder and attention; unset: what the architecture (0.1; ModernBERT 0) or the pretrained model has."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the Hugging Face configuration, by their own names (`hidden_act: gelu`)."""

    layout: Layout = "padded"
    """`padded`: rows of one length with a mask. `unpadded`: one row of documents end to end, attention inside each."""

    attention_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention of the padded layout. DeBERTa always runs its own."""

    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory for about a third more time."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("layers", "hidden", "heads", "intermediate", "max_positions")}
        given = [name for name, value in sizes.items() if value is not None]
        if (self.architecture is None) == (self.pretrained is None):
            value = {"architecture": self.architecture, "pretrained": self.pretrained}
            raise ConfigError("model", value, "exactly one of the two must be set", "Set architecture with sizes, or pretrained")
        if self.pretrained is not None and given:
            raise ConfigError(
                f"model.{given[0]}",
                sizes[given[0]],
                "a pretrained model brings its sizes",
                f"Remove {', '.join(given)} or pretrained",
            )
        if self.architecture is None:
            return
        for name in ("layers", "hidden", "heads"):
            if sizes[name] is None:
                raise ConfigError(f"model.{name}", None, "a model built from an architecture needs it", f"Set model.{name}")
        assert self.hidden is not None and self.heads is not None
        if self.hidden % self.heads:
            raise ConfigError(
                "model.hidden", self.hidden, f"must be a multiple of model.heads = {self.heads}", "Change one of the two"
            )


@dataclass(frozen=True, slots=True)
class TokenIds:
    """What a model must know of its tokenizer: the exact number of ids and those of the special tokens.

    The model's vocabulary is exactly the tokenizer's, not rounded up, so that the exported logits have one column per token. On a
    GPU a multiple of 64 is faster: choose it where the tokenizer is trained.
    """

    vocab_size: int
    pad: int
    mask: int
    begin: int | None = None
    end: int | None = None

    @classmethod
    def of(cls, folder: Path | str) -> TokenIds:
        """Reads it from a tokenizer folder. Raises TokenizerError if the folder does not load or has no padding or mask token."""
        tokenizer = load_tokenizer(folder)
        for role in ("pad_token_id", "mask_token_id"):
            if getattr(tokenizer, role) is None:
                raise TokenizerError(
                    str(folder), role, "masked language modelling needs this token", "Prepare the tokenizer with it"
                )
        begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        return cls(
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            pad=tokenizer.pad_token_id,
            mask=tokenizer.mask_token_id,
            begin=tokenizer.bos_token_id if begin is None else begin,
            end=tokenizer.eos_token_id if end is None else end,
        )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Tokenizer of a local folder. Raises TokenizerError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a damaged folder raises depends on the file that is damaged
        raise TokenizerError(
            str(folder), str(error), "must be a tokenizer folder", "Point to the folder `prepare` wrote"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def derive(config: ModelConfig, tokens: TokenIds) -> PretrainedConfig:
    """The Hugging Face configuration of a new model. Raises ModelError for a key of `extra` that it cannot take."""
    assert config.architecture is not None and config.hidden is not None
    model_type = MODEL_TYPES[config.architecture]
    names = _SIZES[model_type]
    intermediate = config.intermediate or (config.hidden * 3 // 2 if model_type == "modernbert" else config.hidden * 4)
    sizes = {"hidden": config.hidden, "layers": config.layers, "heads": config.heads, "intermediate": intermediate}
    check_extra(config.extra, model_type)
    positions = config.max_positions or 512
    values: dict[str, Any] = {
        **{names[size]: value for size, value in sizes.items()},
        # RoBERTa's positions begin behind the padding token's id: its table has rows that no token ever uses.
        "max_position_embeddings": positions + position_offset(model_type, tokens.pad),
        "vocab_size": tokens.vocab_size,
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.begin,
        "eos_token_id": tokens.end,
        **_PRESETS.get(config.architecture, {}),
        **dropouts(model_type, config.dropout),
        **config.extra,
    }
    if model_type == "modernbert":
        values |= {"cls_token_id": tokens.begin, "sep_token_id": tokens.end}
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # the strict dataclasses of Transformers raise their own types, which change between releases
        raise ModelError(
            "model.extra", config.extra, f"{config.architecture} refuses it: {error}", "Correct the value"
        ) from error


def dropouts(model_type: str, dropout: float | None) -> dict[str, float]:
    """The configuration keys that one dropout probability stands for; none if it is unset."""
    return {} if dropout is None else dict.fromkeys(_DROPOUTS[model_type], dropout)


def position_offset(model_type: str, pad: int) -> int:
    """What is added to positions counted from 0 before they index the position table."""
    return pad + 1 if model_type == "roberta" else 0


def max_positions(hf_config: PretrainedConfig) -> int:
    """Longest row or document in tokens."""
    offset = position_offset(str(hf_config.model_type), int(hf_config.pad_token_id or 0))
    return int(hf_config.max_position_embeddings) - offset


def check_extra(extra: dict[str, Any], model_type: str) -> None:
    """Raises ModelError for a key that this model type does not have, or that follows from another setting."""
    valid = set(AutoConfig.for_model(model_type).to_dict()) | set(_UNDECLARED.get(model_type, ()))
    settled = _DERIVED | _NOT_OURS | set(_SIZES[model_type].values()) | set(_COMMON.values())
    for key, value in extra.items():
        if key in settled:
            rule = "it follows from the other settings, the tokenizer or the pretrained model"
            raise ModelError(f"model.extra.{key}", value, rule, "Remove it")
        if key not in valid:
            nearest = difflib.get_close_matches(key, sorted(valid - settled), n=1, cutoff=0.0)
            raise ModelError(f"model.extra.{key}", value, f"{model_type} has no such key", f"The nearest one is {nearest[0]!r}")
