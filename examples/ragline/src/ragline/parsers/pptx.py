"""PowerPoint presentations to text: a slide is a page, its title a heading, its notes at its end."""

from __future__ import annotations

from collections.abc import Iterator

from lxml import etree

from ragline.limits import Limits
from ragline.parsers.archives import Archive
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText

_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_P = "{http://schemas.openxmlformats.org/presentationml/2006/main}"
_R = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_PARAGRAPH, _TABLE = f"{_A}p", f"{_A}tbl"
_TITLES = frozenset(("title", "ctrTitle"))
# Placeholders that say the same on each slide, or repeat the slide in its notes.
_REPEATED = frozenset(("sldNum", "dt", "ftr", "hdr", "sldImg"))
_MAIN = "ppt/presentation.xml"


def parse_pptx(data: bytes, limits: Limits) -> ParsedText:
    """The text of a presentation, slide by slide in the order in which they are shown.

    Raises:
        DamagedError: it is a ZIP archive, but no readable presentation.
        TooLargeError: it goes beyond a limit.
    """
    archive = Archive(data, "PowerPoint presentation", limits)
    targets = {key: name for key, _, name in archive.related(_MAIN)}
    writer = TextWriter(limits)
    for slide in archive.xml(_MAIN).iter(f"{_P}sldId"):
        name = targets.get(slide.get(f"{_R}id", ""), "")
        writer.page()
        _write_shapes(archive.xml(name), writer)
        for _, kind, related in archive.related(name):
            if kind == "notesSlide" and related in archive.names:
                _write_shapes(archive.xml(related), writer)
            elif kind == "diagramData" and related in archive.names:
                _write_paragraphs(archive.xml(related), writer)
    return writer.parsed()


def _write_shapes(root: etree._Element, writer: TextWriter) -> None:
    for shape in _nearest(root, frozenset((f"{_P}sp", _TABLE))):
        if shape.tag == _TABLE:
            writer.table(_rows(shape))
            continue
        placeholder = shape.find(f"{_P}nvSpPr/{_P}nvPr/{_P}ph")
        kind = None if placeholder is None else placeholder.get("type")
        if kind in _TITLES:
            writer.block(" ".join(_paragraphs(shape)), level=1)
        elif kind not in _REPEATED:
            _write_paragraphs(shape, writer)


def _write_paragraphs(root: etree._Element, writer: TextWriter) -> None:
    writer.block("\n".join(_paragraphs(root)))


def _paragraphs(root: etree._Element) -> Iterator[str]:
    for paragraph in root.iter(_PARAGRAPH):
        text = _text(paragraph)
        if text.strip():
            properties = paragraph.find(f"{_A}pPr")
            level = "0" if properties is None else properties.get("lvl", "0")
            yield "  " * (int(level) if level.isdecimal() and len(level) == 1 else 0) + text


def _text(paragraph: etree._Element) -> str:
    parts = []
    for element in paragraph.iter(f"{_A}t", f"{_A}br", f"{_A}tab"):
        parts.append((element.text or "") if element.tag == f"{_A}t" else " ")
    return "".join(parts)


def _rows(table: etree._Element) -> Iterator[list[str]]:
    for row in table.iter(f"{_A}tr"):
        yield [" ".join(map(_text, cell.iter(_PARAGRAPH))) for cell in row.iter(f"{_A}tc")]


def _nearest(root: etree._Element, tags: frozenset[str]) -> Iterator[etree._Element]:
    stack = [root]
    while stack:
        element = stack.pop()
        if element.tag in tags:
            yield element
        elif element.tag != _FALLBACK:
            stack.extend(reversed(element))
