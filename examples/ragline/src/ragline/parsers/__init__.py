"""Documents to text: one parser a format, chosen by the bytes; pure, without a database."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from ragline.errors import EmptyError, TooLargeError
from ragline.formats import Format, detect_format
from ragline.limits import DEFAULT_LIMITS, Limits
from ragline.parsers.messages import parse_message
from ragline.text import ParsedText

PARSER_VERSION = "5"
"""Raised whenever a parser says something else of the same bytes: documents are then parsed again."""
MAX_MESSAGES = 4
"""An e-mail attached to an e-mail is read, and so on, but not for ever."""

Parser = Callable[..., ParsedText]

# By name: importing all of them takes a second of CPU, and most folders hold two or three formats.
_PARSERS = {
    Format.TEXT: "markup.parse_plain",
    Format.MARKDOWN: "markup.parse_markdown",
    Format.RESTRUCTUREDTEXT: "markup.parse_restructuredtext",
    Format.CODE: "code.parse_code",
    Format.HTML: "html.parse_html",
    Format.CSV: "delimited.parse_delimited",
    Format.JSON: "records.parse_json",
    Format.NOTEBOOK: "records.parse_notebook",
    Format.RTF: "rtf.parse_rtf",
    Format.PDF: "pdf.parse_pdf",
    Format.DOCX: "docx.parse_docx",
    Format.PPTX: "pptx.parse_pptx",
    Format.XLSX: "xlsx.parse_xlsx",
    Format.OPENDOCUMENT: "odf.parse_odf",
    Format.EPUB: "epub.parse_epub",
}


def parse(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> ParsedText:
    """Parse a document of any supported format, in this process.

    `ragline.confinement` does it in a process that can be ended.

    Args:
        data: all of its bytes.
        name: its file name, used for the extension where the bytes do not tell.
        limits: what it may be; time and memory are not bounded here.

    Raises:
        DocumentError: one of its kinds, with a reason for the person who added the document.

    Guarantees:
        The same bytes and name always give the same text. Safe to call from several threads.
    """
    return _parse(data, name, limits, MAX_MESSAGES)


def _parse(data: bytes, name: str, limits: Limits, messages: int) -> ParsedText:
    if not data.strip():
        raise EmptyError("The file is empty." if not data else "The file holds nothing but white space.")
    found = detect_format(data, name)
    if found is Format.EMAIL:
        if not messages:
            raise TooLargeError(f"It is within more than {MAX_MESSAGES} e-mails, one within the other.")
        # What is attached is of any format.
        inner = partial(_parse, limits=limits, messages=messages - 1)
        parsed = parse_message(data, limits, inner)
    else:
        parser = _parser(found)
        parsed = parser(data, limits, name=name) if found is Format.CODE else parser(data, limits)
    if not parsed.text.strip():
        raise EmptyError("The document holds no text.")
    return parsed


def _parser(found: Format) -> Parser:
    module, _, function = _PARSERS[found].partition(".")
    parser: Parser = getattr(import_module(f"ragline.parsers.{module}"), function)
    return parser
