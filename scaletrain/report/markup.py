"""HTML from values. Whatever is not ``Markup`` already is text and is escaped: names and reasons come from files of others."""

from __future__ import annotations

import html
import re

_VOID = frozenset({"link", "meta"})
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML forbids or UTF-8 cannot hold, and those that would reverse the text after them."""


class Markup(str):
    """Text that stands in the page as it is. Only ``element``, ``join`` and constants of this package make it."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """``text`` as text, in an element or between quotes; what no page may hold becomes U+FFFD. Markup passes unchanged."""
    return text if isinstance(text, Markup) else Markup(html.escape(_UNFIT.sub("\ufffd", text), quote=True))


def join(*parts: str) -> Markup:
    """The parts one after the other."""
    return Markup("".join(map(escape, parts)))


def element(tag: str, *children: str, **attributes: str | float | bool | None) -> Markup:
    """``element("td", name, class_="name")`` -> ``<td class="name">...</td>``.

    In the names of attributes an underscore stands for a hyphen, and one at the end for nothing. ``None`` and ``False`` leave the
    attribute out, ``True`` gives it no value.
    """
    given = "".join(_attribute(name, value) for name, value in attributes.items() if value is not None and value is not False)
    return Markup(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{join(*children)}</{tag}>")


def cut(text: str) -> Markup:
    """A name that is cut short where there is no room for it (class ``cut``); the pointer shows the whole."""
    return element("span", text, class_="cut", title=text if len(text) > 12 else None)


def _attribute(name: str, value: str | float | bool) -> str:
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
