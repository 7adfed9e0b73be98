"""Files named by paths, globs and folders, and text read from them with errors that say where."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from scaletrain.errors import CorpusError

LINE_CHARACTERS_MAX = 1 << 28
"""A longer line is not text that was meant as one document, and would not fit in memory several times over."""


def expand(paths: Sequence[str], suffixes: tuple[str, ...], field: str = "source.paths") -> list[Path]:
    """The files that paths, globs and folders (searched whole, for ``suffixes``) name: in the order given, sorted within each.

    Raises CorpusError for a path that names nothing, and for URLs and pipes, which are never opened.
    """
    if not paths:
        raise CorpusError(
            field, list(paths), "at least one file, glob or folder", f"Give files that end in {', '.join(suffixes)}"
        )
    files: dict[Path, None] = {}
    for given in paths:
        if given.startswith("pipe:") or "://" in given:
            raise CorpusError(field, given, "only files can be read, no URLs and no pipes", "Copy the data to a file first")
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not found:
            rule = (
                f"a folder with files that end in {', '.join(suffixes)}" if path.is_dir() else "an existing file, glob or folder"
            )
            raise CorpusError(field, given, rule, "Check the path; it is relative to the working directory")
        files.update(dict.fromkeys(found))
    return list(files)


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a UTF-8 file, unpacked when its name ends in '.gz'.

    Raises CorpusError, naming file and line, for bytes that are not UTF-8, a line without end, or damaged compression.
    """
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig") as stream:
            while line := stream.readline(LINE_CHARACTERS_MAX):
                number += 1
                if len(line) >= LINE_CHARACTERS_MAX:
                    rule = f"a line has fewer than {LINE_CHARACTERS_MAX:,} characters"
                    raise CorpusError(f"{file}, line {number}", f"{len(line):,} characters or more", rule, "Break it into lines")
                yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        where = f"{file}, after line {number}"
        raise CorpusError(
            where, error.object[error.start : error.start + 8], "text is UTF-8", "Convert the file to UTF-8"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{file}, after line {number}", str(error), "a whole gzip file", "Copy the file again") from None
    except OSError as error:
        raise CorpusError(str(file), error.strerror, "a file that can be read", "Check its permissions and the disk") from error
