"""What is not markup is text, whatever it holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.report.markup import Markup, element, escape, join
from tests.unit.report.dom import parse


@given(st.text())
def test_any_text_comes_back_as_text_and_only_what_no_page_may_hold_is_replaced(text: str) -> None:
    html = element("p", text, title=text)
    html.encode()
    (paragraph,) = parse(html).children
    shown = escape(text).encode().decode()
    assert "<" not in shown and ">" not in shown and '"' not in shown and "'" not in shown
    assert paragraph.tag == "p" and len(paragraph.children) <= 1
    assert len(paragraph.text) == len(text) or "\r" in text or "&" in text
    assert len(paragraph.text) == len(paragraph.get("title"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ('" onload="x', "&quot; onload=&quot;x"),
        ("' & '", "&#x27; &amp; &#x27;"),
        ("a\x00b\x1bc\x85", "a\ufffdb\ufffdc\ufffd"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\ud800 \ufffe", "\ufffd \ufffd"),
        ("\u202egnirts", "\ufffdgnirts"),
    ],
)
def test_text_is_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_markup_is_not_escaped_again() -> None:
    inner = element("b", "<")
    assert element("p", inner, " ", "<") == "<p><b>&lt;</b> &lt;</p>"
    assert escape(escape("&")) == "&amp;"


def test_joining_escapes_what_is_not_markup() -> None:
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_attributes() -> None:
    html = element("text", class_="a b", text_anchor="end", x=1.5, open=True, hidden=False, title=None, viewBox='"')
    assert html == '<text class="a b" text-anchor="end" x="1.5" open viewBox="&quot;"></text>'


def test_void_elements_have_no_end() -> None:
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
