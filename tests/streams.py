"""Small classification tasks with an answer, an encoder that learns them in seconds, and the settings of runs on them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from scaletrain.data.tokenizer import WordPieceConfig, train

WORDS = [f"{first}{second}" for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "ai", "ou", "ia")]
TASKS = {"fruit": ("apple", "pear", "plum"), "tools": ("hammer", "saw"), "birds": ("crow", "owl", "wren")}


def examples(labels: Sequence[str], each: int, seed: int) -> list[dict[str, str]]:
    """``each`` texts per label: mostly common words, and some that only this label has."""
    draw, rows = random.Random(seed), []
    for label in labels:
        own = random.Random(label).sample(WORDS, 8)
        for _ in range(each):
            words = [draw.choice(own) if draw.random() < 0.4 else draw.choice(WORDS) for _ in range(draw.randint(4, 14))]
            rows.append({"text": " ".join(words), "label": label})
    draw.shuffle(rows)
    return rows


def write(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    """As JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def task(folder: Path, name: str, labels: Sequence[str] | None = None, *, each: int = 40, seed: int = 1) -> dict[str, Any]:
    """The tree of a task whose files are made under ``folder``; its gate's split is large enough to decide."""
    labels = labels or TASKS[name]
    files = {}
    for number, (split, count) in enumerate({"train": each, "validation": 10, "gate": 60, "test": 20}.items()):
        files[split] = [str(write(folder / name / f"{split}.jsonl", examples(labels, count, 10 * seed + number)))]
    return {"name": name, "data": {**files, "conflicts": "keep"}}


def encoder(folder: Path) -> Path:
    """A BERT of two layers with random weights and a tokenizer that knows the words, as a Hugging Face folder."""
    folder.mkdir(parents=True)
    train(WordPieceConfig(vocab_size=300), lambda: [" ".join(WORDS)] * 3, max_tokens=38).save_pretrained(folder)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


STAGE = {
    "epochs": 2,
    "batch_size": 12,
    "optimizer": {"learning_rate": 2e-3},
    "checkpoint": {"every_steps": 5},
    "metrics": {"console": "off", "tensorboard": False},
}
COMPUTE = {
    "device": "cpu",
    "engine": {"name": "zero3", "persistence_threshold": 1000},
    "max_tokens": 40,
    "slots": {"micro_batch_tokens": 128, "slot_multiple": 4},
}


def finetuning(start: Path, output: Path, task_tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The tree of a fine-tuning run under ZeRO-3."""
    tree = {"output": str(output), "model": {"start": str(start)}, "task": task_tree, "training": STAGE, "compute": COMPUTE}
    return {**tree, **changes}


def stream(start: Path, output: Path, tasks: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The tree of a stream under ZeRO-3, with nothing done against forgetting and a gate that lets much pass."""
    tree = {
        "output": str(output),
        "model": {"start": str(start)},
        "tasks": list(tasks),
        "training": STAGE,
        "compute": COMPUTE,
        "gate": {"max_drop": 0.5},
    }
    return {**tree, **changes}
