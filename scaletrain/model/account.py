"""What a model is made of: groups for the optimizer, an identity to compare, floating-point operations to count.

All of it reads names, module types and configuration, never the sizes of weight tensors alone: ZeRO-3 leaves those empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from scaletrain.model.classifier import BLOCKS, Classifier
from scaletrain.model.network import MaskedLanguageModel, hf_tree

# What gives weights their meaning without showing in their shapes. A list of what counts, rather than of what does not: a new
# release of Transformers may add keys, and that must not make another model of an old checkpoint.
_MEANING = (
    *("model_type", "num_attention_heads", "n_heads", "tie_word_embeddings", "pad_token_id", "layer_norm_eps", "norm_eps"),
    *("hidden_act", "hidden_activation", "activation", "classifier_activation", "conv_act", "conv_groups", "legacy"),
    *("layer_types", "local_attention", "rope_parameters", "sinusoidal_pos_embds", "position_biased_input"),
    *("relative_attention", "position_buckets", "max_relative_positions", "pos_att_type", "share_att_key", "norm_rel_ebd"),
)


def parameter_groups(
    model: nn.Module, weight_decay: float, head_factor: float = 1.0, idle: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters for the optimizer: weights (embeddings too) decay, biases and the weights of normalisations do not.

    The blocks of a Classifier are in groups of their own, with ``lr_factor`` set to ``head_factor``. Those of the numbers
    ``idle`` do not decay: nothing that is trained on pulls them back. The order is that of `named_parameters`; a tied parameter
    comes once; a group without parameters is left out.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (in_head, decays): [] for in_head in (False, True) for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        is_norm = type(model.get_submodule(owner)).__name__.endswith("Norm")  # LayerNorm, RMSNorm and their namesakes
        in_head = isinstance(model, Classifier) and name.startswith(BLOCKS)
        is_idle = in_head and int(name.removeprefix(BLOCKS).partition(".")[0]) in idle
        groups[in_head, not (is_norm or is_idle or leaf.endswith("bias"))].append(parameter)
    return [
        {"params": found, "weight_decay": weight_decay if decays else 0.0, **({"lr_factor": head_factor} if in_head else {})}
        for (in_head, decays), found in groups.items()
        if found
    ]


def describe(model: MaskedLanguageModel | Classifier) -> dict[str, Any]:
    """The model in plain JSON values: `hf_config`, the shape of every parameter and, of a Classifier, its `head`.

    Enough for `rebuild` and `difference`.
    """
    shapes = {name: list(getattr(weight, "ds_shape", weight.shape)) for name, weight in model.named_parameters()}
    described = {"hf_config": hf_tree(model.network), "parameters": shapes}
    return described | ({"head": model.head.to_json()} if isinstance(model, Classifier) else {})


def identity(model: MaskedLanguageModel | Classifier) -> str:
    """SHA-256 of what decides whether weights fit: names, shapes, and the configuration that gives them their meaning."""
    canonical = json.dumps(_compared(describe(model)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def difference(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """The first thing in which two descriptions differ, for an error message; none if weights of one fit the other."""
    before, now = _compared(stored), _compared(present)
    for part in ("hf_config", "head", "parameters"):
        theirs, ours = before.get(part, {}), now.get(part, {})
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                return f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
    return None


def _compared(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    config = {key: value for key, value in description["hf_config"].items() if key in _MEANING}
    compared = {"hf_config": config, "parameters": dict(description["parameters"])}
    if head := description.get("head"):  # without one the identity is what it was before there were classifiers
        blocks = {f"the block of {block['task']}": [number, *block["labels"]] for number, block in enumerate(head["blocks"])}
        compared["head"] = {"pooling": head["pooling"], **blocks}
    return compared


def training_flops_per_token(model: MaskedLanguageModel | Classifier, sequence_length: float, masked_share: float = 0.0) -> float:
    """Floating-point operations of forward and backward per real token, for the model's FLOPs utilisation (MFU).

    6 per weight of every linear layer of the encoder, 12 * hidden * S per layer for attention (S: tokens that a token sees), and
    6 per weight of the head for the share of the tokens that it sees (the count of PaLM, arXiv:2204.02311 appendix B, for a
    bidirectional encoder): the masked share, or, of a Classifier, one token of each sequence. Not counted: DeBERTa's relative
    positions and convolution, so that its figure is a lower bound.
    """
    network: Any = model.network
    config, encoder = network.config, network.base_model
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    inside = sum(_weights(module) for module in encoder.modules())
    if isinstance(model, Classifier):
        pooler = sum(_weights(module) for name, module in encoder.named_modules() if name.startswith("pooler"))
        inside, head, share = inside - pooler, pooler + sum(_weights(block) for block in model.blocks), 1 / sequence_length
    else:
        head, share = sum(_weights(module) for module in network.modules()) - inside, masked_share
        if network.get_output_embeddings().out_features != vocabulary:
            # DeBERTa's newer head multiplies with the embedding's weight and has no linear layer for it.
            head += hidden * vocabulary
    seen = sum(min(sequence_length, span) for span in _spans(config, sequence_length))
    return 6.0 * inside + 12.0 * hidden * seen + 6.0 * share * head


def _weights(module: nn.Module) -> int:
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _spans(config: Any, sequence_length: float) -> list[float]:
    """How many tokens a token can see in each layer."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * int(config.num_hidden_layers)
    return [2.0 * config.sliding_window + 1 if kind == "sliding_attention" else sequence_length for kind in kinds]
