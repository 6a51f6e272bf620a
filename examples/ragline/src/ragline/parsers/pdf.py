"""PDF to text with pdfium, page by page, so that a citation can name its page."""

from __future__ import annotations

import re
import threading

import pypdfium2

from ragline.errors import DamagedError, EncryptedError, ScannedError
from ragline.text import ParsedText, clean

# pdfium keeps global state and is not thread-safe (Source: pypdfium2 README, "Incompatibility with
# threading").
_PDFIUM = threading.Lock()
_PAGE_BREAK = "\n\n"
# Where a word was hyphenated at the end of a line pdfium writes U+FFFE (or U+0002) in place of the hyphen.
_HYPHENATED = re.compile("[\ufffe\x02](?:\r\n|\r|\n)?")
# Ligatures are one character in many fonts: nobody types them into a search field.
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})


def parse_pdf(data: bytes) -> ParsedText:
    """The text layer of a PDF, in the order of its content stream.

    Raises:
        EncryptedError: a password is needed to open it.
        ScannedError: it has pages, but none has text.
        DamagedError: pdfium cannot read it.
    """
    with _PDFIUM:
        pages = _read_pages(data)
    if not any(page.strip() for page in pages):
        raise ScannedError(
            f"None of its {len(pages)} pages has a text layer: it is a scan. Run it through OCR first."
            if pages
            else "The PDF has no pages."
        )
    starts, length = [], 0
    for page in pages:
        starts.append(length)
        length += len(page) + len(_PAGE_BREAK)
    return ParsedText(text=_PAGE_BREAK.join(pages), page_starts=tuple(starts))


def _read_pages(data: bytes) -> list[str]:
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise EncryptedError("The PDF is protected by a password: save a copy without one.") from error
        raise DamagedError("The PDF is damaged and cannot be opened.") from error
    try:
        return [_read_page(document, number) for number in range(len(document))]
    except pypdfium2.PdfiumError as error:
        raise DamagedError("A page of the PDF is damaged and cannot be read.") from error
    finally:
        document.close()


def _read_page(document: pypdfium2.PdfDocument, number: int) -> str:
    page = document[number]
    try:
        layer = page.get_textpage()
        try:
            return clean(_HYPHENATED.sub("", layer.get_text_bounded()).translate(_LIGATURES))
        finally:
            layer.close()
    finally:
        page.close()
