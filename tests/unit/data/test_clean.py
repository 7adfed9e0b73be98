"""Cleaning: what a document looks like afterwards, and why it may be dropped."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from scaletrain.data.clean import _CONTROL, CleanConfig, clean, dropped, share, strip_html, text_hash
from scaletrain.errors import ConfigError

PLAIN = CleanConfig()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("cafe\u0301", "café"),
        ("a\x00b\x07c\x7fd\x9f", "abcd"),
        ("\ufeffa\ud800b\uffff", "ab"),
        ("  a \t\n b\u00a0\u2003c\r\n", "a b c"),
        ("e\x00\u0301", "é"),
        ("क्\u200dष", "क्\u200dष"),
    ],
    ids=["NFC", "control", "unencodable", "white space", "composed once the control is gone", "joiners stay"],
)
def test_text_is_normalised(raw: str, expected: str) -> None:
    assert clean(raw, PLAIN) == expected
    assert clean(expected, PLAIN) == expected


def test_lines_are_kept_on_request() -> None:
    config = CleanConfig(keep_lines=True)
    assert clean("\n a  b\r\nc\u2028d\n\n\n\n\ne \n", config) == "a b\nc\nd\n\ne"


def test_lines_of_chinese_are_joined_without_a_blank_on_request() -> None:
    raw = "天气很\n好，\n我们\n\n去 公园\n。用 Python\n写、\n「あ\nいう」ＡＢ\nＣ\nEnglish\nlines"
    assert clean(raw, CleanConfig(unwrap=True)) == "天气很好，我们 去 公园。用 Python 写、「あいう」ＡＢＣ English lines"
    assert clean(raw, PLAIN) == " ".join(raw.split())
    assert clean("段落一\n　　段落二", CleanConfig(unwrap=True)) == "段落一 段落二"  # an indented line begins a paragraph
    with pytest.raises(ConfigError, match=r"clean.unwrap: got True; clean.keep_lines keeps all line breaks"):
        CleanConfig(unwrap=True, keep_lines=True)


def test_html_becomes_its_text() -> None:
    page = "<style>p{}</style><p>Fish &amp; <b>chips</b><br>at&nbsp;5&#8364;</p><script>var a = '<p>no</p>'</script><p>Next"
    assert clean(page, CleanConfig(html=True)) == "Fish & chips at 5€ Next"
    assert clean("1 < 2 & 3", PLAIN) == "1 < 2 & 3"


def test_an_unclosed_element_of_code_silences_no_later_document() -> None:
    assert strip_html("</script><p>a</p>").split() == ["a"]


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty"), ("abc", "too_short"), ("abcd", None), ("abcdef", None), ("abcdefg", "too_long")]
)
def test_the_length_filter_counts_characters_inclusively(text: str, reason: str | None) -> None:
    assert dropped(text, CleanConfig(min_characters=4, max_characters=6)) == reason


def test_a_length_filter_that_lets_nothing_pass_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"clean.max_characters: got 3; must be at least clean.min_characters \(4\)"):
        CleanConfig(min_characters=4, max_characters=3)


def test_the_hash_has_128_bits_of_the_text() -> None:
    assert text_hash("").hex() == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b-128 of nothing, as b2sum --length 128 gives it
    assert len({text_hash(str(number)) for number in range(1000)}) == 1000


def test_a_share_depends_on_text_purpose_and_seed_and_is_uniform() -> None:
    shares = [share(text_hash(str(number)), "validation") for number in range(4000)]
    assert all(0 <= one < 1 for one in shares)
    assert abs(sum(one < 0.1 for one in shares) / 4000 - 0.1) < 0.02
    assert share(text_hash("a"), "validation") == shares_again() != share(text_hash("a"), "validation", 1)
    assert share(text_hash("a"), "validation") != share(text_hash("a"), "tokenizer")


def shares_again() -> float:
    return share(text_hash("a"), "validation", 0)


def test_what_is_printable_needs_no_rule_for_characters() -> None:
    """The shortcut for such texts, for every character of Unicode: none is removed, and the blank alone is white space."""
    printable = "".join(char for char in map(chr, range(sys.maxunicode + 1)) if char.isprintable())
    assert len(printable) > 100_000
    assert _CONTROL.sub("", printable) == printable
    assert [char for char in printable if char.isspace()] == [" "]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("text", ["", " ", "a b", " a", "a ", "a  b", "   ", "e\u0301 a", "a  e\u0301"])
def test_the_shortcut_for_printable_texts_gives_what_the_rules_give(text: str, lines: bool) -> None:
    expected = unicodedata.normalize("NFC", " ".join(text.split()))
    assert clean(text, CleanConfig(keep_lines=lines)) == expected
