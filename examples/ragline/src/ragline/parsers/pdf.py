"""PDF to text with pdfium, page by page, so that a citation can name its page."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pypdfium2

from ragline.errors import DamagedError, EncryptedError, ScannedError
from ragline.limits import Limits
from ragline.text import Heading, ParsedText, clean

# pdfium keeps global state and is not thread-safe (Source: pypdfium2 README, "Incompatibility with
# threading").
_PDFIUM = threading.Lock()
# Of an outline: each is looked for in the text of its page.
_MAX_ENTRIES = 5_000
Entry = tuple[int, str, int]
"""Of an outline: level, title, page."""
_PAGE_BREAK = "\n\n"
# Where a word was hyphenated at the end of a line pdfium writes U+FFFE (or U+0002) in place of the hyphen.
_HYPHENATED = re.compile("[\ufffe\x02](?:\r\n|\r|\n)?")
# Ligatures are one character in many fonts: nobody types them into a search field.
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})


def parse_pdf(data: bytes, limits: Limits) -> ParsedText:
    """The text layer of a PDF, in the order of its content stream, with its outline as headings.

    Raises:
        EncryptedError: a password is needed to open it.
        ScannedError: it has pages, but none has text.
        DamagedError: pdfium cannot read it.
        TooLargeError: it has more pages or characters than the limits allow.
    """
    with _PDFIUM:
        pages, outline = _read(data, limits)
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
    headings = tuple(_headings(pages, starts, outline))
    return ParsedText(text=_PAGE_BREAK.join(pages), headings=headings, page_starts=tuple(starts))


def _read(data: bytes, limits: Limits) -> tuple[list[str], list[Entry]]:
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise EncryptedError("The PDF is protected by a password: save a copy without one.") from error
        raise DamagedError("The PDF is damaged and cannot be opened.") from error
    try:
        limits.check("pages", len(document))
        pages, length = [], 0
        for number in range(len(document)):
            pages.append(_read_page(document, number))
            length += len(pages[-1])
            limits.check("characters", length)
        return pages, list(_read_outline(document))
    except pypdfium2.PdfiumError as error:
        raise DamagedError("A page of the PDF is damaged and cannot be read.") from error
    finally:
        document.close()


def _read_outline(document: pypdfium2.PdfDocument) -> Iterator[Entry]:
    for _, bookmark in zip(range(_MAX_ENTRIES), document.get_toc(), strict=False):
        title = " ".join(clean(bookmark.get_title()).split())
        destination = bookmark.get_dest()
        page = None if destination is None else destination.get_index()
        if title and page is not None and 0 <= page < len(document):
            yield bookmark.level + 1, title, page


def _headings(pages: list[str], starts: list[int], outline: list[Entry]) -> list[Heading]:
    """Each entry of the outline where its title stands on its page, or else where the page begins."""
    headings = []
    at = (0, 0)
    for level, title, page in outline:
        after = at[1] if at[0] == page else 0
        words = r"\s+".join(map(re.escape, title.split()))
        # Alone on its line, but for its number, which many outlines leave out.
        found = re.compile(rf"^[ \t]*(?:[\dA-Z.]{{1,12}}[ \t]+)?{words}[ \t]*$", re.I | re.M).search(
            pages[page], after
        )
        offset = found.start() if found else 0
        at = (page, found.end()) if found else (page, after)
        headings.append(Heading(start=starts[page] + offset, level=level, title=title))
    return sorted(headings, key=lambda heading: heading.start)


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
