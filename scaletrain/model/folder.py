"""A classifier as a folder: an encoder that plain Transformers loads, and beside it the head.

::

    MODEL/
        config.json, model.safetensors     the encoder, under Transformers' own names: AutoModel.from_pretrained(MODEL)
        tokenizer.json, ...                the tokenizer
        head.json                          pooling, dropout, and the labels of every block
        head.safetensors                   0.weight, 0.bias, 1.weight, ...: fp32, as all weights here
        MODEL.json                         written last: size and SHA-256 of every file, and facts about where it comes from

It is written beside its place and renamed, and read only if every file is what MODEL.json says.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MODEL_MAPPING

from scaletrain import durable, outside
from scaletrain.errors import ConfigError, ModelError, StorageError
from scaletrain.model.classifier import BLOCKS, ENCODER, HeadSpec
from scaletrain.model.config import max_positions
from scaletrain.model.network import config_of

MANIFEST = "MODEL.json"
FORMAT, VERSION = "scaletrain-model", 1
_CONFIG, _WEIGHTS, _HEAD, _HEAD_WEIGHTS = "config.json", "model.safetensors", "head.json", "head.safetensors"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json"),
    *("merges.txt", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
"""Whatever of these a tokenizer folder has is the tokenizer."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What a model folder holds, verified."""

    folder: Path
    """Its tokenizer is here too."""
    hf_config: Mapping[str, Any]
    head: HeadSpec
    state: Mapping[str, Tensor]
    """Full weights by their names in a Classifier, fp32, on the host."""
    facts: Mapping[str, Any]
    digest: str
    """SHA-256 of what the manifest says, and so of everything in the folder."""


def is_model_folder(folder: Path) -> bool:
    """Whether `write_model` wrote there, even if not all of it is there any more."""
    return any((folder / name).exists() for name in (MANIFEST, _HEAD, _HEAD_WEIGHTS))


def write_model(
    folder: Path,
    *,
    hf_config: Mapping[str, Any],
    head: HeadSpec,
    state: Mapping[str, Tensor],
    tokenizer_folder: Path,
    facts: Mapping[str, Any],
) -> str:
    """Writes ``folder`` whole, replacing what is there, and returns its digest. On one rank.

    ``hf_config`` is that of `describe`, ``state`` full weights by their names in a Classifier, ``facts`` plain JSON values.
    Raises ModelError for weights that are not those of the head, and StorageError; what was there before is untouched then.
    """
    encoder = {name.removeprefix(ENCODER): weight for name, weight in state.items() if name.startswith(ENCODER)}
    blocks = {name.removeprefix(BLOCKS): weight for name, weight in state.items() if name.startswith(BLOCKS)}
    _check_head(head, blocks)
    config = config_of(hf_config)
    named: Any = MODEL_MAPPING[type(config)]
    config.architectures = [named.__name__]

    def fill(partial: Path) -> None:
        durable.write(partial / _CONFIG, config.to_json_string(use_diff=False).encode())
        _save(partial / _WEIGHTS, encoder)
        copy_tokenizer(tokenizer_folder, partial, max_positions(config))
        durable.write(partial / _HEAD, json.dumps(head.to_json(), indent=1, ensure_ascii=False).encode())
        _save(partial / _HEAD_WEIGHTS, blocks)
        files = {file.name: _entry(file) for file in sorted(partial.iterdir())}
        manifest = json.loads(json.dumps({"format": FORMAT, "version": VERSION, "files": files, "facts": dict(facts)}))
        durable.write(partial / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1).encode())

    _put(folder, fill)
    return str(_manifest(folder)["sha256"])


def read_model(folder: Path) -> StoredModel:
    """The model in ``folder``. Raises ModelError, which names the file, where one is missing or is not what was written."""
    manifest = _verified(folder)
    try:
        head = HeadSpec.of_json(outside.read_json(folder / _HEAD))
        hf_config = outside.read_json(folder / _CONFIG)
        encoder = {ENCODER + name: weight for name, weight in load_file(folder / _WEIGHTS).items()}
        blocks = load_file(folder / _HEAD_WEIGHTS)
    except (OSError, ValueError, SafetensorError, ConfigError) as error:
        raise ModelError(str(folder), str(error), "must be a model folder of this version", "Write it again") from error
    _check_head(head, blocks)
    state = {**encoder, **{BLOCKS + name: weight for name, weight in blocks.items()}}
    return StoredModel(folder, hf_config, head, state, manifest["facts"], manifest["sha256"])


def copy_model(source: Path, folder: Path) -> None:
    """Copies a model folder, verified, whole or not at all. On one rank. Raises what `read_model` and `write_model` raise."""
    manifest = _verified(source)

    def fill(partial: Path) -> None:
        for name in (*manifest["files"], MANIFEST):
            shutil.copyfile(source / name, partial / name)

    _put(folder, fill)


def copy_tokenizer(tokenizer_folder: Path, folder: Path, max_length: int) -> None:
    """The tokenizer's files, cutting where the model ends: so that ``truncation=True`` is right."""
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        tree = json.loads(settings.read_text(encoding="utf-8")) | {"model_max_length": max_length}
        settings.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets ``fill`` fill a folder beside the place, syncs it, and renames it there; what was there goes in one rename."""
    partial, older = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "older"))
    try:
        for left in (partial, older):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        for path in (*partial.iterdir(), partial):
            durable.sync(path)
        if folder.exists():
            folder.rename(older)
        partial.rename(folder)
        durable.sync(folder.parent)
        shutil.rmtree(older, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        rule = "a model needs a writable disk with room for its weights"
        raise StorageError(f"{folder}: got {error}; {rule}. Free space or choose another folder") from error


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: pieces of one storage are refused. The format is what Transformers asks of a file before it reads it.
    whole = {name: value.detach().to("cpu", torch.float32, copy=True).contiguous() for name, value in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def _check_head(head: HeadSpec, blocks: Mapping[str, Tensor]) -> None:
    expected = {f"{number}.bias": (len(block.labels),) for number, block in enumerate(head.blocks)}
    found = {name: tuple(value.shape) for name, value in blocks.items() if name.endswith(".bias")}
    weights = {f"{number}.weight" for number in range(len(head.blocks))}
    if found != expected or {name for name in blocks if name not in found} != weights:
        shapes = {name: tuple(value.shape) for name, value in blocks.items()}
        raise ModelError("head", shapes, f"its labels ask for {expected} and weights beside them", "Use the weights of this head")


def _verified(folder: Path) -> dict[str, Any]:
    manifest = _manifest(folder)
    for name, entry in manifest["files"].items():
        try:
            file = outside.plain(folder, name)
        except ValueError as error:
            raise ModelError(str(folder / MANIFEST), str(error), "it lists plain files of the folder", "Write it again") from None
        if "/" in name or not file.is_file() or _entry(file) != entry:
            state = "altered" if file.is_file() else "missing"
            raise ModelError(
                str(file), state, f"{MANIFEST} lists it with another content", "Restore the folder, or write it again"
            )
    for name in (_CONFIG, _WEIGHTS, _HEAD, _HEAD_WEIGHTS):
        if name not in manifest["files"]:
            raise ModelError(str(folder / MANIFEST), sorted(manifest["files"]), f"must list {name}", "Write the folder again")
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    file, remedy = folder / MANIFEST, "Give a folder that was written whole, or restore this one"
    try:
        manifest: Any = outside.read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(str(file), str(error), "a model folder says in it what it holds", remedy) from error
    known = isinstance(manifest, dict) and (manifest.get("format"), manifest.get("version")) == (FORMAT, VERSION)
    if not known or not isinstance(manifest.get("files"), dict):
        raise ModelError(str(file), "another format", f"must be {FORMAT} version {VERSION}", remedy)
    if _digest({key: value for key, value in manifest.items() if key != "sha256"}) != manifest.get("sha256"):
        raise ModelError(str(file), "altered", "must have the SHA-256 that it gives itself", remedy)
    found: dict[str, Any] = manifest
    return found


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
