"""The whole way on a newcomer's machine: prepare, pretrain on two ranks, export, fill in masks. Nothing is downloaded.

Every stage is a command that the user could have typed, run with settings that are left in the output folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import Field

from scaletrain.data.dataset import Dataset
from scaletrain.errors import ScaletrainError
from scaletrain.train.console import curve
from scaletrain.train.metrics import read_jsonl

MASKED = (
    "Return True if the string is [MASK].",
    "If the optional argument is omitted, the [MASK] is used.",
    "Raise [MASK] if the file does not exist.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """The first run of a newcomer."""

    output: Path = Path("quickstart")
    """Everything is written under this folder. Run again, what is finished there is not done again."""
    ranks: Annotated[int, Field(ge=1)] = 2
    """Processes that train together on this machine."""
    steps: Annotated[int, Field(ge=1)] = 400
    """Optimizer steps; some two minutes on two cores."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of the run."""


Config = QuickstartConfig


def main(config: QuickstartConfig) -> dict[str, Any]:
    """Runs all stages; returns what came out, which is also the last line printed."""
    began = time.monotonic()
    trees = settings(config)
    for name, tree in trees.items():
        _write(config.output / f"{name}.yaml", tree)
    file = {name: str(config.output / f"{name}.yaml") for name in trees}
    _run("Prepare the text that ships with Python", ["prepare", "--config", file["prepare"]])
    launch = ["launch", f"backend.ranks={config.ranks}", "--", "pretrain", "--config", file["pretrain"]]
    _run(f"Pretrain a small BERT with ZeRO-3 on {config.ranks} ranks", launch)
    exported = _run("Export it, reload it with plain transformers, and compare", ["export", "--config", file["export"]])

    from scaletrain.export import fill_masks  # here: torch is slow to import, and the stages above run in processes of their own

    run = list(read_jsonl(Path(trees["pretrain"]["output"]) / "metrics.jsonl"))
    steps = [line for line in run if line["kind"] == "step"]
    evaluations = [line["scores"]["loss"] for line in run if line["kind"] == "eval"]
    held_out = Dataset.open(Path(trees["prepare"]["output"]), "validation")
    print("\nTraining loss\n" + curve([step["loss"] for step in steps]))
    print("\nWhat it puts in the place of a mask")
    for filled in fill_masks(Path(trees["export"]["output"]), MASKED, top_k=4):
        print(f"  {filled.text}\n      " + "  ".join(f"{word} {chance:.0%}" for word, chance in filled.guesses))
    result = {
        "mlm_eval_loss_first": evaluations[0],
        "mlm_eval_loss_last": evaluations[-1],
        "unigram_entropy": unigram_entropy(held_out),
        "export_max_abs_diff": exported["max_abs_diff"],
        "vocab_size": held_out.vocab_size,
        "steps": len(steps),
        "tokens_per_second": float(np.median([step["real_tokens_per_second"] for step in steps])),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(
        f"\nHeld-out loss {result['mlm_eval_loss_first']:.2f} -> {result['mlm_eval_loss_last']:.2f} nats; "
        f"guessing by word frequency alone cannot get under {result['unigram_entropy']:.2f}."
        f"\nThe model is in {trees['export']['output']}, the run in {trees['pretrain']['output']}. Next:\n"
        f"  tensorboard --logdir {trees['pretrain']['output']}/tensorboard\n"
        f"  scaletrain launch backend.ranks={config.ranks} -- pretrain --config {file['pretrain']} steps={2 * config.steps}\n"
        f"  scaletrain pretrain --help\n"
    )
    return result


def settings(config: QuickstartConfig) -> dict[str, dict[str, Any]]:
    """The settings of each stage: those of configs/*/stdlib.yaml, with the paths of this run."""
    prepared, run, exported = (str(config.output / name) for name in ("corpus", "run", "model"))
    prepare = {
        "output": prepared,
        "source": {"name": "stdlib"},
        "validation_fraction": 0.05,
        "clean": {"min_characters": 20},
        "tokenizer": {"name": "wordpiece", "vocab_size": 8192, "lowercase": True},
        "max_tokens": 126,
        "chunks_per_shard": 4096,
    }
    pretrain = {
        "output": run,
        "steps": config.steps,
        "seed": config.seed,
        "model": {"architecture": "bert", "layers": 2, "hidden": 128, "heads": 4, "max_positions": 128, "dropout": 0.0},
        "data": {"corpora": [{"path": prepared}], "chunks_per_step": 64, "slots": {"micro_batch_tokens": 2048}},
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"name": "linear", "warmup_share": 0.1},
        "evaluation": {"every_steps": 100},
        "checkpoint": {"every_steps": 200},
        "metrics": {"log_every": 20},
    }
    return {"prepare": prepare, "pretrain": pretrain, "export": {"run": run, "output": exported}}


def unigram_entropy(dataset: Dataset) -> float:
    """Entropy of the data set's own token frequencies, in nats: no model that ignores context has a lower loss on it."""
    counts = np.bincount(np.concatenate([dataset.read(chunk) for chunk in range(dataset.chunks)]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _write(file: Path, tree: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(tree), sort_keys=False))


def _run(title: str, arguments: list[str]) -> dict[str, Any]:
    """One stage as a command; returns the JSON object in its last line, if any. Raises ScaletrainError with its code."""
    print(f"\n== {title}\n$ scaletrain {' '.join(arguments)}", flush=True)
    with subprocess.Popen([sys.executable, "-m", "scaletrain", *arguments], stdout=subprocess.PIPE, text=True) as stage:
        assert stage.stdout is not None
        last = ""
        for last in stage.stdout:
            if not last.startswith("{"):
                print(last, end="", flush=True)
    if stage.returncode:
        error = ScaletrainError(
            f"`scaletrain {' '.join(arguments)}` ended with exit code {stage.returncode}; its message is above"
        )
        error.exit_code = stage.returncode
        raise error
    return json.loads(last) if last.startswith("{") else {}
