"""Data sets of the Hugging Face ``datasets`` library: by name on the hub, or a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaletrain.errors import CorpusError


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """One column of one split. Code that comes with a data set is never run."""

    name: Literal["hub"] = "hub"
    path: str
    """A name on the hub, a folder written by ``save_to_disk``, or a folder of data files."""
    subset: str | None = None
    """The configuration of a data set that has several."""
    split: str = "train"
    """Which split."""
    column: str = "text"
    """The column with the text; null counts as an empty document."""
    revision: str | None = None
    """A commit of the hub repository, which makes the choice repeatable."""
    streaming: bool = True
    """Read while downloading instead of downloading first."""

    def documents(self) -> Iterator[str]:
        """Raw documents in the order of the data set. Raises CorpusError."""
        rows = self._rows()
        columns = rows.column_names
        if columns is not None and self.column not in columns:
            rule = f"no column {self.column!r}"
            raise CorpusError(f"source.column of {self.path}", f"columns {columns}", rule, "Set source.column to one of them")
        for number, row in enumerate(rows.select_columns([self.column]) if columns is not None else rows):
            text = row[self.column]
            if text is not None and not isinstance(text, str):
                raise CorpusError(f"{self.path}, row {number}: {self.column}", text, "the column holds text", "Set source.column")
            yield text or ""

    def _rows(self) -> Any:
        """The split, as a data set or a stream."""
        import datasets

        folder = Path(self.path).expanduser()
        saved = any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
        remedy = "Check the name, the subset and the split; a hub name needs a network or a filled cache"
        try:
            if not saved:
                path = str(folder) if folder.exists() else self.path
                return datasets.load_dataset(
                    path, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
                )
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:  # the library raises a dozen kinds, of its own and of its file systems
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CorpusError("source.path", self.path, f"cannot be loaded: {reason}", remedy) from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if self.split not in loaded:
            raise CorpusError(f"source.split of {self.path}", self.split, f"it has {', '.join(loaded)}", "Choose one of them")
        return loaded[self.split]
