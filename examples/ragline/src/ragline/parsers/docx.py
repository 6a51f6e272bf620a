"""Word documents to text: paragraphs, tables as rows, headings by style, equations as characters."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lxml import etree

from ragline.limits import Limits
from ragline.parsers.archives import Archive
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
# Word keeps a second copy of each text box for older readers (ECMA-376 part 3, "Markup Compatibility").
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_P, _TBL, _TR, _TC, _R = f"{_W}p", f"{_W}tbl", f"{_W}tr", f"{_W}tc", f"{_W}r"
_TEXTS = frozenset((f"{_W}t", f"{_M}t"))
_BREAKS = {f"{_W}tab": "\t", f"{_W}br": "\n", f"{_W}cr": "\n", f"{_W}noBreakHyphen": "-"}
_VALUE = f"{_W}val"
_HEADING_STYLE = re.compile(
    r"(?:heading|überschrift|titre|título|titolo|kop|rubrik) ?([1-9])$|title$", re.IGNORECASE
)
_MAX_OUTLINE_LEVEL = 8  # 9 is body text (ECMA-376 part 1, 17.3.1.20)
_NOTES = ("footnotes", "endnotes")
_MAIN = "word/document.xml"


def parse_docx(data: bytes, limits: Limits) -> ParsedText:
    """The text of a Word document: headers, body, notes and footers, one paragraph a block.

    Raises:
        DamagedError: it is a ZIP archive, but no readable Word document.
        TooLargeError: it goes beyond a limit.
    """
    archive = Archive(data, "Word document", limits)
    body = archive.xml(_MAIN).find(f"{_W}body")
    if body is None:
        raise archive.damaged()
    parts: dict[str, list[str]] = {}
    for _, kind, name in archive.related(_MAIN):
        if name in archive.names:
            parts.setdefault(kind, []).append(name)
    levels = _style_levels(archive.xml(parts["styles"][0])) if "styles" in parts else {}
    writer = TextWriter(limits)
    _write_margins(archive, parts.get("header", []), writer)
    _write_blocks(body, levels, writer)
    for kind in _NOTES:
        for name in parts.get(kind, []):
            _write_blocks(archive.xml(name), {}, writer)
    _write_margins(archive, parts.get("footer", []), writer)
    return writer.parsed()


def _write_margins(archive: Archive, names: list[str], writer: TextWriter) -> None:
    """Headers or footers, each text once: those of several sections may have the same."""
    seen = set()
    for name in names:
        text = "\n".join(_paragraph_text(p).strip() for p in archive.xml(name).iter(_P)).strip("\n")
        # A page number alone says nothing.
        if text not in seen and any(sign.isalpha() for sign in text):
            seen.add(text)
            writer.block(text)


def _write_blocks(root: etree._Element, levels: dict[str, int], writer: TextWriter) -> None:
    for block in _blocks(root):
        if block.tag == _TBL:
            writer.table(_rows(block))
        else:
            writer.block(_paragraph_text(block), level=_heading_level(block, levels))


def _blocks(root: etree._Element) -> Iterator[etree._Element]:
    """Paragraphs and tables in their order, also those inside of content controls and other frames."""
    stack = [root]
    while stack:
        element = stack.pop()
        if element.tag in (_P, _TBL):
            yield element
        elif element.tag != _FALLBACK:
            stack.extend(reversed(element))


def _rows(table: etree._Element) -> Iterator[list[str]]:
    for row in _nearest(table, _TR):
        yield [
            " ".join(_paragraph_text(paragraph).strip() for paragraph in cell.iter(_P))
            for cell in _nearest(row, _TC)
        ]


def _nearest(root: etree._Element, tag: str) -> Iterator[etree._Element]:
    """The elements of a tag that are in no other of this tag: not those of tables in a cell."""
    stack = list(reversed(root))
    while stack:
        element = stack.pop()
        if element.tag == tag:
            yield element
        elif element.tag != _FALLBACK:
            stack.extend(reversed(element))


def _style_levels(styles: etree._Element) -> dict[str, int]:
    """The levels of headings by the id of their style.

    By the style's name, its outline level, or those of the style that it is based on.
    """
    levels: dict[str, int] = {}
    based_on: dict[str, str] = {}
    for style in styles.iter(f"{_W}style"):
        key = style.get(f"{_W}styleId", "")
        name, base = style.find(f"{_W}name"), style.find(f"{_W}basedOn")
        found = _HEADING_STYLE.match("" if name is None else name.get(_VALUE, ""))
        outline = _outline_level(style)
        if found or outline is not None:
            levels[key] = int(found[1] or 1) if found else outline or 1
        elif base is not None:
            based_on[key] = base.get(_VALUE, "")
    for key in based_on:
        base_key, steps = key, 0
        while base_key in based_on and steps < len(based_on):  # they may go in a circle
            base_key, steps = based_on[base_key], steps + 1
        if base_key in levels:
            levels[key] = levels[base_key]
    return levels


def _heading_level(paragraph: etree._Element, levels: dict[str, int]) -> int | None:
    own = _outline_level(paragraph)
    if own is not None:
        return own
    style = paragraph.find(f"{_W}pPr/{_W}pStyle")
    return None if style is None else levels.get(style.get(_VALUE, ""))


def _outline_level(element: etree._Element) -> int | None:
    outline = element.find(f"{_W}pPr/{_W}outlineLvl")
    value = "" if outline is None else outline.get(_VALUE, "")
    return int(value) + 1 if value.isdecimal() and int(value) <= _MAX_OUTLINE_LEVEL else None


def _paragraph_text(paragraph: etree._Element) -> str:
    """All characters, also those of equations, links and text boxes, but for what was deleted."""
    parts: list[str] = []
    stack = [paragraph]
    while stack:
        element = stack.pop()
        if element.tag in _TEXTS:
            parts.append(element.text or "")
        elif element.tag in _BREAKS:
            # Elsewhere a tab is a tab stop, a setting of the paragraph.
            parent = element.getparent()
            if parent is not None and parent.tag == _R:
                parts.append(_BREAKS[element.tag])
        elif element.tag != _FALLBACK:
            if element.tag == _P and parts:
                parts.append("\n")  # a paragraph of a text box
            stack.extend(reversed(element))
    return "".join(parts)
