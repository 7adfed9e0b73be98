"""Encoders, new or pretrained, in one of two attention layouts: with a language-model head, or with one that classifies."""

from scaletrain.model.account import describe, difference, identity, parameter_groups, training_flops_per_token
from scaletrain.model.classifier import Block, Classifier, ClassifierConfig, HeadSpec, Pooling, grow
from scaletrain.model.config import Architecture, Layout, ModelConfig, TokenIds
from scaletrain.model.folder import MANIFEST, StoredModel, copy_model, read_model, write_model
from scaletrain.model.network import PREFIX, MaskedLanguageModel, build, rebuild
from scaletrain.model.starting import Started, start

__all__ = [
    "MANIFEST",
    "PREFIX",
    "Architecture",
    "Block",
    "Classifier",
    "ClassifierConfig",
    "HeadSpec",
    "Layout",
    "MaskedLanguageModel",
    "ModelConfig",
    "Pooling",
    "Started",
    "StoredModel",
    "TokenIds",
    "build",
    "copy_model",
    "describe",
    "difference",
    "grow",
    "identity",
    "parameter_groups",
    "read_model",
    "rebuild",
    "start",
    "training_flops_per_token",
    "write_model",
]
