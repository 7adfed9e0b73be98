"""The English that ships inside every Python: the standard library's docstrings and help topics.

About two million characters without a download. Docstrings are taken from the sources by parsing, since importing modules runs
them. The text differs a little between Python versions; on one installation it is always the same.
"""

from __future__ import annotations

import ast
import functools
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaletrain.errors import CorpusError

# In the standard library of 3.11 and gone by 3.13 (PEP 594, and what 3.12 removed): an upgrade is not to take text from a corpus.
_REMOVED = frozenset(
    {
        *("aifc", "asynchat", "asyncore", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr", "imp", "lib2to3", "mailcap"),
        *("msilib", "nntplib", "pipes", "smtpd", "sndhdr", "sunau", "telnetlib", "uu", "xdrlib"),
    }
)

# Other people's packages, tests (their docstrings are test names), and code that is bundled or generated.
_PASSED_OVER = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "__pycache__"})


@dataclass(frozen=True, kw_only=True, slots=True)
class StdlibConfig:
    """Docstrings of all modules of the running Python's standard library, then the topics of ``help()``."""

    name: Literal["stdlib"] = "stdlib"

    def documents(self) -> Iterator[str]:
        """One document per docstring, modules in the order of their paths, then one per help topic. Raises CorpusError."""
        yield from (text for _, text in docstrings())
        yield from _topics()


@functools.cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(top-level module, docstring) of all; parsing takes seconds and a corpus is read more than once. Raises CorpusError."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
    used = [file for file in files if _ours(file.relative_to(root))]
    found: list[tuple[str, str]] = []
    for file in used:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old modules
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, OSError):  # an installation may carry templates that are not Python
                continue
        found += ((_top(file.relative_to(root)), text) for text in _below(tree))
    if not found:
        raise CorpusError("source stdlib", str(root), "this Python came without its sources", "Use another source, such as text")
    return tuple(found)


def _ours(file: Path) -> bool:
    """Whether a file belongs to a module of the standard library that all supported Python versions have."""
    top = _top(file)
    return top in sys.stdlib_module_names and top not in _REMOVED and not _PASSED_OVER.intersection(file.parts)


def _top(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def _below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstrings of a node and of the classes and functions in it, in the order of the source."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for statement in _statements(node.body):
        yield from _below(statement)


def _statements(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Definitions in a body, also inside ``if``, ``try``, ``with`` and loops; expressions are never entered."""
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
            continue
        for inner in ("body", "handlers", "orelse", "finalbody"):
            for block in getattr(statement, inner, ()):
                yield from _statements(block.body if isinstance(block, ast.ExceptHandler) else [block])


def _topics() -> Iterator[str]:
    """The texts behind ``help('LOOPS')`` and the like."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield topics[name]
