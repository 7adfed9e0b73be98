"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scaletrain.data.sources.files import expand, read_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """UTF-8 text, ``.txt`` or ``.txt.gz``."""

    name: Literal["text"] = "text"
    paths: tuple[str, ...]
    """Files, globs, or folders that are searched whole."""
    document: Literal["line", "paragraph", "file"] = "paragraph"
    """What one document is: a line, lines up to a blank one, or a whole file."""

    def documents(self) -> Iterator[str]:
        """Raw documents in the order of the files. Raises CorpusError."""
        for file in expand(self.paths, (".txt", ".txt.gz")):
            lines = (line for _, line in read_lines(file))
            if self.document == "line":
                yield from lines
            elif self.document == "file":
                yield "\n".join(lines)
            else:
                yield from _paragraphs(lines)


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Runs of lines that are not blank."""
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)
