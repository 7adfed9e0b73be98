"""The page around its blocks: one HTML file that asks for nothing, not even where its browser is told to."""

from __future__ import annotations

from pathlib import Path

from scaletrain.report.blocks import block, word
from scaletrain.report.chart import HIGHLIGHT
from scaletrain.report.content import Page, Section
from scaletrain.report.markup import Markup, element, join

_STYLE = Path(__file__).with_name("style.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Should anything ever get past the escaping: the browser runs no script and asks no server for anything."""


def render(page: Page) -> str:
    """The page as the text of an HTML file; the same data gives the same text."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{page.title}: {page.kind}"),
        element("link", rel="icon", href="data:,"),  # else a browser asks the server for /favicon.ico
        element("style", Markup(_STYLE.read_text(encoding="utf-8") + HIGHLIGHT)),
    )
    body = element(
        "body",
        element(
            "header",
            element("p", page.kind, class_="kind"),
            element("h1", page.title),
            element("p", word(page.status), " ", page.detail, class_="status"),
            _contents(page),
        ),
        element("main", *(_section(number, section) for number, section in enumerate(page.sections))),
        element("footer", element("p", page.origin), element("p", page.made)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _contents(page: Page) -> Markup:
    links = (element("a", section.title, href=f"#section-{number}") for number, section in enumerate(page.sections))
    return element("nav", *links, aria_label="sections") if len(page.sections) > 1 else Markup()


def _section(number: int, section: Section) -> Markup:
    heading = element("h2", section.title)
    return element("section", heading, join(*map(block, section.blocks)), id=f"section-{number}")
