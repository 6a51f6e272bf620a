"""Documents to text: one parser a format, chosen by the bytes; pure functions that touch no database."""

from __future__ import annotations

from collections.abc import Callable

from ragline.errors import EmptyError
from ragline.formats import Format, detect_format
from ragline.parsers.docx import parse_docx
from ragline.parsers.html import parse_html
from ragline.parsers.markup import parse_markdown, parse_plain, parse_restructuredtext
from ragline.parsers.pdf import parse_pdf
from ragline.text import ParsedText

PARSER_VERSION = "2"
"""Raised whenever a parser gives other text for the same bytes: documents are then parsed again."""

_PARSERS: dict[Format, Callable[[bytes], ParsedText]] = {
    Format.TEXT: parse_plain,
    Format.MARKDOWN: parse_markdown,
    Format.RESTRUCTUREDTEXT: parse_restructuredtext,
    Format.HTML: parse_html,
    Format.PDF: parse_pdf,
    Format.DOCX: parse_docx,
}


def parse(data: bytes, name: str) -> ParsedText:
    """Parse a document of any supported format.

    Args:
        data: all of its bytes.
        name: its file name, used for the extension where the bytes do not tell.

    Raises:
        DocumentError: one of its kinds, with a reason for the person who added the document.

    Guarantees:
        The same bytes and name always give the same text. Safe to call from several threads.
    """
    if not data.strip():
        raise EmptyError("The file is empty." if not data else "The file holds nothing but white space.")
    parsed = _PARSERS[detect_format(data, name)](data)
    if not parsed.text.strip():
        raise EmptyError("The document holds no text.")
    return parsed
