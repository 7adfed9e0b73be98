"""A prepared corpus of real English in a second, and the settings of a run on it that takes a few more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaletrain.config import decode
from scaletrain.data.prepare import PrepareConfig, prepare

MODEL = {"architecture": "bert", "layers": 2, "hidden": 32, "heads": 2, "max_positions": 64, "dropout": 0.1}


def corpus(folder: Path, *, max_tokens: int = 46, tokenizer: Path | None = None, skip: int = 0) -> Path:
    """Prepares Python's help topics, cut into paragraphs, under ``folder``; returns the prepared folder."""
    from pydoc_data.topics import topics

    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[skip : skip + 300_000])
    tree = {
        "output": str(folder / "prepared"),
        "source": {"name": "text", "paths": [str(text)], "document": "paragraph"},
        "validation_fraction": 0.1,
        "tokenizer": {"name": "pretrained", "path": str(tokenizer)} if tokenizer else {"name": "wordpiece", "vocab_size": 700},
        "max_tokens": max_tokens,
        "chunks_per_shard": 400,
        "processes": 1,
    }
    prepare(decode(PrepareConfig, tree))
    return folder / "prepared"


def settings(prepared: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The tree of a pretraining run in fp32 under ZeRO-3: dropout, several slots per step with unequal masked counts."""
    tree: dict[str, Any] = {
        "output": str(output),
        "steps": 20,
        "device": "cpu",
        "model": MODEL,
        "data": {
            "corpora": [{"path": str(prepared)}],
            "chunks_per_step": 24,
            "slots": {"micro_batch_tokens": 256, "slot_multiple": 4},
        },
        "optimizer": {"learning_rate": 2e-3},
        "engine": {"name": "zero3", "persistence_threshold": 1000},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 1000},
        "metrics": {"console": "off", "tensorboard": False},
    }
    return {**tree, **changes}
