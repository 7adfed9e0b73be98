"""CLINC150 cut into a stream: files of 15 tasks of 10 intents, in the order of domains.json; made-up ones where it is missing."""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaletrain.errors import CorpusError, InputError

ROOT = Path(__file__).resolve().parents[2]
MADE_UP = ("cat", "harp", "lamp", "moon", "river", "salt", "train", "wheel")

Rows = Mapping[str, Sequence[Mapping[str, str]]]
"""Intent -> its rows, `text` and `label`, in the order of the file."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it all; examples are those of one intent."""

    tasks: int = 15
    intents: int = 10
    """Of a task."""
    train: int = 40
    test: int = 10
    finetune_train: int = 40
    finetune_test: int = 20
    epochs: int = 3
    """Of fine-tuning; the stream has one per task."""
    memory: int = 500
    """Examples that are kept of the stream."""


SMOKE = Size(tasks=2, intents=4, train=8, test=4, finetune_train=8, finetune_test=4, epochs=1, memory=16)


def write(folder: Path, size: Size, *, may_be_made_up: bool) -> list[dict[str, str]]:
    """Writes the files; returns those of every task: `train`, `test`, `finetune_train` and `finetune_test`.

    Of every intent the first rows of its split are taken. Raises CorpusError where the data set is missing.
    """
    try:
        intents, rows = read()
    except InputError:
        if not may_be_made_up:
            raise
        intents, rows = list(MADE_UP), made_up()
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for number in range(size.tasks):
        own = intents[number * size.intents : (number + 1) * size.intents]
        files = {}
        for name in ("train", "test", "finetune_train", "finetune_test"):
            taken = [row for intent in own for row in rows[name.removeprefix("finetune_")][intent][: getattr(size, name)]]
            file = folder / f"task{number:02d}.{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in taken), encoding="utf-8")
            files[name] = str(file)
        tasks.append(files)
    return tasks


def read() -> tuple[list[str], dict[str, Rows]]:
    """The intents, domain after domain (`oos` is in none), and the rows of both splits."""
    folder = Path(os.environ.get("SCALETRAIN_DATA", ROOT.parent / "shared" / "data")) / "clinc150"
    for name in ("domains.json", "train.jsonl.gz", "test.jsonl.gz"):
        if not (folder / name).is_file():
            rule = "no such file; this bench reads clinc150/domains.json, train.jsonl.gz and test.jsonl.gz"
            raise CorpusError("SCALETRAIN_DATA", str(folder / name), rule, "Set it to the folder above, or try --smoke")
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    rows: dict[str, Rows] = {}
    for split in ("train", "test"):
        found: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                found[row["label"]].append(row)
        rows[split] = found
    return [intent for domain in domains.values() for intent in domain], rows


def made_up() -> dict[str, Rows]:
    """Eight intents that are told apart by one word."""
    texts = {"train": "where is the {} number {}", "test": "please find {} {}"}
    return {
        split: {word: [{"text": text.format(word, n), "label": word} for n in range(20)] for word in MADE_UP}
        for split, text in texts.items()
    }
