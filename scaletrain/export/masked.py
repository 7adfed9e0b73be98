"""A masked language model as a folder that plain Transformers loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

from scaletrain.export.proof import DTYPES, Claim, ExportReport, check_place, check_texts, check_tokenizer, put
from scaletrain.model import PREFIX, MaskedLanguageModel, rebuild
from scaletrain.model.folder import copy_tokenizer
from scaletrain.model.network import quiet

# Another process: nothing that this one has imported, registered or patched can help it. It imports what a user would.
_RELOAD = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder, request, answer = sys.argv[1:]
with open(request, encoding="utf-8") as stream:
    asked = json.load(stream)
torch.set_num_threads(asked["threads"])
tokenizer = AutoTokenizer.from_pretrained(folder)
model, loaded = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
if loaded["missing_keys"]:
    sys.exit(f"weights are missing: {sorted(loaded['missing_keys'])}")
model.eval()
logits = {}
with torch.no_grad():
    for number, text in enumerate(asked["texts"]):
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=asked["max_positions"])
        logits[str(number)] = model(**encoded).logits[0].contiguous()
save_file(logits, answer)
"""


@dataclass(frozen=True, slots=True)
class FilledMask:
    """What a model puts in the place of one mask."""

    text: str
    guesses: tuple[tuple[str, float], ...]
    """(token, probability), the most probable first."""


def export(
    state: Mapping[str, Tensor],
    hf_config: Mapping[str, Any],
    tokenizer_folder: Path,
    output: Path,
    *,
    probe_texts: Sequence[str],
    dtype: Literal["float32", "bfloat16"] = "float32",
    source: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Writes ``output`` from full weights by parameter name (CPU) and the ``hf_config`` of ``model.describe``.

    In bfloat16 the logits compared are those of the rounded weights, computed in fp32. ``source`` (plain JSON values: a digest, a
    step) is kept in the folder. A folder that an earlier export wrote is replaced; any other is refused.
    Raises InputError (the place is taken, no probe text), ModelError (weights that are not this model's), TokenizerError,
    StorageError, and ScaletrainError if the reloaded model differs. After an error ``output`` is as it was.
    """
    check_place(output)
    check_texts(probe_texts)
    model = rebuild(hf_config, {name: weight.to(DTYPES[dtype]).float() for name, weight in state.items()}).eval()
    check_tokenizer(int(model.network.config.vocab_size), tokenizer_folder)
    claim = Claim(probe_logits(model, tokenizer_folder, probe_texts), probe_texts, _RELOAD, model.max_positions)
    parameters = sum(weight.numel() for weight in state.values())
    return put(output, lambda folder: _write(model, tokenizer_folder, folder, DTYPES[dtype]), claim, parameters, source)


def probe_logits(model: MaskedLanguageModel, tokenizer_folder: Path, texts: Sequence[str]) -> list[Tensor]:
    """fp32 logits [tokens, vocabulary] of each text by itself, special tokens included, cut at the model's longest row."""
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    logits = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=model.max_positions)
            logits.append(model(encoded["input_ids"]).float())
    return logits


def fill_masks(folder: Path, texts: Sequence[str], top_k: int = 5) -> list[FilledMask]:
    """What an exported folder, through plain Transformers, puts where ``[MASK]`` stands: one entry per mask, in order."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    with quiet():
        network: Any = AutoModelForMaskedLM.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
    filled = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer(text.replace("[MASK]", tokenizer.mask_token), return_tensors="pt", truncation=True)
            masks = encoded["input_ids"][0] == tokenizer.mask_token_id
            for chances in network(**encoded).logits[0][masks].float().softmax(-1):
                best = chances.topk(top_k)
                words = [tokenizer.decode([token]).strip() for token in best.indices.tolist()]
                filled.append(FilledMask(text, tuple(zip(words, best.values.tolist(), strict=True))))
    return filled


def _write(model: MaskedLanguageModel, tokenizer_folder: Path, folder: Path, dtype: torch.dtype) -> None:
    network: Any = model.network
    network.to(dtype)
    # Named parameters, not the state dict: a tied weight is written once, and tied again when it is loaded.
    weights = {name.removeprefix(PREFIX): weight.detach().contiguous() for name, weight in model.named_parameters()}
    with quiet():
        network.save_pretrained(folder, state_dict=weights)
    copy_tokenizer(tokenizer_folder, folder, model.max_positions)
