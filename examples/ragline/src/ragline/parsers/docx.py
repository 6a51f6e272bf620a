"""Word documents to text: paragraphs, tables as rows, headings by style, equations as their characters."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from io import BytesIO

import docx
from docx.document import Document
from docx.oxml.exceptions import InvalidXmlError
from docx.oxml.ns import qn
from docx.oxml.text.run import CT_R
from docx.table import Table
from docx.text.paragraph import Paragraph
from lxml.etree import XMLSyntaxError

from ragline.errors import DamagedError, TooLargeError
from ragline.text import Heading, ParsedText, clean

MAX_UNPACKED_BYTES = 400_000_000
"""A document that unpacks to more is refused: a ZIP of 1 MB can hold a gigabyte of zeros."""

_HEADING_STYLE = re.compile(r"(?:heading|überschrift|titre|título) ?([1-9])$|title$", re.IGNORECASE)
_TEXTS = frozenset((qn("w:t"), qn("m:t")))
_BREAKS = {qn("w:tab"): "\t", qn("w:br"): "\n", qn("w:cr"): "\n"}
# Word keeps a second copy of each text box for older readers (ECMA-376 part 3, "Markup Compatibility").
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"


def parse_docx(data: bytes) -> ParsedText:
    """The text of a Word document, one paragraph a block.

    Raises:
        DamagedError: it is a ZIP archive, but no readable Word document.
        TooLargeError: it unpacks to more than `MAX_UNPACKED_BYTES`.
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
        if unpacked_bytes > MAX_UNPACKED_BYTES:
            raise TooLargeError(f"The Word document unpacks to {unpacked_bytes // 1_000_000} MB.")
        document = docx.Document(BytesIO(data))
    except (KeyError, ValueError, zipfile.BadZipFile, XMLSyntaxError, InvalidXmlError) as error:
        raise DamagedError("The Word document is damaged and cannot be opened.") from error
    parts: list[str] = []
    headings: list[Heading] = []
    length = 0
    for text, level in _blocks(document):
        if not text.strip():
            continue
        if level is not None:
            headings.append(Heading(start=length, level=level, title=text.strip()))
        parts.append(text)
        length += len(text) + 2
    return ParsedText(text="\n\n".join(parts), headings=tuple(headings))


def _blocks(document: Document) -> Iterator[tuple[str, int | None]]:
    for block in document.iter_inner_content():
        if isinstance(block, Paragraph):
            yield _paragraph_text(block), _heading_level(block)
        elif isinstance(block, Table):
            yield _table_text(block), None


def _table_text(table: Table) -> str:
    rows = []
    for row in table.rows:
        # A merged cell is given once for each column that it spans.
        cells = list(dict.fromkeys(row.cells))
        rows.append(
            " | ".join(" ".join(_paragraph_text(p).strip() for p in cell.paragraphs) for cell in cells)
        )
    return "\n".join(rows)


def _heading_level(paragraph: Paragraph) -> int | None:
    name = paragraph.style.name if paragraph.style is not None else None
    found = _HEADING_STYLE.match(name or "")
    return int(found[1] or 1) if found else None


def _paragraph_text(paragraph: Paragraph) -> str:
    """All characters, also those of equations and links, which `Paragraph.text` leaves out."""
    parts = []
    for element in paragraph._p.iter():
        if element.tag in _TEXTS:
            if not any(ancestor.tag == _FALLBACK for ancestor in element.iterancestors()):
                parts.append(element.text or "")
        elif element.tag in _BREAKS and isinstance(element.getparent(), CT_R):
            # Elsewhere a tab is a tab stop, a setting of the paragraph.
            parts.append(_BREAKS[element.tag])
    return clean("".join(parts))
