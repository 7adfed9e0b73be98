"""The file around the blocks: whole, quiet, and the same for the same data."""

from __future__ import annotations

from scaletrain.report import Page, render
from scaletrain.report.content import Passage, Section, Word
from tests.unit.report.dom import parse


def page(title: str = "run", sections: int = 2) -> Page:
    return Page(
        title=title,
        kind="training run",
        status=Word(text="done", tone="good"),
        detail="after step 400",
        sections=tuple(Section(title=f"part {k}", blocks=(Passage(text=title),)) for k in range(sections)),
        origin="Read from /runs/x",
        made="Made by hand.",
    )


def test_the_page_asks_for_nothing_and_its_browser_is_told_not_to() -> None:
    root = parse(render(page()))
    wanted = [node.get(name) for node in root.walk() for name in ("src", "href", "srcset", "data", "action") if node.get(name)]
    assert wanted == ["data:,", "#section-0", "#section-1"]
    assert root.all("script") == []
    (policy,) = [meta.get("content") for meta in root.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    style = root.one("style").text
    assert "url(" not in style and "@import" not in style and "</" not in style


def test_title_status_sections_and_origin_are_there() -> None:
    root = parse(render(page()))
    assert (root.one("title").text, root.one("h1").text) == ("run: training run", "run")
    assert root.one("p", "status").text == "\N{CHECK MARK} done after step 400"
    assert [(node.get("id"), node.one("h2").text) for node in root.all("section")] == [
        ("section-0", "part 0"),
        ("section-1", "part 1"),
    ]
    assert [link.get("href") for link in root.one("nav").all("a")] == ["#section-0", "#section-1"]
    assert [paragraph.text for paragraph in root.one("footer").all("p")] == ["Read from /runs/x", "Made by hand."]


def test_a_single_section_needs_no_contents() -> None:
    assert parse(render(page(sections=1))).all("nav") == []


def test_hostile_titles_stay_text() -> None:
    title = "</title></style><script>alert(1)</script>\ud800"
    root = parse(render(page(title)))
    assert root.all("script") == [] and root.one("h1").text == title.replace("\ud800", "\ufffd")
    render(page(title)).encode()


def test_the_same_data_gives_the_same_page() -> None:
    assert render(page()) == render(page())
