"""The page about exit codes says what the classes say."""

from __future__ import annotations

import re
from pathlib import Path

from scaletrain import errors
from scaletrain.errors import ScaletrainError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / ".github" / "EXIT_CODES.md").read_text()


def classes(of: type[ScaletrainError] = ScaletrainError) -> list[type[ScaletrainError]]:
    return [of, *(found for derived in of.__subclasses__() for found in classes(derived))]


def test_the_table_has_every_code_with_the_class_that_brings_it() -> None:
    rows = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `?(\w*)`? ?\|", PAGE, re.MULTILINE)}
    own = {
        each.exit_code: each.__name__ for each in classes() if "exit_code" in vars(each) and each.__module__ == errors.__name__
    }
    assert rows == {0: "", **own}


def test_the_tree_in_the_docstring_has_every_class_with_its_code() -> None:
    tree, code = {}, 0
    for name, number in re.findall(r"^ .*?(\w+Error)(?: +(\d+) )?", errors.__doc__ or "", re.MULTILINE):
        code = int(number) if number else code  # a class without a number has that of the one above it
        tree[name] = code
    assert tree == {each.__name__: each.exit_code for each in classes() if each.__module__ == errors.__name__}
