"""From full weights to a folder that plain Transformers loads, reloaded and compared before it counts.

The folder is written beside its place, read back by another process that knows nothing of scaletrain, and renamed only if that
process computes, from raw text, the logits that were recorded here before the export.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

from scaletrain import durable
from scaletrain.errors import InputError, ScaletrainError, StorageError, TokenizerError
from scaletrain.model import PREFIX, MaskedLanguageModel, TokenIds, rebuild
from scaletrain.model.network import quiet

MARKER = "scaletrain.json"
TOLERANCE = 1e-5
"""Largest absolute difference of a logit, in fp32, between the model before the export and the reloaded folder."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json"),
    *("merges.txt", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

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
class ExportReport:
    """What was written and how close the reloaded model came."""

    folder: Path
    max_abs_diff: float
    """Over all logits of all probe texts."""
    probe_texts: int
    parameters: int
    bytes: int
    """Size of all files of the folder."""


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
    _check_place(output)
    if not probe_texts:
        raise InputError("probe_texts", [], "the export is proven on at least one text", "Give a few sentences of the corpus")
    model = rebuild(hf_config, {name: weight.to(_DTYPES[dtype]).float() for name, weight in state.items()}).eval()
    _check_tokenizer(model, tokenizer_folder)
    recorded = probe_logits(model, tokenizer_folder, probe_texts)
    partial: Path | None = None
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.partial-"))
            partial.chmod(0o755)  # mkdtemp's folders are private, a published model is not
            _write(model, tokenizer_folder, partial, _DTYPES[dtype])
            difference = _compare(recorded, _reload(partial, probe_texts, model.max_positions))
            marker = {"format": "scaletrain-export", "version": 1, "max_abs_diff": difference, "source": dict(source or {})}
            (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
            parameters = sum(weight.numel() for weight in state.values())
            size = sum(file.stat().st_size for file in partial.iterdir())
            _put_in_place(partial, output)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{output}: got {error}; the export needs a writable disk with room for the weights") from error
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return ExportReport(output, difference, len(probe_texts), parameters, size)


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


def _check_place(output: Path) -> None:
    remedy = "Choose another folder, or move this one away"
    if output.exists() and not output.is_dir():
        raise InputError("output", str(output), "is a file; an export is a folder", remedy)
    if output.is_dir() and any(output.iterdir()) and not _is_ours(output):
        raise InputError("output", str(output), "is a folder with contents that no export of scaletrain wrote", remedy)


def _is_ours(folder: Path) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("format") == "scaletrain-export"


def _check_tokenizer(model: MaskedLanguageModel, folder: Path) -> None:
    tokens, rows = TokenIds.of(folder), int(model.network.config.vocab_size)
    if tokens.vocab_size > rows:
        rule = f"the model has embeddings for {rows} tokens"
        raise TokenizerError(str(folder), tokens.vocab_size, rule, "Export with the tokenizer that the data was prepared with")


def _write(model: MaskedLanguageModel, tokenizer_folder: Path, folder: Path, dtype: torch.dtype) -> None:
    network: Any = model.network
    network.to(dtype)
    # Named parameters, not the state dict: a tied weight is written once, and tied again when it is loaded.
    weights = {name.removeprefix(PREFIX): weight.detach().contiguous() for name, weight in model.named_parameters()}
    with quiet():
        network.save_pretrained(folder, state_dict=weights)
    for name in _TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():  # so that `truncation=True` cuts where this model ends
        tree = json.loads(settings.read_text(encoding="utf-8")) | {"model_max_length": model.max_positions}
        settings.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _reload(folder: Path, texts: Sequence[str], max_positions: int) -> list[Tensor]:
    """Logits of each text as a process that imports only Transformers and PyTorch computes them from the folder."""
    with tempfile.TemporaryDirectory(prefix="scaletrain-export-") as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "logits.safetensors")
        # As many threads as here: a sum in another order would differ in the last digits.
        asked = {"texts": list(texts), "max_positions": max_positions, "threads": torch.get_num_threads()}
        request.write_text(json.dumps(asked), encoding="utf-8")
        # -P: the working directory is not searched for modules, so that a checkout of anything there plays no part.
        command = [sys.executable, "-P", "-c", _RELOAD, str(folder.resolve()), str(request), str(answer)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip()[-2000:]
            raise ScaletrainError(f"the exported folder does not load in a process of its own (exit {done.returncode}): {reason}")
        with safe_open(str(answer), framework="pt") as file:
            return [file.get_tensor(str(number)) for number in range(len(texts))]


def _compare(recorded: Sequence[Tensor], reloaded: Sequence[Tensor]) -> float:
    """Largest absolute difference. Raises ScaletrainError above the tolerance, also where one of the two is not a number."""
    largest = 0.0
    for number, (before, after) in enumerate(zip(recorded, reloaded, strict=True)):
        if before.shape != after.shape:
            shapes = f"{tuple(before.shape)} before the export and {tuple(after.shape)} after it"
            raise ScaletrainError(f"logits of probe text {number} have the shape {shapes}: the text is tokenised differently")
        difference = float((before - after).abs().max())
        if math.isnan(difference) or difference > TOLERANCE:
            rule = f"must be at most {TOLERANCE}; nothing was exported"
            raise ScaletrainError(f"logits of probe text {number} differ by {difference} after reloading the export; {rule}")
        largest = max(largest, difference)
    return largest


def _put_in_place(partial: Path, output: Path) -> None:
    """Makes the folder durable and renames it; an older export makes way in one rename and is deleted afterwards."""
    for path in (*partial.iterdir(), partial):
        durable.sync(path)
    older: Path | None = None
    if output.is_dir() and any(output.iterdir()):
        older = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.older-"))
        output.rename(older)
    try:
        partial.rename(output)
    except OSError:
        if older is not None:
            older.rename(output)
        raise
    durable.sync(output.parent)
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)
