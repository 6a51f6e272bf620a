"""HTML to text: blocks apart, tables as rows, headings kept, scripts and navigation left out."""

from __future__ import annotations

import re
import warnings

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, PageElement, PreformattedString, Tag

from ragline.text import Heading, ParsedText, clean

_SKIPPED = frozenset(
    ("script", "style", "noscript", "template", "head", "nav", "svg", "math", "iframe", "object")
)
_BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "html",
        "li",
        "main",
        "menu",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "tfoot",
        "thead",
        "tr",
        "ul",
    ]
)
_TIGHT = frozenset(("li", "tr", "dt", "dd", "tbody", "thead", "tfoot"))
"""Blocks that begin a line but no new paragraph."""
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_SPACE = re.compile(r"[ \t\n\r\f\xa0]+")


def parse_html(data: bytes) -> ParsedText:
    """The visible text of a page.

    Its encoding is told by byte order mark, `<meta charset>` or, failing both, a guess. It may be nested to
    any depth: it is read without recursion.
    """
    with warnings.catch_warnings():
        # XHTML and feeds read as HTML give the same text: the warning is for people who want the tree.
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        soup = BeautifulSoup(data, "lxml")
    writer = _Writer()
    _walk(soup, writer)
    return ParsedText(text=writer.text(), headings=tuple(writer.headings), encoding=soup.original_encoding)


def _walk(root: Tag, writer: _Writer) -> None:
    stack: list[tuple[PageElement, bool]] = [(root, False)]
    while stack:
        node, leaving = stack.pop()
        if isinstance(node, Tag):
            if leaving:
                writer.leave(node.name)
            elif not _is_skipped(node):
                writer.enter(node.name)
                stack.append((node, True))
                stack.extend((child, False) for child in reversed(node.contents))
        elif isinstance(node, NavigableString) and not isinstance(node, PreformattedString):
            writer.write(str(node))


def _is_skipped(tag: Tag) -> bool:
    # Menus that are no <nav>, and the ¶ beside each heading, as Sphinx and MkDocs write them: they would be
    # passages of their own, full of the words that people search for, and part of every heading.
    return tag.name in _SKIPPED or tag.get("role") == "navigation" or "headerlink" in (tag.get("class") or ())


class _Writer:
    """Collects text block by block and knows the offset of each heading."""

    def __init__(self) -> None:
        self.headings: list[Heading] = []
        self._parts: list[str] = []
        self._length = 0
        self._newlines = 2  # newlines that the text ends with; nothing needs one at its very beginning
        self._wanted = 0
        self._space = False
        self._preformatted = 0
        self._heading: tuple[int, int, int] | None = None  # level, offset, index of its first part
        self._heading_level: int | None = None
        self._cells = 0

    def enter(self, name: str) -> None:
        if name in _BLOCKS:
            self._break(name)
        if name == "pre":
            self._preformatted += 1
        elif name == "br":
            self._want(1)
        elif name == "li":
            self._append("- ")
        elif name == "tr":
            self._cells = 0
        elif name in ("td", "th"):
            if self._cells:
                self._append(" | ")
            self._cells += 1
        elif name in _HEADINGS:
            self._heading_level, self._heading = _HEADINGS[name], None

    def leave(self, name: str) -> None:
        if name == "pre":
            self._preformatted -= 1
        if name in _HEADINGS:
            if self._heading is not None:
                level, start, part = self._heading
                title = "".join(self._parts[part:]).strip()
                self.headings.append(Heading(start=start, level=level, title=title))
            self._heading_level = self._heading = None
        if name in _BLOCKS:
            self._break(name)

    def write(self, text: str) -> None:
        if self._preformatted:
            if text:
                self._append(clean(text))
            return
        collapsed = _SPACE.sub(" ", clean(text))
        if collapsed.startswith(" "):
            self._space = True
        words = collapsed.strip(" ")
        if words:
            self._append(words)
            self._space = collapsed.endswith(" ")

    def text(self) -> str:
        return "".join(self._parts)

    def _break(self, name: str) -> None:
        self._want(1 if name in _TIGHT else 2)

    def _want(self, newlines: int) -> None:
        self._wanted = max(self._wanted, newlines)
        self._space = False

    def _append(self, text: str) -> None:
        missing = self._wanted - self._newlines
        if missing > 0:
            self._emit("\n" * missing)
        elif self._space and self._newlines == 0:
            self._emit(" ")
        self._wanted, self._space = 0, False
        if self._heading_level is not None and self._heading is None:
            self._heading = (self._heading_level, self._length, len(self._parts))
        self._emit(text)
        self._newlines = len(text) - len(text.rstrip("\n"))

    def _emit(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)
