"""The whole way on a newcomer's machine, from text to a model that has learned three tasks. Nothing is downloaded.

Every stage is a command that the user could have typed, run with settings that are left in the output folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import Field

from scaletrain.data.dataset import Dataset
from scaletrain.errors import ConfigError, RequeueError, ScaletrainError
from scaletrain.launcher.group import die_with, signals_to
from scaletrain.recipes.docstrings import TASKS, write_tasks
from scaletrain.train.console import curve
from scaletrain.train.metrics import read_jsonl

TEXTS = (
    "Parse the header of a message and return its address list.",
    "Schedule a callback to be run in the event loop after a delay.",
    "Return the logger with the specified name, creating it if necessary.",
    "Compare two sequences of lines and generate the delta.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """The first run of a newcomer."""

    output: Path = Path("quickstart")
    """Everything is written under this folder. Run again, what is finished there is not done again."""
    ranks: Annotated[int, Field(ge=1)] = 2
    """Processes that train together on this machine."""
    steps: Annotated[int, Field(ge=1)] = 400
    """Optimizer steps of the pretraining; some two minutes on two cores."""
    epochs: Annotated[float, Field(gt=0)] = 6.0
    """Passes over the examples of each task."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of all runs."""


Config = QuickstartConfig


def main(config: QuickstartConfig) -> dict[str, Any]:
    """Runs all stages; returns what came out, which is also the last line printed."""
    began = time.monotonic()
    trees = settings(config, write_tasks(config.output / "tasks"))
    file = {name: str(config.output / f"{name}.yaml") for name in trees}
    texts = {Path(file[name]): yaml.safe_dump(tree, sort_keys=False) for name, tree in trees.items()}
    for path, text in texts.items():
        if path.exists() and path.read_text() != text:  # a stage that follows would find another start than it began with
            rule = f"an earlier quickstart has left {path.name} there with other settings"
            raise ConfigError("output", str(config.output), rule, "Use its settings, or another folder: output=FOLDER")
    for path, text in texts.items():
        path.write_text(text)
    launch = ["launch", f"backend.ranks={config.ranks}", "--"]
    _run("Prepare the text that ships with Python", ["prepare", "--config", file["prepare"]])
    _run(f"Pretrain a small BERT with ZeRO-3 on {config.ranks} ranks", [*launch, "pretrain", "--config", file["pretrain"]])
    tuned = _run("Fine-tune it: which module does a docstring come from?", [*launch, "finetune", "--config", file["finetune"]])
    streams = {
        name: _run(f"Two more tasks, {how}", [*launch, "continual", "--config", file[name]])
        for name, how in (
            ("naive", "with nothing done against forgetting"),
            ("protected", "with replay, elastic weight consolidation and distillation"),
        )
    }
    exported = _run("Export what was published, and compare", ["export", "--config", file["export"]])
    lineage = trees["protected"]["output"]
    (config.output / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    _run("Label a few lines", ["predict", lineage, f"input={config.output / 'texts.txt'}"])
    _run("One page about it all", ["report", lineage])

    run = list(read_jsonl(Path(trees["pretrain"]["output"]) / "metrics.jsonl"))
    evaluations = [line["scores"]["loss"] for line in run if line["kind"] == "eval"]
    print("\nLoss of the pretraining\n" + curve([line["loss"] for line in run if line["kind"] == "step"]))
    result = {
        "mlm_eval_loss_first": evaluations[0],
        "mlm_eval_loss_last": evaluations[-1],
        "unigram_entropy": unigram_entropy(Dataset.open(Path(trees["prepare"]["output"]), "validation")),
        "finetune_accuracy": tuned["accuracy"],
        "majority_baseline": tuned["majority_baseline"],
        **{name: _outcome(stream) for name, stream in streams.items()},
        "export_max_abs_diff": exported["max_abs_diff"],
        "seconds": round(time.monotonic() - began, 1),
    }
    print(summary(result, streams))
    print(
        f"\nThe page is {lineage}/report.html, the model {trees['export']['output']}. Next:\n"
        f"  {_program()} history {lineage}\n"
        f"  echo 'Return the root of the tree.' | {_program()} predict {lineage} top=3\n"
        f"  {_program()} onboard --lineage {lineage} --task {file['fourth']}\n"
    )
    return result


def settings(config: QuickstartConfig, files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of each stage; ``files``: task -> split -> its files."""
    at = {name: str(config.output / name) for name in ("corpus", "pretrain", "finetune", "naive", "protected", "model")}
    prepare = {
        "output": at["corpus"],
        "source": {"name": "stdlib"},
        "validation_fraction": 0.05,
        "clean": {"min_characters": 20},
        "tokenizer": {"name": "wordpiece", "vocab_size": 8192, "lowercase": True},
        "max_tokens": 126,
        "chunks_per_shard": 4096,
    }
    pretrain = {
        "output": at["pretrain"],
        "steps": config.steps,
        "seed": config.seed,
        "model": {"architecture": "bert", "layers": 2, "hidden": 128, "heads": 4, "max_positions": 128, "dropout": 0.0},
        "data": {"corpora": [{"path": at["corpus"]}], "chunks_per_step": 64, "slots": {"micro_batch_tokens": 2048}},
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"name": "linear", "warmup_share": 0.1},
        "evaluation": {"every_steps": config.steps},
        "checkpoint": {"every_steps": config.steps},
        "metrics": {"log_every": 40},
    }
    first, *further, fourth = (
        {"name": name, "data": {**files[name], "validation_fraction": 0, "conflicts": "keep"}} for name in TASKS
    )
    training = {
        "epochs": config.epochs,
        "batch_size": 32,
        "optimizer": {"learning_rate": 2e-3},
        "selection": {"keep": "last"},
        "metrics": {"log_every": 100, "tensorboard": False},
    }
    shared = {"seed": config.seed, "training": training}
    finetune = {**shared, "output": at["finetune"], "model": {"start": at["pretrain"]}, "task": first}
    # A wide limit: that four more labels compete costs accuracy by itself, and far less than naive training does.
    stream = {
        **shared,
        "model": {"start": at["finetune"]},
        "tasks": further,
        "gate": {"max_drop": 0.4},
        "on_refusal": "continue",  # to show what becomes of a stream that goes on all the same
    }
    methods = [
        {"name": "replay", "capacity": 800, "per_new": 2.0, "seed": config.seed},
        {"name": "ewc", "strength": 100.0, "samples": 128},
        {"name": "lwf", "strength": 1.0},
    ]
    return {
        "prepare": prepare,
        "pretrain": pretrain,
        "finetune": finetune,
        "naive": {**stream, "output": at["naive"]},
        "protected": {**stream, "output": at["protected"], "methods": methods},
        "export": {"run": at["protected"], "output": at["model"]},
        "fourth": fourth,  # for the user to onboard
    }


def unigram_entropy(dataset: Dataset) -> float:
    """Entropy of the data set's own token frequencies, in nats: no model that ignores context has a lower loss on it."""
    counts = np.bincount(np.concatenate([dataset.read(chunk) for chunk in range(dataset.chunks)]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def summary(result: Mapping[str, Any], streams: Mapping[str, Mapping[str, Any]]) -> str:
    """The two streams side by side, and what the numbers before them were."""
    lines = [
        f"\nHeld-out loss {result['mlm_eval_loss_first']:.2f} -> {result['mlm_eval_loss_last']:.2f} nats; guessing by word "
        f"frequency alone cannot get under {result['unigram_entropy']:.2f}.",
        f"Fine-tuned accuracy {result['finetune_accuracy']:.3f}; always naming the most frequent module: "
        f"{result['majority_baseline']:.3f}.",
        "",
        f"{'':<12}{'average accuracy':>18}{'forgetting':>12}   gate",
    ]
    for name, stream in streams.items():
        said = ", ".join(f"{task}: {event}" for task, event in stream["gate"].items())
        lines.append(f"{name:<12}{stream['average_accuracy']:>18.3f}{stream['forgetting']:>12.3f}   {said}")
    return "\n".join(lines)


def _outcome(stream: Mapping[str, Any]) -> dict[str, Any]:
    """``gate`` is what became of the last task: published, refused or undecided."""
    *_, last = stream["gate"].values()
    return {"average_accuracy": stream["average_accuracy"], "forgetting": stream["forgetting"], "gate": last}


def _program() -> str:
    """How this `scaletrain` is called from here: it is not on the PATH unless its environment was activated."""
    mine = Path(sys.executable).with_name("scaletrain")
    found = shutil.which("scaletrain")
    return "scaletrain" if found and Path(found).resolve() == mine.resolve() else os.path.relpath(mine)


def _run(title: str, arguments: list[str]) -> dict[str, Any]:
    """One stage as a command; returns the JSON object in its last line, if any. Raises ScaletrainError with its code.

    Signals are the stage's, which may have something to save; it does not outlive this process.
    """
    print(f"\n== {title}\n$ scaletrain {' '.join(arguments)}", flush=True)
    with subprocess.Popen(
        [sys.executable, "-m", "scaletrain", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=partial(die_with, os.getpid()),
    ) as stage:
        asked: list[int] = []

        def tell(number: int) -> None:
            asked.append(number)
            stage.send_signal(number)

        assert stage.stdout is not None
        last = ""
        with signals_to(tell):
            for line in stage.stdout:
                if last:
                    print(last, end="", flush=True)
                last = line
            stage.wait()
    if asked:
        raise RequeueError(f"stopped on request in `scaletrain {arguments[0]}`; the same command continues it")
    if stage.returncode:
        error = ScaletrainError(
            f"`scaletrain {' '.join(arguments)}` ended with exit code {stage.returncode}; its message is above"
        )
        error.exit_code = stage.returncode
        raise error
    if last.startswith("{") and arguments[0] != "predict":
        return dict(json.loads(last))
    print(last, end="", flush=True)
    return {}
