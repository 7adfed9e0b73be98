"""Encoder and language-model head, new or pretrained, in one of two attention layouts, the head on masked rows only."""

from scaletrain.model.account import describe, difference, identity, parameter_groups, training_flops_per_token
from scaletrain.model.config import Architecture, Layout, ModelConfig, TokenIds
from scaletrain.model.network import PREFIX, MaskedLanguageModel, build, rebuild

__all__ = [
    "PREFIX",
    "Architecture",
    "Layout",
    "MaskedLanguageModel",
    "ModelConfig",
    "TokenIds",
    "build",
    "describe",
    "difference",
    "identity",
    "parameter_groups",
    "rebuild",
    "training_flops_per_token",
]
