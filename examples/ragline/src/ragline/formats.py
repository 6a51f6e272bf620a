"""Which format a document has, told by its bytes first and its name second; the first step of parsing."""

from __future__ import annotations

import enum
import zipfile
from io import BytesIO
from pathlib import PurePosixPath

from ragline.errors import DamagedError, EncryptedError, UnsupportedError
from ragline.text import looks_binary


class Format(str, enum.Enum):
    """A format that ragline parses; the value is its media type."""

    TEXT = "text/plain"
    MARKDOWN = "text/markdown"
    RESTRUCTUREDTEXT = "text/x-rst"
    HTML = "text/html"
    PDF = "application/pdf"
    DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


EXTENSIONS = {
    ".md": Format.MARKDOWN,
    ".markdown": Format.MARKDOWN,
    ".rst": Format.RESTRUCTUREDTEXT,
    ".html": Format.HTML,
    ".htm": Format.HTML,
    ".xhtml": Format.HTML,
    ".pdf": Format.PDF,
    ".docx": Format.DOCX,
    ".txt": Format.TEXT,
    ".text": Format.TEXT,
}
"""What `ragline ingest FOLDER` picks up, and what decides between formats that are all just text."""

# First bytes of what people drop by mistake, so that the reason can name it (Source: the `file` program's
# magic).
_FOREIGN = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a Windows program"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"OggS", "an Ogg recording"),
    (b"ID3", "an MP3 recording"),
)
# Compound files of Microsoft's: .doc, .xls, and every Office document with a password [MS-OFFCRYPTO].
_COMPOUND_FILE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
# A PDF may have some bytes of anything before its header (ISO 32000-1, Annex H, implementation note 13).
_PDF_HEADER_WITHIN_BYTES = 1024


def detect_format(data: bytes, name: str) -> Format:
    """Tell the format of a document.

    Args:
        data: all of its bytes, at least one.
        name: its file name; only the extension is looked at.

    Raises:
        UnsupportedError: binary data of no known format, or a known format that ragline does not read.
        EncryptedError: an Office document with a password.
        DamagedError: a ZIP archive that is broken.
    """
    if b"%PDF-" in data[:_PDF_HEADER_WITHIN_BYTES]:
        return Format.PDF
    if data.startswith(b"PK\x03\x04"):
        return _format_of_archive(data)
    extension = PurePosixPath(name.replace("\\", "/")).suffix.lower()
    if data.startswith(_COMPOUND_FILE):
        if extension == ".docx":
            raise EncryptedError("The Word document is protected by a password: save a copy without one.")
        raise UnsupportedError(
            "This is an old binary Office file (.doc, .xls, .ppt): save it as .docx or PDF."
        )
    for magic, what in _FOREIGN:
        if data.startswith(magic):
            raise UnsupportedError(f"This is {what}, which holds no text that ragline can read.")
    declared = EXTENSIONS.get(extension, Format.TEXT)
    if declared in (Format.PDF, Format.DOCX):
        raise DamagedError(f"The name ends in {extension}, but the content is not of that format.")
    if looks_binary(data):
        raise UnsupportedError("This is binary data of no format that ragline reads, not text.")
    if declared is Format.TEXT and _looks_like_html(data):
        return Format.HTML
    return declared


def _format_of_archive(data: bytes) -> Format:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            names = set(archive.namelist())
    except zipfile.BadZipFile as error:
        raise DamagedError(
            "The file starts like a Word document or ZIP archive, but it is broken."
        ) from error
    if "word/document.xml" in names:
        return Format.DOCX
    if "xl/workbook.xml" in names:
        raise UnsupportedError("This is an Excel workbook: export the sheets as text or PDF.")
    if "ppt/presentation.xml" in names:
        raise UnsupportedError("This is a PowerPoint presentation: export it as PDF.")
    raise UnsupportedError("This is a ZIP archive: unpack it and add the documents inside.")


def _looks_like_html(data: bytes) -> bool:
    head = data[:512].lstrip().lower()
    return head.startswith((b"<!doctype html", b"<html"))
