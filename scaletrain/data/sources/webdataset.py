"""WebDataset tars of ``.txt`` or ``.json`` members.

The tars are walked by the same bounded header reader as the index: nothing is extracted, links, devices and names that lead
outside are refused, and a tar that was cut short is an error instead of a shorter corpus.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaletrain.data.index import members
from scaletrain.data.sources.files import expand
from scaletrain.data.sources.jsonl import text_field
from scaletrain.errors import CorpusError

_MEMBER_BYTES_MAX = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class WebdatasetConfig:
    """One document per member with the suffix ``member``; other members are passed over."""

    name: Literal["webdataset"] = "webdataset"
    paths: tuple[str, ...]
    """Tar files (not compressed), globs, or folders that are searched whole. URLs and pipes are refused."""
    member: Literal["txt", "json"] = "txt"
    """The suffix of the members that hold the text."""
    field: str = "text"
    """For ``json``: the field with the text."""

    def documents(self) -> Iterator[str]:
        """Raw documents in the order of the tars. Raises CorpusError."""
        for file in expand(self.paths, (".tar",)):
            yield from self._documents(file)

    def _documents(self, file: Path) -> Iterator[str]:
        with file.open("rb") as stream:
            descriptor = stream.fileno()

            def read(offset: int, count: int) -> bytes:
                return os.pread(descriptor, count, offset)

            for member in members(read, os.fstat(descriptor).st_size, str(file), ends=True):
                # webdataset's rule: the key ends at the first dot, the rest is the suffix
                if not member.key or member.name[len(member.key) + 1 :].lower() != self.member:
                    continue
                where = f"{file}: {member.name}"
                if member.size > _MEMBER_BYTES_MAX:
                    raise CorpusError(where, f"{member.size} bytes", f"at most {_MEMBER_BYTES_MAX}", "Split the document")
                data = read(member.data, member.size)
                try:
                    text = data.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    bad = data[error.start : error.start + 8]
                    raise CorpusError(where, bad, "text is UTF-8", "Convert it and write the tar again") from None
                yield text if self.member == "txt" else text_field(text, self.field, where)
