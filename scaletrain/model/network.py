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
from scaletrain.model.config import (
    LAYOUTS,
    Layout,
    ModelConfig,
    TokenIds,
    check_extra,
    derive,
    dropouts,
    load_tokenizer,
)
from scaletrain.model.layout import Arrangement
from scaletrain.model.pair import PAIR, PairHead

_NAMES_CODE = {"auto_map", "trust_remote_code", "custom_pipelines"}
"""Keys of a configuration that name code to run, beside those of the attention."""

_logging: Any = transformers_logging  # Transformers types it only in part

PREFIX = "network."
"""In front of every parameter name but those of a pair head; what follows is the name in plain Transformers."""


class MaskedLanguageModel(nn.Module):
    """A Transformers model for masked language modelling, built on every rank and partitioned afterwards.

    ``pair`` is a second head, on the first token of each sample. Raises ModelError for a layout that would let the documents of
    this model type attend to each other.
    """

    def __init__(self, network: PreTrainedModel, layout: Layout = "padded", pair: PairHead | None = None) -> None:
        super().__init__()
        self._arrangement = Arrangement(network, layout)
        self.network = network
        self.layout = layout
        self.pair = pair
        self._rows: Tensor | None = None
        self._boundaries: Tensor | None = None
        self._firsts: Tensor | None = None
        network.base_model.register_forward_hook(self._narrow)

    @property
    def max_positions(self) -> int:
        """Longest row or document in tokens."""
        return self._arrangement.max_positions

    @property
    def uses_token_types(self) -> bool:
        """Whether it tells the second part of a pair from the first by `token_type_ids`."""
        return self._arrangement.token_types

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [n_rows, vocabulary], of inputs as `Arrangement.inputs` takes them; with a pair head also its [samples, 2].

        `rows` int64 [n_rows]: indices into the flattened batch * length positions that are to be predicted (none: all).
        """
        inputs = self._arrangement.inputs(input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens)
        self._rows, documents = rows, inputs.get("documents")
        self._boundaries = documents.boundaries if documents else None
        try:
            logits: Tensor = self.network(**inputs).logits.flatten(0, -2)
            if self.pair is None:
                return logits
            return logits, self.pair(self._firsts)
        finally:
            self._rows = self._boundaries = self._firsts = None

    def _narrow(self, _encoder: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        if self.pair is not None:
            self._firsts = hidden[:, 0] if self._boundaries is None else hidden[0, self._boundaries[:-1]]
        if self._rows is not None:
            output.last_hidden_state = hidden.flatten(0, 1).index_select(0, self._rows)[None]
        return output


def build(config: ModelConfig, tokenizer: TokenIds | Path | str, seed: int, *, pair: bool = False) -> MaskedLanguageModel:
    """The model on the CPU in fp32, with the same weights on every rank: they follow from the configuration and the seed.

    `pair` gives it a pair head, which changes no other weight. `tokenizer` is its folder, or what was read from it. The process's
    random state is left as it was. Raises ModelError and TokenizerError; warns if a pretrained folder has no head, so that a new
    one was made.
    """
    tokens = tokenizer if isinstance(tokenizer, TokenIds) else TokenIds.of(tokenizer)
    network: Any
    with seeded(seed), quiet():
        if config.pretrained is not None:
            loaded = None if isinstance(tokenizer, TokenIds) else load_tokenizer(tokenizer)
            network = _load_pretrained(config, tokens, loaded)
        else:
            network = from_config(AutoModelForMaskedLM, derive(config, tokens), config.attention_implementation)
        head = PairHead(network.config) if pair else None
    model = MaskedLanguageModel(network, config.layout, head)
    if config.gradient_checkpointing:
        recompute(network)
    return model


def rebuild(hf_config: Mapping[str, Any], state: Mapping[str, Tensor], layout: Layout = "padded") -> MaskedLanguageModel:
    """The model that a Hugging Face configuration (as in `describe`) and full weights by parameter name stand for.

    A pair head is left out. Raises ModelError if names or shapes do not fit.
    """
    with seeded(0), quiet():
        model = MaskedLanguageModel(from_config(AutoModelForMaskedLM, config_of(hf_config)), layout)
    fill(model, {name: weight for name, weight in state.items() if not name.startswith(PAIR)})
    return model


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies full weights by parameter name into the model. Raises ModelError if names or shapes do not fit."""
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


def _refuse_code(setting: str, source: object, tree: Any, path: str = "") -> None:
    """Raises ModelError for a configuration that names code to run, at any depth.

    With ``_attn_implementation_internal`` Transformers before 5.3 ran untrusted code of the hub (CVE-2026-4372), and
    with a nested ``trust_remote_code`` LightGlue's configuration overrode the caller (CVE-2026-5241).
    """
    below = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in below:
        name = str(key)
        if isinstance(tree, Mapping) and (name in _NAMES_CODE or "attn_implementation" in name) and value:
            rule = f"its config.json names code to run: {path}{name}"
            raise ModelError(setting, str(source), rule, "Choose a model that needs none, or delete the key if it does not")
        _refuse_code(setting, source, value, f"{path}{name}.")


def config_of(tree: Mapping[str, Any]) -> PretrainedConfig:
    """The Hugging Face configuration of its plain JSON values (`hf_tree`). Raises ModelError for a model type of another kind."""
    model_type = str(tree.get("model_type"))
    if model_type not in LAYOUTS:
        raise ModelError("model_type", model_type, f"must be one of {', '.join(LAYOUTS)}", "Choose a model of one of these")
    _refuse_code("config.json", model_type, tree)
    return AutoConfig.for_model(model_type, **{k: v for k, v in tree.items() if k not in ("model_type", "transformers_version")})


def from_config(auto: Any, hf_config: PretrainedConfig, implementation: str = "sdpa", **options: Any) -> PreTrainedModel:
    """A network of one of Transformers' `auto` classes with new weights, in fp32."""
    network = auto.from_config(
        hf_config,
        attn_implementation=_implementation(hf_config, implementation),
        dtype=torch.float32,
        trust_remote_code=False,
        **options,
    )
    assert isinstance(network, PreTrainedModel)
    return network


def recompute(network: Any) -> None:
    """Each block is computed again in the backward pass instead of being kept."""
    # Transformers is renaming it. Non-reentrant: the other kind loses gradients of whatever is passed by keyword.
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _implementation(hf_config: PretrainedConfig, implementation: str) -> str:
    # "eager" is the name under which Transformers files DeBERTa's own attention; it refuses any other.
    return "eager" if hf_config.model_type == "deberta-v2" else implementation


def read_config(setting: str, source: str) -> PretrainedConfig:
    """The configuration in a Hugging Face folder or of a hub name. Raises ModelError, which names the `setting`."""
    try:
        tree, _ = PretrainedConfig.get_config_dict(source)
        _refuse_code(setting, source, tree)
        hf_config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        remedy = "Check the folder or the name (HF_HUB_OFFLINE keeps to what is on disk)"
        raise ModelError(setting, source, f"no configuration can be read: {error}", remedy) from error
    if hf_config.model_type not in LAYOUTS:
        raise ModelError(setting, source, f"{hf_config.model_type} is none of {', '.join(LAYOUTS)}", "Choose one of these")
    return hf_config


def load(
    auto: Any, setting: str, source: str, hf_config: PretrainedConfig, implementation: str, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A network of one of Transformers' `auto` classes from the safetensors of `source`, in fp32, and what they do not hold.

    Raises ModelError, which names the `setting`.
    """
    try:
        network, loaded = auto.from_pretrained(
            source,
            config=hf_config,
            attn_implementation=_implementation(hf_config, implementation),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a missing file, a damaged one, a value refused: each has a type of its own, some private
        raise ModelError(setting, source, f"does not load from its safetensors: {error}", "Convert or replace it") from error
    return network, sorted(loaded["missing_keys"])


def _load_pretrained(config: ModelConfig, tokens: TokenIds, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    assert config.pretrained is not None
    source, setting = config.pretrained, "model.pretrained"
    hf_config = read_config(setting, source)
    check_extra(config.extra, hf_config.model_type)
    check_vocabulary(source, hf_config, tokens.vocab_size, tokens.pad)
    _check_numbering(source, tokenizer)
    for key, value in (dropouts(hf_config.model_type, config.dropout) | config.extra).items():
        try:
            setattr(hf_config, key, value)
        except Exception as error:  # the strict dataclasses of Transformers raise their own types
            raise ModelError(f"model.extra.{key}", value, f"{source} refuses it: {error}", "Correct the value") from error
    network, missing = load(AutoModelForMaskedLM, setting, source, hf_config, config.attention_implementation)
    if encoder := [name for name in missing if name.startswith(f"{network.base_model_prefix}.")]:
        rule = f"{len(encoder)} weights of the encoder are missing, the first is {encoder[0]}"
        raise ModelError(setting, source, rule, "Choose a complete model")
    if missing:
        warnings.warn(f"{source} has no language-model head: {len(missing)} weights of it start from random values", stacklevel=3)
    return network


def check_vocabulary(source: str, hf_config: PretrainedConfig, vocab_size: int, pad: int | None) -> None:
    """Raises TokenizerError for a tokenizer whose ids the embeddings of `source` do not have, or which pads with another one."""
    remedy = "Use the tokenizer of the pretrained model"
    if vocab_size > hf_config.vocab_size:
        raise TokenizerError("tokenizer", vocab_size, f"{source} has embeddings for {hf_config.vocab_size} tokens", remedy)
    if hf_config.pad_token_id is not None and hf_config.pad_token_id != pad:
        raise TokenizerError("tokenizer.pad_token_id", pad, f"{source} pads with {hf_config.pad_token_id}", remedy)


def _check_numbering(source: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Embeddings are learned per token id: a tokenizer that numbers tokens differently would scramble them without an error."""
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
            remedy = "Prepare the data with the tokenizer of the pretrained model"
            raise TokenizerError("tokenizer", f"{token!r} is {ours[token]}", rule, remedy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
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
