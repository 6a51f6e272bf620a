"""E-books to text: the chapters in reading order, each as the page of markup that it is."""

from __future__ import annotations

import posixpath
from urllib.parse import unquote

from ragline.limits import Limits
from ragline.parsers.archives import Archive
from ragline.parsers.html import parse_html
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText

_CONTAINER = "META-INF/container.xml"
_ROOT = "{urn:oasis:names:tc:opendocument:xmlns:container}rootfile"
_OPF = "{http://www.idpf.org/2007/opf}"
_CIPHER = "{http://www.w3.org/2001/04/xmlenc#}CipherReference"
_PAGES = frozenset(("application/xhtml+xml", "text/html", "application/x-dtbook+xml"))


def parse_epub(data: bytes, limits: Limits) -> ParsedText:
    """The text of an e-book in the order of its spine.

    Raises:
        DamagedError: it is a ZIP archive, but no readable e-book.
        EncryptedError: its chapters are encrypted.
        TooLargeError: it goes beyond a limit.
    """
    archive = Archive(data, "e-book", limits)
    root = next(archive.xml(_CONTAINER).iter(_ROOT), None)
    if root is None:
        raise archive.damaged()
    package = root.get("full-path", "")
    book = archive.xml(package)
    items = {item.get("id", ""): item for item in book.iter(f"{_OPF}item")}
    encrypted = _encrypted(archive)
    writer = TextWriter(limits)
    for reference in book.iter(f"{_OPF}itemref"):
        item = items.get(reference.get("idref", ""))
        if (
            item is None
            or item.get("media-type") not in _PAGES
            or "nav" in item.get("properties", "").split()
        ):
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(item.get("href", ""))))
        if name in encrypted:
            raise archive.encrypted()
        if name in archive.names:
            writer.insert(parse_html(archive.read(name), limits, is_chapter=True))
    return writer.parsed()


def _encrypted(archive: Archive) -> set[str]:
    """The members that cannot be read; fonts are often among them, which is no reason to refuse the book."""
    if "META-INF/encryption.xml" not in archive.names:
        return set()
    references = archive.xml("META-INF/encryption.xml").iter(_CIPHER)
    return {posixpath.normpath(unquote(reference.get("URI", ""))) for reference in references}
