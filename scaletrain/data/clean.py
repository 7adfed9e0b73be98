"""Cleaning one document: pure functions from text to text, and the reasons why a document is dropped.

Order: markup, control characters, white space, Unicode normal form, length. Duplicates are found by a 128-bit hash of what comes
out.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Annotated

from pydantic import Field

from scaletrain.errors import ConfigError

DROPPED = ("empty", "too_short", "too_long", "no_tokens", "duplicate", "near_duplicate")
"""Why a document is not used, in the order in which it is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """What happens to a document before it is tokenised."""

    html: bool = False
    """Strip markup: tags go, entities become characters, scripts and styles are left out."""
    keep_lines: bool = False
    """Keep line breaks (runs of blank lines become one); otherwise all white space becomes single spaces."""
    unwrap: bool = False
    """Drop line breaks between two characters of Chinese or Japanese, which has no blanks, where lines end with the page."""
    min_characters: Annotated[int, Field(ge=1)] = 1
    """Shorter documents are dropped; counted after cleaning."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Longer documents are dropped; counted after cleaning."""

    def __post_init__(self) -> None:
        if self.unwrap and self.keep_lines:
            raise ConfigError("clean.unwrap", True, "clean.keep_lines keeps all line breaks", "Leave one of them out")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            rule = f"must be at least clean.min_characters ({self.min_characters})"
            raise ConfigError("clean.max_characters", self.max_characters, rule, "Raise it, or leave it out for no limit")


# Everything in Cc but white space, lone surrogates (which have no UTF-8), the byte-order mark, two non-characters. Format
# characters stay: joiners are part of the spelling in many scripts.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
_LINE_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# CJK punctuation and kana, Han ideographs, full-width forms. The literal first: it is what the search looks for.
_WIDE = "[\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff]"
_WRAPPED = re.compile(f"\n(?<={_WIDE}\n)(?={_WIDE})")
_BLANK_LINES = re.compile("\n{3,}")


def clean(text: str, config: CleanConfig) -> str:
    """The normalised text; cleaning it again (without ``html``) changes nothing."""
    if config.html:
        text = strip_html(text)
    # Most texts need nothing: what is printable has no control characters, and no white space but the plain one.
    if text.isprintable() and "  " not in text and text[:1] != " " and text[-1:] != " ":
        return unicodedata.normalize("NFC", text)
    text = _CONTROL.sub("", text)
    if config.unwrap:
        text = _WRAPPED.sub("", text)
    if not config.keep_lines:
        return unicodedata.normalize("NFC", " ".join(text.split()))
    lines = (" ".join(line.split()) for line in _LINE_BREAK.split(text))
    return unicodedata.normalize("NFC", _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n"))


def dropped(text: str, config: CleanConfig) -> str | None:
    """Why a clean text is not used, as far as it can be said from the text alone; None when it is."""
    if not text:
        return "empty"
    if len(text) < config.min_characters:
        return "too_short"
    if config.max_characters is not None and len(text) > config.max_characters:
        return "too_long"
    return None


def text_hash(text: str) -> bytes:
    """128 bits of BLAKE2b over the clean text: with 10^10 documents, a chance of 10^-19 that any two different ones agree."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def share(hashed: bytes, purpose: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on a document's text (by its hash), a purpose and a seed, and on nothing else."""
    keyed = hashlib.blake2b(hashed, digest_size=7, key=f"{purpose}:{seed}".encode())
    return int.from_bytes(keyed.digest(), "big") / (1 << 56)


def strip_html(text: str) -> str:
    """The text of an HTML document or fragment; block elements and line breaks become line breaks."""
    if "<" not in text and "&" not in text:
        return text
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


class _Text(HTMLParser):
    """Collects character data outside the elements whose content is not prose."""

    _SILENT = frozenset({"script", "style", "template", "noscript"})
    _INLINE = frozenset(
        {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd", "mark", "q", "s"}
        | {"samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr"}
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A block begins on a new line."""
        self._silent += tag in self._SILENT
        if tag not in self._INLINE:
            self.parts.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """``<br/>`` and the like have no content to keep silent about."""
        if tag not in self._INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """A block ends its line."""
        self._silent = max(0, self._silent - (tag in self._SILENT))
        if tag not in self._INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Text, entities already converted."""
        if not self._silent:
            self.parts.append(data)
