"""A folder that counts only once another process has proven it.

It is written beside its place, read back by a process that knows nothing of scaletrain, and renamed only if that process
computes, from raw text, the logits that were recorded here before the export.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scaletrain import durable, outside
from scaletrain.errors import InputError, ScaletrainError, StorageError, TokenizerError
from scaletrain.model import TokenIds

MARKER = "scaletrain.json"
TOLERANCE = 1e-5
"""Largest absolute difference of a logit, in fp32, between the model before the export and the reloaded folder."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
class Claim:
    """What a folder must be shown to compute."""

    logits: Sequence[Tensor]
    """Recorded before the export, for each text."""
    texts: Sequence[str]
    reload: str
    """The script of the process that reads the folder: its arguments are the folder, a JSON request and the file to answer in."""
    max_positions: int


def put(
    output: Path, write: Callable[[Path], None], claim: Claim, parameters: int, source: Mapping[str, Any] | None
) -> ExportReport:
    """Has ``write`` fill a folder, proves it, and renames it to ``output``; an earlier export there is replaced.

    Raises InputError (the place is taken, no probe text), StorageError, and ScaletrainError if the reloaded model differs. After
    an error ``output`` is as it was.
    """
    check_place(output)
    partial: Path | None = None
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.partial-"))
            write(partial)
            difference = _compare(claim.logits, reload(partial, claim))
            marker = {"format": "scaletrain-export", "version": 1, "max_abs_diff": difference, "source": dict(source or {})}
            (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
            size = sum(file.stat().st_size for file in partial.iterdir())
            _put_in_place(partial, output)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{output}: got {error}; the export needs a writable disk with room for the weights") from error
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return ExportReport(output, difference, len(claim.texts), parameters, size)


def check_texts(texts: Sequence[str]) -> None:
    """Raises InputError where there is nothing to prove an export on."""
    if not texts:
        raise InputError("probe_texts", [], "the export is proven on at least one text", "Give a few sentences of the corpus")


def check_place(output: Path) -> None:
    """Raises InputError where ``output`` is something else than an earlier export or an empty folder."""
    remedy = "Choose another folder, or move this one away"
    if output.exists() and not output.is_dir():
        raise InputError("output", str(output), "is a file; an export is a folder", remedy)
    if output.is_dir() and any(output.iterdir()) and not _is_ours(output):
        raise InputError("output", str(output), "is a folder with contents that no export of scaletrain wrote", remedy)


def _is_ours(folder: Path) -> bool:
    try:
        marker = outside.read_json(folder / MARKER)
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("format") == "scaletrain-export"


def check_tokenizer(rows: int, folder: Path) -> None:
    """Raises TokenizerError for a tokenizer with more tokens than the model has embeddings (``rows``)."""
    tokens = TokenIds.of(folder)
    if tokens.vocab_size > rows:
        rule = f"the model has embeddings for {rows} tokens"
        raise TokenizerError(str(folder), tokens.vocab_size, rule, "Export with the tokenizer that the data was prepared with")


def reload(folder: Path, claim: Claim) -> list[Tensor]:
    """Logits of each text as a process that imports only Transformers and PyTorch computes them from the folder."""
    with tempfile.TemporaryDirectory(prefix="scaletrain-export-") as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "logits.safetensors")
        # As many threads as here: a sum in another order would differ in the last digits.
        asked = {"texts": list(claim.texts), "max_positions": claim.max_positions, "threads": torch.get_num_threads()}
        request.write_text(json.dumps(asked), encoding="utf-8")
        # -P: the working directory is not searched for modules, so that a checkout of anything there plays no part.
        command = [sys.executable, "-P", "-c", claim.reload, str(folder.resolve()), str(request), str(answer)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip()[-2000:]
            raise ScaletrainError(f"the exported folder does not load in a process of its own (exit {done.returncode}): {reason}")
        with safe_open(str(answer), framework="pt") as file:
            return [file.get_tensor(str(number)) for number in range(len(claim.texts))]


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
