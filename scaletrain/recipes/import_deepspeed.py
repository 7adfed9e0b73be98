"""Weights that DeepSpeed saved, as a folder that `pretrain` and `finetune` start from: the only door for foreign checkpoints.

A DeepSpeed checkpoint is a pickle, and to read a pickle is to run what its writer put into it. So it is read on an explicit
permission only, in a process of its own with an environment of its own, which hands back safetensors. That keeps this program's
memory and the secrets of its environment out of reach; it is no sandbox: the process has this user's rights.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM

from scaletrain import durable, outside
from scaletrain.data.tokenizer import folder_digest
from scaletrain.errors import CheckpointError, ConfigError, ModelError, StorageError
from scaletrain.model.folder import TOKENIZER_FILES
from scaletrain.model.network import load, quiet, read_config

_READER = Path(__file__).with_name("unpickle_deepspeed.py")
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TMPDIR")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Which checkpoint, and what it is of."""

    checkpoint: Path
    """The folder that was given to DeepSpeed's `save_checkpoint`, of ZeRO stage 1, 2 or 3."""
    like: Path
    """A Hugging Face folder of the same model: its config.json and its tokenizer say what the weights are of."""
    output: Path
    """The folder to write, which must not exist; for `model.pretrained` or `model.start`."""
    tag: str | None = None
    """Which of the folder's checkpoints; empty: the one that its file `latest` names."""
    prefix: str = ""
    """What stands before the names of the weights in the checkpoint and not in Transformers, such as `model.`"""


Config = ImportConfig


def main(config: ImportConfig, *, trust: bool = False) -> dict[str, Any]:
    """Writes the folder, and says how many weights it has. Moments are not brought over: training starts with fresh ones.

    Raises ConfigError without permission, CheckpointError for what DeepSpeed cannot read, ModelError where the weights are not
    those of ``like``, and StorageError.
    """
    if not trust:
        rule = "a DeepSpeed checkpoint is a pickle, and reading it runs whatever its writer put into it"
        raise ConfigError("checkpoint", str(config.checkpoint), rule, "If you trust the writer as you trust a program: --trust")
    _check(config)
    warnings.warn(f"{config.checkpoint} is unpickled: what its writer put there runs now, with your rights", stacklevel=2)
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.output.parent, prefix=f".{config.output.name}.partial-") as scratch:
            partial = Path(scratch, "model")
            partial.mkdir()
            weights = _named(_unpickled(config, Path(scratch)), config.prefix)
            _fill(partial, weights, config.like)
            missing = _missing(partial, config)
            for path in (*partial.iterdir(), partial):
                durable.sync(path)
            partial.rename(config.output)
            durable.sync(config.output.parent)
    except OSError as error:
        raise StorageError(f"output: got {str(config.output)!r}; it cannot be written ({error.strerror or error})") from error
    return {"folder": str(config.output), "weights": len(weights), "parameters": _count(weights), "not_in_checkpoint": missing}


def _check(config: ImportConfig) -> None:
    if config.output.exists():
        raise ConfigError("output", str(config.output), "is there already", "Choose another folder")
    if not config.checkpoint.is_dir():
        raise CheckpointError("checkpoint", str(config.checkpoint), "must be a folder that DeepSpeed wrote", "Correct the path")
    if config.tag is not None and (not outside.is_inside(config.tag) or "/" in config.tag):
        raise ConfigError("tag", config.tag, "must be the name of a folder in the checkpoint", "Leave it out for the newest")
    read_config("like", str(config.like))
    folder_digest(config.like)


def _unpickled(config: ImportConfig, scratch: Path) -> dict[str, Tensor]:
    """The weights by the checkpoint's names, as another process read them."""
    room, answer = scratch / "room", scratch / "weights.safetensors"
    room.mkdir()
    # -I: neither the working directory nor PYTHONPATH is searched for modules.
    command = [sys.executable, "-I", str(_READER), str(config.checkpoint.resolve()), config.tag or "", str(answer.resolve())]
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"HOME": str(room.resolve()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, cwd=room, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        rule = f"DeepSpeed must be able to read it: {said[0]}"
        raise CheckpointError("checkpoint", str(config.checkpoint), rule, "Give the folder that save_checkpoint was given")
    try:
        return load_file(outside.plain(scratch, answer.name))
    except (OSError, ValueError, SafetensorError) as error:
        rule = f"what was read of it is no safetensors: {error}"
        raise CheckpointError("checkpoint", str(config.checkpoint), rule, "It is not what DeepSpeed writes") from error


def _named(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By Transformers' names."""
    foreign = [name for name in found if not name.startswith(prefix)]
    if foreign or not found:
        rule = f"every weight's name must start with it; the checkpoint has {(foreign or ['no weights'])[0]}"
        raise ConfigError("prefix", prefix, rule, "Correct the prefix")
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _fill(partial: Path, weights: dict[str, Tensor], like: Path) -> None:
    for name in ("config.json", *TOKENIZER_FILES):
        if (like / name).is_file():
            shutil.copyfile(like / name, partial / name)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})


def _missing(partial: Path, config: ImportConfig) -> list[str]:
    """What a masked model of this kind has and the checkpoint has not: at most its head. Raises ModelError for anything else."""
    hf_config = read_config("like", str(partial))
    with quiet():
        network, missing = load(AutoModelForMaskedLM, "checkpoint", str(partial), hf_config, "sdpa")
    lost = [name for name in missing if name.startswith(f"{network.base_model_prefix}.")]
    if lost:
        rule = f"{len(lost)} weights of the encoder are not in the checkpoint, the first is {lost[0]}"
        raise ModelError("checkpoint", str(config.checkpoint), rule, "Set prefix, or give the folder of the same model as like")
    return missing


def _count(weights: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in weights.values())
