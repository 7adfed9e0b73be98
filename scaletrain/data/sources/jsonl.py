"""JSON Lines: one object per line, the text in one of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from scaletrain.data.sources.files import expand, read_lines
from scaletrain.errors import CorpusError


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlConfig:
    """``.jsonl`` or ``.jsonl.gz``."""

    name: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...]
    """Files, globs, or folders that are searched whole."""
    field: str = "text"
    """The field with the text; null counts as an empty document."""

    def documents(self) -> Iterator[str]:
        """Raw documents in the order of the files. Raises CorpusError."""
        for file in expand(self.paths, (".jsonl", ".jsonl.gz")):
            for number, line in read_lines(file):
                if line.strip():
                    yield text_field(line, self.field, f"{file}, line {number}")


def text_field(data: str | bytes, field: str, where: str) -> str:
    """The text in one field of a JSON object. Raises CorpusError, naming ``where``, when it is not there."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise CorpusError(where, data[:40], "a JSON object", "Write every object on a line of its own") from None
    if not isinstance(value, dict):
        raise CorpusError(where, type(value).__name__, "a JSON object", "Write every object on a line of its own")
    if field not in value:
        raise CorpusError(where, f"fields {sorted(value)}", f"no field {field!r}", "Set source.field to one of them")
    text = value[field]
    if text is not None and not isinstance(text, str):
        raise CorpusError(f"{where}: {field}", text, "the field holds text", "Set source.field to one that does")
    return text or ""
