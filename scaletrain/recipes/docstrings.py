"""Four small classification tasks that every Python carries with it: which module does this docstring come from?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from scaletrain import durable
from scaletrain.data import keyed
from scaletrain.data.sources.stdlib import docstrings

TASKS: Mapping[str, tuple[str, ...]] = {
    "first": ("email", "_pydecimal", "typing", "logging"),
    "second": ("asyncio", "xml", "difflib", "unittest"),
    "third": ("importlib", "doctest", "http", "ipaddress"),
    "fourth": ("inspect", "urllib", "threading", "configparser"),
}
"""Task -> its labels: modules with many docstrings that no distribution packages apart, each in one task only."""

CHARACTERS = (80, 300)
"""Shortest and longest example: sentences of one docstring, put together up to the second."""
MOST_PER_LABEL = 400
SHARES = {"train": 0.5, "gate": 0.25, "test": 0.25}


def write_tasks(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Writes ``folder/TASK/SPLIT.jsonl`` and returns the files: task -> split -> paths.

    A docstring is in one split with all its examples, and a text that two modules have is in none. What would give the module
    away by its name is masked.
    """
    found: dict[str, dict[str, str]] = {}
    texts: dict[str, set[str]] = {}
    for module, docstring in docstrings():
        if any(module in labels for labels in TASKS.values()):
            for text in _examples(docstring):
                found.setdefault(module, {}).setdefault(text, _split(docstring))
                texts.setdefault(text.casefold(), set()).add(module)
    files: dict[str, dict[str, list[str]]] = {}
    for task, modules in TASKS.items():
        rows: dict[str, list[str]] = {split: [] for split in SHARES}
        for module in modules:
            own = [(text, split) for text, split in found[module].items() if len(texts[text.casefold()]) == 1]
            own.sort(key=lambda pair: keyed.key(0, "order", pair[0]))
            for text, split in own[:MOST_PER_LABEL]:
                rows[split].append(json.dumps({"text": text, "label": module.removeprefix("_py")}) + "\n")
        for split, lines in rows.items():
            file = folder / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            durable.write(file, "".join(lines).encode())
            files.setdefault(task, {})[split] = [str(file)]
    return files


def _split(docstring: str) -> str:
    """Keyed by the docstring: the same in every run, and for all its examples."""
    drawn = keyed.key(0, "split", docstring) / 2**64
    for split, share in SHARES.items():
        drawn -= share
        if drawn < 0:
            return split
    return "test"


_NAMES = re.compile("|".join(sorted({name.removeprefix("_py") for names in TASKS.values() for name in names})), re.IGNORECASE)


def _examples(docstring: str) -> Iterator[str]:
    """Sentences put together, with the names of all modules masked; code and tables are left out."""
    shortest, longest = CHARACTERS
    pieces, piece = [], ""
    for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*\n", docstring):
        sentence = " ".join(sentence.split())
        if piece and len(piece) + 1 + len(sentence) > longest:
            pieces.append(piece)
            piece = ""
        piece = f"{piece} {sentence}".strip()
    for text in [*pieces, piece]:
        letters = sum(character.isalpha() for character in text)
        if shortest <= len(text) <= 2 * longest and letters > 0.6 * len(text):
            yield _NAMES.sub("X", text)
