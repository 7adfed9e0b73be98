"""What a classifier starts from: a model folder with its blocks, or an encoder for Transformers without any."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from scaletrain.errors import ModelError, TokenizerError
from scaletrain.model.classifier import (
    Classifier,
    ClassifierConfig,
    assemble,
    grow,
    is_pooler,
    new,
    pooler_option,
    set_dropout,
    warn_of_new_pooler,
)
from scaletrain.model.config import load_tokenizer
from scaletrain.model.folder import is_model_folder, read_model
from scaletrain.model.network import check_vocabulary, config_of, fill, load, quiet, read_config, seeded

SETTING = "model.start"


@dataclass(frozen=True, slots=True)
class Started:
    """A classifier on the CPU in fp32, the same on every rank."""

    classifier: Classifier
    tokenizer_folder: Path
    digest: str
    """SHA-256: of the model folder, or of the encoder's weights."""


def start(config: ClassifierConfig, folder: Path | None = None, seed: int = 0) -> Started:
    """The classifier that a model folder holds (``folder``, or ``config.start``), else one around the encoder of that name.

    A model folder brings its blocks. An encoder brings none, and starts a pooler that it lacks from the seed, with a warning.
    Only safetensors are read, and no code that comes with them is run. Raises ModelError, which names what is wrong: a file of a
    model folder, another pooling than its blocks were trained on, a model type that is not known here, weights that are missing.
    """
    if folder is None and is_model_folder(Path(config.start)):
        folder = Path(config.start)
    return _of_encoder(config, seed) if folder is None else _of_model(config, folder)


def _of_model(config: ClassifierConfig, folder: Path) -> Started:
    stored = read_model(folder)
    pooling = stored.head.pooling
    if config.pooling not in (None, pooling):
        raise ModelError(
            "model.pooling",
            config.pooling,
            f"the model in {folder} was trained on {pooling!r}",
            "Leave it out, or set it to that",
        )
    classifier = new(config, config_of(stored.hf_config), pooling, seed=0)
    for block in stored.head.blocks:
        grow(classifier, block, seed=0)
    fill(classifier, stored.state)
    return Started(classifier, folder, stored.digest)


def _of_encoder(config: ClassifierConfig, seed: int) -> Started:
    source, pooling = config.start, config.pooling or "mean"
    hf_config = read_config(SETTING, source)
    tokenizer_folder = _tokenizer_folder(source)
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    check_vocabulary(source, hf_config, max(tokenizer.get_vocab().values()) + 1, tokenizer.pad_token_id)
    set_dropout(config, hf_config)
    options = pooler_option(hf_config, pooling)
    with seeded(seed), quiet():
        encoder, missing = load(AutoModel, SETTING, source, hf_config, config.attention_implementation, **options)
    if lost := [name for name in missing if not is_pooler(name)]:
        rule = f"{len(lost)} weights of the encoder are missing, the first is {lost[0]}"
        raise ModelError(SETTING, source, rule, "Choose a complete model")
    if missing:
        warn_of_new_pooler(source)
    return Started(assemble(config, encoder, pooling), tokenizer_folder, _digest(encoder))


def _tokenizer_folder(source: str) -> Path:
    """The folder that is meant, or that of the hub's files on disk."""
    if Path(source).is_dir():
        return Path(source)
    try:
        with quiet():
            AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            file = cached_file(source, "tokenizer_config.json")
    except Exception as error:  # no network, no such file, a damaged one: each has a type of its own
        raise TokenizerError(SETTING, source, f"its tokenizer cannot be read: {error}", "Give a folder that has one") from error
    return Path(str(file)).parent


def _digest(encoder: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in encoder.named_parameters():
        digest.update(
            f"{name}|{tuple(weight.shape)}:".encode() + weight.detach().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
