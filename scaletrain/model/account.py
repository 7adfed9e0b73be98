"""What a model is made of: groups for the optimizer, an identity to compare, floating-point operations to count.

All of it reads names, module types and configuration, never the sizes of weight tensors alone: ZeRO-3 leaves those empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from scaletrain.model.network import MaskedLanguageModel, hf_tree

# What gives weights their meaning without showing in their shapes. A list of what counts, rather than of what does not: a new
# release of Transformers may add keys, and that must not make another model of an old checkpoint.
_MEANING = (
    *("model_type", "num_attention_heads", "n_heads", "tie_word_embeddings", "pad_token_id", "layer_norm_eps", "norm_eps"),
    *("hidden_act", "hidden_activation", "activation", "classifier_activation", "conv_act", "conv_groups", "legacy"),
    *("layer_types", "local_attention", "rope_parameters", "sinusoidal_pos_embds", "position_biased_input"),
    *("relative_attention", "position_buckets", "max_relative_positions", "pos_att_type", "share_att_key", "norm_rel_ebd"),
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for the optimizer: weights (embeddings too) decay, biases and the weights of normalisations do not.

    The order is that of `named_parameters`; a tied parameter comes once; a group without parameters is left out.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        is_norm = type(model.get_submodule(owner)).__name__.endswith("Norm")  # LayerNorm, RMSNorm and their namesakes
        (plain if is_norm or leaf.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def describe(model: MaskedLanguageModel) -> dict[str, Any]:
    """The model in plain JSON values: `hf_config` and the shape of every parameter; enough for `rebuild` and `difference`."""
    shapes = {name: list(getattr(weight, "ds_shape", weight.shape)) for name, weight in model.named_parameters()}
    return {"hf_config": hf_tree(model.network), "parameters": shapes}


def identity(model: MaskedLanguageModel) -> str:
    """SHA-256 of what decides whether weights fit: names, shapes, and the configuration that gives them their meaning."""
    canonical = json.dumps(_compared(describe(model)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def difference(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """The first thing in which two descriptions differ, for an error message; none if weights of one fit the other."""
    before, now = _compared(stored), _compared(present)
    for part in ("hf_config", "parameters"):
        for key in sorted(before[part].keys() | now[part].keys()):
            if before[part].get(key) != now[part].get(key):
                return f"{key} is {before[part].get(key)} there and {now[part].get(key)} here"
    return None


def _compared(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    config = {key: value for key, value in description["hf_config"].items() if key in _MEANING}
    return {"hf_config": config, "parameters": dict(description["parameters"])}


def training_flops_per_token(model: MaskedLanguageModel, sequence_length: float, masked_share: float) -> float:
    """Floating-point operations of forward and backward per real token, for the model's FLOPs utilisation (MFU).

    6 per weight of every linear layer of the encoder, 12 * hidden * S per layer for attention (S: tokens that a token sees), and
    6 per weight of the head for the masked share of the tokens (the count of PaLM, arXiv:2204.02311 appendix B, for a
    bidirectional encoder). Not counted: DeBERTa's relative positions and convolution, so that its figure is a lower bound.
    """
    network: Any = model.network
    config, encoder = network.config, network.base_model
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    inside = sum(_weights(module) for module in encoder.modules())
    head = sum(_weights(module) for module in network.modules()) - inside
    if network.get_output_embeddings().out_features != vocabulary:
        head += hidden * vocabulary  # DeBERTa's newer head multiplies with the embedding's weight and has no linear layer for it
    seen = sum(min(sequence_length, span) for span in _spans(config, sequence_length))
    return 6.0 * inside + 12.0 * hidden * seen + 6.0 * masked_share * head


def _weights(module: nn.Module) -> int:
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _spans(config: Any, sequence_length: float) -> list[float]:
    """How many tokens a token can see in each layer."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * int(config.num_hidden_layers)
    return [2.0 * config.sliding_window + 1 if kind == "sliding_attention" else sequence_length for kind in kinds]
