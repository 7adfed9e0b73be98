"""HTML as a tree, as strict as a browser is lenient: what is not nested properly is an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"link", "meta"}


@dataclass
class Node:
    """An element: its attributes (names in lower case), and its children, text among them."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def get(self, name: str) -> str:
        return self.attributes.get(name) or ""

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, class_: str = "") -> list[Node]:
        """Every element below with this tag and, where it is given, this class."""
        found = [node for node in self.walk() if node.tag == tag]
        return [node for node in found if not class_ or class_ in node.get("class").split()]

    def one(self, tag: str, class_: str = "") -> Node:
        (found,) = self.all(tag, class_)
        return found


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("")
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute is given twice: {attrs}"
        node = Node(tag, dict(attrs))
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parse(html: str) -> Node:
    """The tree of a document or a part of one. Raises AssertionError where an element is not closed in its place."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser._open == [parser.root]
    return parser.root


def cells(table: Node) -> list[list[str]]:
    """The text of a table's cells, row by row."""
    return [[cell.text for cell in row.walk() if cell.tag in ("td", "th")] for row in table.all("tr")]
