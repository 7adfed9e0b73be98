"""WebDataset tars of ``.txt`` or ``.json`` members.

Each tar is read by its index, which is made on first sight: nothing is extracted, links, devices and names that lead outside are
refused, and a tar that was cut short, or changed since, is an error instead of another corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaletrain.data.foreign import TarSet
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

    index_folder: Path | None = None
    """Where the indexes of the tars are, or go; none given: beside each tar, or in memory where that cannot be written to."""
    strict: bool = False
    """Refuse a tar that has no index yet (`scaletrain index` makes it) instead of making it on first sight."""

    def documents(self) -> Iterator[str]:
        """Raw documents in the order of the tars. Raises CorpusError."""
        for file in expand(self.paths, (".tar",)):
            tars = TarSet.open([file], self.index_folder, strict=self.strict)
            for key, members in map(tars.read, range(len(tars))):
                for suffix, data in members.items():
                    if suffix.lower() == self.member:
                        yield self._text(data, f"{file}: {key}.{suffix}")

    def _text(self, data: bytes, where: str) -> str:
        if len(data) > _MEMBER_BYTES_MAX:
            raise CorpusError(where, f"{len(data)} bytes", f"at most {_MEMBER_BYTES_MAX}", "Split the document")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            bad = data[error.start : error.start + 8]
            raise CorpusError(where, bad, "text is UTF-8", "Convert it and write the tar again") from None
        return text if self.member == "txt" else text_field(text, self.field, where)
