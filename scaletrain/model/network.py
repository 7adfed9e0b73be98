"""Encoder and language-model head as one module whose head runs on the masked rows only.

A masked language model learns from some 15-30 % of its tokens, but a plain head computes vocabulary-wide logits for all of them.
Here a hook narrows the hidden states between encoder and head; the head itself is the model's own and does not notice.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from scaletrain.errors import ModelError, TokenizerError
from scaletrain.model import attention
from scaletrain.model.config import (
    LAYOUTS,
    Layout,
    ModelConfig,
    TokenIds,
    check_extra,
    derive,
    dropouts,
    load_tokenizer,
    position_offset,
)

_AutoModel: Any = AutoModelForMaskedLM  # Transformers types these two only in part
_logging: Any = transformers_logging

PREFIX = "network."
"""In front of every parameter name; what follows is the name in plain Transformers."""


class MaskedLanguageModel(nn.Module):
    """A Transformers model for masked language modelling, built on every rank and partitioned afterwards.

    Raises ModelError for a layout that would let the documents of this model type attend to each other.
    """

    def __init__(self, network: PreTrainedModel, layout: Layout = "padded") -> None:
        super().__init__()
        model_type = str(network.config.model_type)
        if layout not in LAYOUTS[model_type]:
            rule = f"{model_type} keeps documents apart only in: {', '.join(LAYOUTS[model_type])}"
            raise ModelError("model.layout", layout, rule, f"Set model.layout={LAYOUTS[model_type][0]}")
        self.network = network
        self.layout = layout
        self._position_offset = position_offset(model_type, int(network.config.pad_token_id or 0))
        self._rows: Tensor | None = None
        if layout == "unpadded":
            attention.register()
            network.set_attn_implementation(attention.NAME)
        network.base_model.register_forward_hook(self._narrow)

    @property
    def max_positions(self) -> int:
        """Longest row or document in tokens."""
        return int(self.network.config.max_position_embeddings) - self._position_offset

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits [n_rows, vocabulary].

        `input_ids` [batch, length]; `attention_mask` the same, 1 for a token and 0 for padding (none: no padding; faster).
        `rows` int64 [n_rows]: indices into the flattened batch * length positions that are to be predicted (none: all).
        Layout unpadded: `input_ids` and `position_ids` are [1, tokens], the positions counting from 0 in every document, and
        `cu_seqlens` [documents + 1] holds the boundaries, best on the CPU. Raises ModelError for the inputs of the other layout.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids + self._position_offset
        if self.layout == "unpadded":
            if cu_seqlens is None or position_ids is None or attention_mask is not None or input_ids.shape[0] != 1:
                rule = "needs one row with position_ids and cu_seqlens, and no attention_mask"
                raise ModelError("layout unpadded", tuple(input_ids.shape), rule, "Collate for the layout of the model")
            inputs["documents"] = attention.Documents(cu_seqlens, tokens=input_ids.shape[1], device=input_ids.device)
        elif cu_seqlens is not None:
            raise ModelError("layout padded", "cu_seqlens", "must not be given", "Collate for the layout of the model")
        self._rows = rows
        try:
            logits: Tensor = self.network(**inputs).logits
        finally:
            self._rows = None
        return logits.flatten(0, -2)

    def _narrow(self, _encoder: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._rows is not None:
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden.flatten(0, 1).index_select(0, self._rows)[None]
        return output


def build(config: ModelConfig, tokenizer: TokenIds | Path | str, seed: int) -> MaskedLanguageModel:
    """The model on the CPU in fp32, with the same weights on every rank: they follow from the configuration and the seed.

    `tokenizer` is its folder, or what was read from it. The process's random state is left as it was.
    Raises ModelError and TokenizerError; warns if a pretrained folder has no head, so that a new one was made.
    """
    tokens = tokenizer if isinstance(tokenizer, TokenIds) else TokenIds.of(tokenizer)
    network: Any
    with _seeded(seed), quiet():
        if config.pretrained is not None:
            loaded = None if isinstance(tokenizer, TokenIds) else load_tokenizer(tokenizer)
            network = _load_pretrained(config, tokens, loaded)
        else:
            network = _from_config(derive(config, tokens), config.attention_implementation)
    model = MaskedLanguageModel(network, config.layout)
    if config.gradient_checkpointing:
        # Transformers is renaming it. Non-reentrant: the other kind loses gradients of whatever is passed by keyword.
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def rebuild(hf_config: Mapping[str, Any], state: Mapping[str, Tensor], layout: Layout = "padded") -> MaskedLanguageModel:
    """The model that a Hugging Face configuration (as in `describe`) and full weights by parameter name stand for.

    Raises ModelError if names or shapes do not fit.
    """
    with _seeded(0), quiet():
        values = {key: value for key, value in hf_config.items() if key not in ("model_type", "transformers_version")}
        model = MaskedLanguageModel(_from_config(AutoConfig.for_model(str(hf_config["model_type"]), **values), "sdpa"), layout)
    expected = dict(model.named_parameters())
    if wrong := sorted(expected.keys() ^ state.keys()):
        rule = "weights and architecture must have the same parameters"
        raise ModelError(
            "weights", wrong[0], rule, f"{len(wrong)} names are in one of the two only: use the weights of this model"
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            if parameter.shape != state[name].shape:
                raise ModelError(
                    f"weights.{name}", tuple(state[name].shape), f"must be {tuple(parameter.shape)}", "Use this model's weights"
                )
            parameter.copy_(state[name])
    return model


def _from_config(hf_config: PretrainedConfig, implementation: str) -> PreTrainedModel:
    network = _AutoModel.from_config(
        hf_config, attn_implementation=_implementation(hf_config, implementation), dtype=torch.float32, trust_remote_code=False
    )
    assert isinstance(network, PreTrainedModel)
    return network


def _implementation(hf_config: PretrainedConfig, implementation: str) -> str:
    # "eager" is the name under which Transformers files DeBERTa's own attention; it refuses any other.
    return "eager" if hf_config.model_type == "deberta-v2" else implementation


def _load_pretrained(config: ModelConfig, tokens: TokenIds, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    assert config.pretrained is not None
    source = config.pretrained
    try:
        hf_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        remedy = "Check the folder or the name (HF_HUB_OFFLINE keeps to what is on disk)"
        raise ModelError("model.pretrained", source, f"no configuration can be read: {error}", remedy) from error
    if hf_config.model_type not in LAYOUTS:
        raise ModelError(
            "model.pretrained", source, f"{hf_config.model_type} is none of {', '.join(LAYOUTS)}", "Choose one of these"
        )
    check_extra(config.extra, hf_config.model_type)
    _check_tokenizer(source, hf_config, tokens, tokenizer)
    try:
        for key, value in (dropouts(hf_config.model_type, config.dropout) | config.extra).items():
            setattr(hf_config, key, value)
        network, loaded = _AutoModel.from_pretrained(
            source,
            config=hf_config,
            attn_implementation=_implementation(hf_config, config.attention_implementation),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a missing file, a damaged one, a value refused: each has a type of its own, some private
        raise ModelError(
            "model.pretrained", source, f"does not load from its safetensors: {error}", "Convert or replace it"
        ) from error
    _check_loaded(source, network, sorted(loaded["missing_keys"]))
    return network  # type: ignore[no-any-return]


def _check_tokenizer(
    source: str, hf_config: PretrainedConfig, tokens: TokenIds, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Embeddings are learned per token id: a tokenizer that numbers tokens differently would scramble them without an error."""
    remedy = "Prepare the data with the tokenizer of the pretrained model"
    if tokens.vocab_size > hf_config.vocab_size:
        raise TokenizerError("tokenizer", tokens.vocab_size, f"{source} has embeddings for {hf_config.vocab_size} tokens", remedy)
    if hf_config.pad_token_id is not None and hf_config.pad_token_id != tokens.pad:
        raise TokenizerError("tokenizer.pad_token_id", tokens.pad, f"{source} pads with {hf_config.pad_token_id}", remedy)
    if tokenizer is None:
        return
    try:
        theirs = AutoTokenizer.from_pretrained(source, trust_remote_code=False).get_vocab()
    except Exception:  # a folder without a tokenizer: there is nothing to compare with
        warnings.warn(f"{source} has no tokenizer: whether the data's tokenizer fits it was not checked", stacklevel=2)
        return
    ours = tokenizer.get_vocab()
    for token in sorted(ours, key=lambda token: ours[token]):
        if theirs.get(token) != ours[token]:
            rule = f"{source} numbers the token {token!r} {theirs.get(token)}"
            raise TokenizerError("tokenizer", f"{token!r} is {ours[token]}", rule, remedy)


def _check_loaded(source: str, network: PreTrainedModel, missing: list[str]) -> None:
    if encoder := [name for name in missing if name.startswith(f"{network.base_model_prefix}.")]:
        rule = f"{len(encoder)} weights of the encoder are missing, the first is {encoder[0]}"
        raise ModelError("model.pretrained", source, rule, "Choose a complete model")
    if missing:
        warnings.warn(f"{source} has no language-model head: {len(missing)} weights of it start from random values", stacklevel=4)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generator for a while; `torch.manual_seed` would reach every GPU's generator as well."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' own bar and loading report are silenced: what matters in it is raised or warned about here."""
    level, bar = _logging.get_verbosity(), _logging.is_progress_bar_enabled()
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()
    try:
        yield
    finally:
        _logging.set_verbosity(level)
        if bar:
            _logging.enable_progress_bar()


def hf_tree(network: PreTrainedModel) -> dict[str, Any]:
    """The network's configuration as plain JSON values."""
    tree: dict[str, Any] = json.loads(network.config.to_json_string(use_diff=False))
    return tree
