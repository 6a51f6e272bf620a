"""OpenDocument texts, sheets and slides to text: headings, tables as rows, slides as pages."""

from __future__ import annotations

from collections.abc import Iterator

from lxml import etree

from ragline.limits import Limits
from ragline.parsers.archives import Archive
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText

_PREFIX = "{urn:oasis:names:tc:opendocument:xmlns:"
_TEXT, _TABLE, _DRAW = f"{_PREFIX}text:1.0}}", f"{_PREFIX}table:1.0}}", f"{_PREFIX}drawing:1.0}}"
_OFFICE, _STYLE = f"{_PREFIX}office:1.0}}", f"{_PREFIX}style:1.0}}"
_PRESENTATION = f"{_PREFIX}presentation:1.0}}"
_H, _P, _ITEM = f"{_TEXT}h", f"{_TEXT}p", f"{_TEXT}list-item"
_ROW, _CELLS = f"{_TABLE}table-row", (f"{_TABLE}table-cell", f"{_TABLE}covered-table-cell")
_SKIPPED = frozenset(
    (f"{_OFFICE}annotation", f"{_TEXT}tracked-changes", f"{_OFFICE}forms", f"{_TEXT}note-citation")
)
_SIGNS = {f"{_TEXT}tab": "\t", f"{_TEXT}line-break": "\n"}
_MAX_REPEATED = 1_000
"""A row or cell stands for so many equal ones at most: a sheet ends with a million empty ones."""


def parse_odf(data: bytes, limits: Limits) -> ParsedText:
    """The text of an OpenDocument file: page headers, content, page footers.

    Raises:
        DamagedError: it is a ZIP archive, but no readable OpenDocument file.
        EncryptedError: it has a password.
        TooLargeError: it goes beyond a limit.
    """
    archive = Archive(data, "OpenDocument file", limits)
    if "META-INF/manifest.xml" in archive.names and b"encryption-data" in archive.read(
        "META-INF/manifest.xml"
    ):
        raise archive.encrypted()
    content = archive.xml("content.xml")
    writer = TextWriter(limits)
    styles = archive.xml("styles.xml") if "styles.xml" in archive.names else None
    _write_margins(styles, f"{_STYLE}header", writer)
    for body in content.iter(f"{_OFFICE}body"):
        _write(body, writer)
    _write_margins(styles, f"{_STYLE}footer", writer)
    return writer.parsed()


def _write_margins(styles: etree._Element | None, tag: str, writer: TextWriter) -> None:
    seen = set()
    for margin in () if styles is None else styles.iter(tag):
        text = "\n".join(_paragraph_text(paragraph).strip() for paragraph in margin.iter(_P))
        # A page number alone says nothing.
        if text not in seen and any(sign.isalpha() for sign in text):
            seen.add(text)
            writer.block(text)


def _write(body: etree._Element, writer: TextWriter) -> None:
    stack = [body]
    while stack:
        element = stack.pop()
        if element.tag in _SKIPPED:
            continue
        if element.tag == _H:
            level = element.get(f"{_TEXT}outline-level", "1")
            writer.block(_paragraph_text(element), level=int(level) if level.isdecimal() else 1)
        elif element.tag == _P:
            writer.block(_paragraph_text(element))
        elif element.tag == _ITEM:
            writer.block(_item_text(element))
        elif element.tag == f"{_TABLE}table":
            _write_table(element, writer)
        elif element.tag == f"{_DRAW}frame" and element.get(f"{_PRESENTATION}class") == "title":
            writer.block(" ".join(map(_paragraph_text, element.iter(_P))), level=1)
        else:
            if element.tag == f"{_DRAW}page":
                writer.page()
            stack.extend(reversed(element))


def _write_table(table: etree._Element, writer: TextWriter) -> None:
    parent = table.getparent()
    if parent is not None and parent.tag == f"{_OFFICE}spreadsheet":
        writer.block(table.get(f"{_TABLE}name", ""), level=1)
    writer.table(_rows(table))


def _rows(table: etree._Element) -> Iterator[list[str]]:
    for row in table.iter(_ROW):
        cells: list[str] = []
        for cell in row.iterchildren(*_CELLS):
            text = " ".join(_paragraph_text(paragraph).strip() for paragraph in cell.iter(_P))
            cells.extend([text] * _repeated(cell, "columns"))
        while cells and not cells[-1]:
            cells.pop()
        for _ in range(_repeated(row, "rows") if cells else 0):
            yield cells


def _repeated(element: etree._Element, kind: str) -> int:
    value = element.get(f"{_TABLE}number-{kind}-repeated", "1")
    return min(int(value), _MAX_REPEATED) if value.isdecimal() and len(value) < 10 else 1


def _item_text(item: etree._Element) -> str:
    lines = (" ".join(_paragraph_text(paragraph).split("\n")) for paragraph in item.iter(_P, _H))
    return "\n".join(f"- {line}" for line in lines if line.strip())


def _paragraph_text(paragraph: etree._Element) -> str:
    """All characters; a note stands where its mark stood, in brackets."""
    parts: list[str] = []
    stack: list[etree._Element | str] = [paragraph]
    while stack:
        element = stack.pop()
        if isinstance(element, str):
            parts.append(element)
            continue
        parts.append(_SIGNS.get(element.tag, ""))
        if element is not paragraph and element.tail:
            stack.append(element.tail)
        if element.tag == f"{_TEXT}s":
            count = element.get(f"{_TEXT}c", "1")
            parts.append(
                " " * (min(int(count), _MAX_REPEATED) if count.isdecimal() and len(count) < 10 else 1)
            )
        elif element.tag not in _SKIPPED:
            is_note = element.tag == f"{_TEXT}note-body"
            parts.append(" (" if is_note else "")
            parts.append(" ".join((element.text or "").split("\n")))
            stack.extend([")"] if is_note else [])
            stack.extend(reversed(element))
    return "".join(parts)
