"""A classifier as an encoder that plain Transformers loads, and one linear layer beside it.

The blocks of all tasks become one weight and one bias, their labels one list. Every line that is needed to use the folder without
scaletrain is in the script by which it is proven.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from scaletrain.export.proof import DTYPES, Claim, ExportReport, check_place, check_texts, check_tokenizer, put
from scaletrain.model import Classifier
from scaletrain.model.folder import copy_tokenizer
from scaletrain.model.network import quiet

HEAD, SPEC = "classifier.safetensors", "classifier.json"

_RELOAD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

folder, request, answer = sys.argv[1:]
asked = json.loads(Path(request).read_text(encoding="utf-8"))
torch.set_num_threads(asked["threads"])
spec = json.loads(Path(folder, "classifier.json").read_text(encoding="utf-8"))
tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
head = {name: value.float() for name, value in load_file(Path(folder, "classifier.safetensors")).items()}
assert len(spec["labels"]) == len(head["weight"])
logits = {}
with torch.no_grad():
    for number, text in enumerate(asked["texts"]):
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=asked["max_positions"])
        hidden = encoder(**encoded)
        if spec["pooling"] == "mean":
            mask = encoded["attention_mask"][..., None]
            pooled = (hidden.last_hidden_state * mask).sum(1) / mask.sum(1)
        else:
            pooled = hidden.pooler_output if spec["pooler"] else hidden.last_hidden_state[:, 0]
        logits[str(number)] = torch.nn.functional.linear(pooled, head["weight"], head["bias"])[0]
save_file(logits, answer)
"""


def export_classifier(
    classifier: Classifier,
    tokenizer_folder: Path,
    output: Path,
    *,
    probe_texts: Sequence[str],
    dtype: Literal["float32", "bfloat16"] = "float32",
    source: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Writes ``output``: config.json, model.safetensors and tokenizer of the encoder, classifier.safetensors (`weight` [labels,
    hidden], `bias` [labels]) and classifier.json (`labels`, `tasks` and `pooling`).

    In bfloat16 the logits compared are those of the rounded weights, computed in fp32. Raises InputError (the place is taken, no
    probe text), TokenizerError, StorageError, and ScaletrainError if the reloaded model differs; ``output`` is then as it was.
    """
    check_place(output)
    check_texts(probe_texts)
    classifier = classifier.to(DTYPES[dtype]).float().eval()
    check_tokenizer(int(classifier.network.config.vocab_size), tokenizer_folder)
    claim = Claim(_logits(classifier, tokenizer_folder, probe_texts), probe_texts, _RELOAD, classifier.max_positions)
    parameters = sum(weight.numel() for weight in classifier.parameters())
    return put(output, lambda folder: _write(classifier, tokenizer_folder, folder, DTYPES[dtype]), claim, parameters, source)


def _logits(classifier: Classifier, tokenizer_folder: Path, texts: Sequence[str]) -> list[Tensor]:
    """fp32 logits [labels] of each text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    logits = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=classifier.max_positions)
            logits.append(classifier(encoded["input_ids"]).float()[0])
    return logits


def _write(classifier: Classifier, tokenizer_folder: Path, folder: Path, dtype: torch.dtype) -> None:
    network: Any = classifier.network
    with quiet():
        network.to(dtype).save_pretrained(folder)
    linears: list[Any] = list(classifier.blocks)
    fused = {part: torch.cat([getattr(linear, part).detach() for linear in linears]).to(dtype) for part in ("weight", "bias")}
    save_file(fused, folder / HEAD)
    blocks = classifier.head.blocks
    spec = {
        "pooling": classifier.head.pooling,
        "pooler": getattr(network, "pooler", None) is not None,
        "labels": [label for block in blocks for label in block.labels],
        "tasks": [block.task for block in blocks for _ in block.labels],
    }
    (folder / SPEC).write_text(json.dumps(spec, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_folder, folder, classifier.max_positions)
    _name_inputs(folder / "tokenizer_config.json", token_types=classifier.uses_token_types)


def _name_inputs(settings: Path, *, token_types: bool) -> None:
    """Has the tokenizer give the encoder what it was trained on: a pair without its token types is another pair."""
    if settings.is_file():
        names = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
        tree = json.loads(settings.read_text(encoding="utf-8")) | {"model_input_names": names}
        settings.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
