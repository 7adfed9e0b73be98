"""Files of labelled texts, row by row: JSON Lines, a JSON list, CSV, TSV and Parquet, the text ones also as ``.gz``.

CSV is quoted as in RFC 4180, with a header. TSV has a header and no quotes, as its media type says (IANA,
text/tab-separated-values): a quotation mark is text, and no field holds a tab or a line break.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.data.sources.files import LINE_CHARACTERS_MAX, read_lines
from scaletrain.errors import CorpusError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")

_Row = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text or pair of texts."""

    key: str
    """Tells it from the others of its split, and stays when the file is reordered or the data prepared again."""
    text: str
    pair: str | None
    """The second text; None in a task of single texts."""
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """Which column, or field of an object, holds what."""

    text: str = "text"
    """The text, or the first of a pair."""
    pair: str | None = None
    """The second text of a pair; empty in a task of single texts."""
    label: str = "label"
    """The label: text, or a whole number or truth value, which becomes text."""
    key: str | None = None
    """What tells the examples of a split apart: text or whole numbers. Empty: a hash of text, pair and label."""


def examples(file: Path, columns: ColumnsConfig) -> Iterator[tuple[str, Example]]:
    """(where it stands, example) of every row of a file, in order. A text that is null is empty.

    Raises CorpusError, naming file and line, for a file that cannot be read or holds no rows, a column that is not there, and a
    value that is not text or not a label.
    """
    empty = True
    for where, row in rows(file):
        empty = False
        _require(row, columns, where)
        text = _text(row[columns.text], f"{where}: {columns.text}")
        pair = None if columns.pair is None else _text(row[columns.pair], f"{where}: {columns.pair}")
        label = _name(row[columns.label], f"{where}: {columns.label}", "a label", allow_bool=True)
        if columns.key is None:
            key = content_key(text, pair, label)
        else:
            key = _name(row[columns.key], f"{where}: {columns.key}", "a key", allow_bool=False)
        yield where, Example(key, text, pair, label)
    if empty:
        raise CorpusError(str(file), "no examples", "a file of examples holds at least one", "Check that it was written whole")


def content_key(text: str, pair: str | None, label: str) -> str:
    """The key of an example that brings none: 128 bits of BLAKE2b over what it says, as hexadecimal digits."""
    content = json.dumps([text, pair, label], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def rows(file: Path) -> Iterator[_Row]:
    kind = file.name.removesuffix(".gz")
    reader = next((reader for suffix, reader in _READERS.items() if kind.endswith(suffix)), None)
    if reader is None:
        raise CorpusError(str(file), file.suffix, f"its name ends in {', '.join(SUFFIXES)}", "Convert or rename it")
    return reader(file)


def _json_lines(file: Path) -> Iterator[_Row]:
    for number, line in read_lines(file):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _object(_decode(line, where), where)


def _json_list(file: Path) -> Iterator[_Row]:
    items = _decode("\n".join(line for _, line in read_lines(file)), str(file))
    if not isinstance(items, list):
        rule, remedy = "a .json file holds one list of objects", "Name it .jsonl if it has an object per line"
        raise CorpusError(str(file), type(items).__name__, rule, remedy)
    for number, item in enumerate(items, start=1):
        where = f"{file}, item {number}"
        yield where, _object(item, where)


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) and "\n" in text else ""
        remedy = "Write every object on a line of its own in .jsonl, or one list of them in .json"
        raise CorpusError(f"{where}{at}", text[:40], "it is not valid JSON", remedy) from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise CorpusError(where, value, "an example is a JSON object", 'Write it as {"text": ..., "label": ...}')


def _csv(file: Path) -> Iterator[_Row]:
    return _separated(file, delimiter=",", strict=True)


def _tsv(file: Path) -> Iterator[_Row]:
    return _separated(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(file: Path, **dialect: Any) -> Iterator[_Row]:
    # A setting of the whole process, so it is only ever raised: texts are longer than its 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), LINE_CHARACTERS_MAX))
    rows = csv.reader((f"{line}\n" for _, line in read_lines(file)), **dialect)
    names: list[str] | None = None
    before = 0
    try:
        for values in rows:
            where, before = f"{file}, line {before + 1}", rows.line_num
            if not values:
                continue
            if names is None:
                names = _header(values, where)
                continue
            if len(values) != len(names):
                rule = f"the header names {len(names)} columns"
                raise CorpusError(where, f"{len(values)} fields", rule, "Quote a field that holds a separator or a line break")
            yield where, dict(zip(names, values, strict=True))
    except csv.Error as error:
        where = f"{file}, line {before + 1}"
        remedy = 'Quote a field with "...", and write a quotation mark inside it twice'
        raise CorpusError(where, str(error), "it is not valid CSV", remedy) from None


def _header(names: list[str], where: str) -> list[str]:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise CorpusError(where, twice[0], "the header names every column once", "Rename one of them")
    return names


def _parquet(file: Path) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(str(file), str(error), "a Parquet file that can be read", "Copy or write it again") from None


_READERS: Mapping[str, Callable[[Path], Iterator[_Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def _require(row: Mapping[str, Any], columns: ColumnsConfig, where: str) -> None:
    for role in ("text", "pair", "label", "key"):
        column = getattr(columns, role)
        if column is not None and column not in row:
            rule = f"there is no column {column!r} (data.columns.{role})"
            raise CorpusError(where, f"columns {', '.join(map(str, row))}", rule, _nearest(column, list(row), role))


def _nearest(column: str, present: Sequence[str], role: str) -> str:
    folded = {name.casefold(): name for name in present}
    close = difflib.get_close_matches(column.casefold(), list(folded), n=1, cutoff=0.5)
    return f"Set data.columns.{role} to {folded[close[0]]!r}" if close else f"Set data.columns.{role} to one of them"


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(where, value, "the column holds text", "Name another one, or write its values as text")
    return _encodable(value, where)


def _name(value: Any, where: str, role: str, *, allow_bool: bool) -> str:
    """A label or a key as text. Numbers with a fraction are neither: a score is not a class."""
    if (isinstance(value, bool) and not allow_bool) or not isinstance(value, str | int):
        raise CorpusError(where, value, f"{role} is text or a whole number", "Write it as text, or name another column")
    if not (name := str(value)).strip():
        raise CorpusError(where, value, f"{role} is not empty", "Fill it in, or leave the row out")
    return _encodable(name, where)


def _encodable(text: str, where: str) -> str:
    r"""JSON can spell half a character (``"\ud800"``), which no file in UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = "half of a surrogate pair is no character"
        raise CorpusError(where, ascii(text[error.start : error.end]), rule, "Write the whole character") from None
    return text
