"""Parquet files: the text in one column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scaletrain.data.sources.files import expand
from scaletrain.errors import CorpusError

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetConfig:
    """``.parquet`` files, read some rows at a time and only in the one column."""

    name: Literal["parquet"] = "parquet"
    paths: tuple[str, ...]
    """Files, globs, or folders that are searched whole."""
    column: str = "text"
    """The column with the text; null counts as an empty document."""

    def documents(self) -> Iterator[str]:
        """Raw documents in the order of the files. Raises CorpusError."""
        import pyarrow
        import pyarrow.parquet

        for file in expand(self.paths, (".parquet",)):
            try:
                with pyarrow.parquet.ParquetFile(file) as table:
                    _require_text(file, table.schema_arrow, self.column)
                    for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[self.column]):
                        yield from (text or "" for text in batch.column(0).to_pylist())
            except (pyarrow.ArrowException, OSError) as error:
                raise CorpusError(str(file), str(error), "a Parquet file that can be read", "Copy or write it again") from None


def _require_text(file: object, schema: object, column: str) -> None:
    import pyarrow

    assert isinstance(schema, pyarrow.Schema)
    if column not in schema.names:
        raise CorpusError(str(file), f"columns {schema.names}", f"no column {column!r}", "Set source.column to one of them")
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise CorpusError(f"{file}: {column}", str(kind), "the column holds text", "Set source.column to one that does")
