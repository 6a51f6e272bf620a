"""Which format a document has, told by its bytes first and its name second."""

from __future__ import annotations

import enum
import re
from pathlib import PurePosixPath

from ragline.errors import DamagedError, EncryptedError, UnsupportedError
from ragline.kinds import (
    COMPOUND_FILE,
    archive_members,
    archive_mimetype,
    compound_kind,
    kind_of,
    kind_of_archive,
)
from ragline.text import looks_binary


class Format(str, enum.Enum):
    """A format that ragline parses; the value is its media type."""

    TEXT = "text/plain"
    MARKDOWN = "text/markdown"
    RESTRUCTUREDTEXT = "text/x-rst"
    CODE = "text/x-source"
    HTML = "text/html"
    CSV = "text/csv"
    JSON = "application/json"
    NOTEBOOK = "application/x-ipynb+json"
    EMAIL = "message/rfc822"
    RTF = "application/rtf"
    PDF = "application/pdf"
    DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
    XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
    OPENDOCUMENT = "application/vnd.oasis.opendocument"
    EPUB = "application/epub+zip"


# Without style sheets, which tell nothing, and `.env`, which has passwords.
_SOURCE_CODE = """
    bash bat c cc cfg clj cmake conf cpp cs cxx dart dockerfile erl ex exs fs go gradle graphql
    groovy h hh hpp hs ini java jl js jsx kt kts lisp lua m make mjs ml mm nim pas php pl pm
    properties proto ps1 py pyi r rb rs scala scm sh sol sql svelte swift tcl tex tf toml ts
    tsx vb vue xml yaml yml zig zsh
""".split()

EXTENSIONS = {
    ".md": Format.MARKDOWN,
    ".markdown": Format.MARKDOWN,
    ".mdx": Format.MARKDOWN,
    ".rst": Format.RESTRUCTUREDTEXT,
    ".html": Format.HTML,
    ".htm": Format.HTML,
    ".xhtml": Format.HTML,
    ".pdf": Format.PDF,
    ".docx": Format.DOCX,
    ".docm": Format.DOCX,
    ".dotx": Format.DOCX,
    ".pptx": Format.PPTX,
    ".pptm": Format.PPTX,
    ".ppsx": Format.PPTX,
    ".xlsx": Format.XLSX,
    ".xlsm": Format.XLSX,
    ".odt": Format.OPENDOCUMENT,
    ".ods": Format.OPENDOCUMENT,
    ".odp": Format.OPENDOCUMENT,
    ".epub": Format.EPUB,
    ".rtf": Format.RTF,
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".eml": Format.EMAIL,
    ".json": Format.JSON,
    ".jsonl": Format.JSON,
    ".ndjson": Format.JSON,
    ".ipynb": Format.NOTEBOOK,
    ".txt": Format.TEXT,
    ".text": Format.TEXT,
    ".log": Format.TEXT,
    **{f".{extension}": Format.CODE for extension in _SOURCE_CODE},
}
"""What `ragline ingest FOLDER` picks up, and what decides between formats that are all just text."""

_BINARY = frozenset(
    (Format.PDF, Format.DOCX, Format.PPTX, Format.XLSX, Format.OPENDOCUMENT, Format.EPUB, Format.RTF)
)
_OFFICE = {
    Format.DOCX: "Word document",
    Format.XLSX: "Excel workbook",
    Format.PPTX: "PowerPoint presentation",
}
# A PDF may have some bytes of anything before its header (ISO 32000-1, Annex H, implementation note 13).
_PDF_HEADER_WITHIN_BYTES = 1024
_HTML_WITHIN_BYTES = 1024
_HTML = re.compile(rb"\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)*(?:<!doctype html|<html\b)", re.I | re.S)
# What mail servers and programs write at the top of a message.
_EMAIL = re.compile(rb"(?:Return-Path|Received|Delivered-To|MIME-Version|Message-ID): ?\S", re.IGNORECASE)


def detect_format(data: bytes, name: str) -> Format:
    """Tell the format of a document; fast, whatever the bytes are.

    Args:
        data: all of its bytes, at least one.
        name: its file name; only the extension is looked at.

    Raises:
        UnsupportedError: it is of no format that ragline reads; the text names what it is.
        EncryptedError: an Office document with a password.
        DamagedError: it is broken, or something else than its name says.
    """
    if b"%PDF-" in data[:_PDF_HEADER_WITHIN_BYTES]:
        return Format.PDF
    extension, declared = _extension(name), declared_format(name)
    if data.startswith(b"PK\x03\x04"):
        return _format_of_archive(data)
    if data.startswith(COMPOUND_FILE):
        raise _refused_compound_file(data, declared)
    if data.startswith(b"{\\rtf"):
        return Format.RTF
    is_binary = looks_binary(data)
    kind = kind_of(data, is_binary=is_binary)
    if kind is not None:
        raise UnsupportedError(f"This is {kind}, which holds no text that ragline can read.")
    if declared in _BINARY:
        raise DamagedError(f"The name ends in {extension}, but the content is not of that format.")
    if is_binary:
        raise UnsupportedError("This is binary data of no format that ragline reads, not text.")
    if declared is Format.TEXT and _HTML.match(data[:_HTML_WITHIN_BYTES]):
        return Format.HTML
    if declared is Format.TEXT and not extension and _EMAIL.match(data):
        return Format.EMAIL
    return declared


def declared_format(name: str) -> Format:
    """The format that a file name's extension stands for; plain text where it stands for none."""
    return EXTENSIONS.get(_extension(name), Format.TEXT)


def _extension(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).suffix.lower()


def _refused_compound_file(data: bytes, declared: Format) -> EncryptedError | UnsupportedError:
    kind, is_encrypted = compound_kind(data)
    if is_encrypted or (kind is None and declared in _OFFICE):
        what = _OFFICE.get(declared, "Office document")
        return EncryptedError(f"The {what} is protected by a password: save a copy without one.")
    return UnsupportedError(
        f"This is {kind or 'an old binary Office file'}: save it in a newer format, or as PDF."
    )


def _format_of_archive(data: bytes) -> Format:
    names = archive_members(data)
    if names is None:
        raise DamagedError("The file starts like an Office document or ZIP archive, but it is broken.")
    mimetype = archive_mimetype(data)
    if "word/document.xml" in names:
        return Format.DOCX
    if "xl/workbook.xml" in names:
        return Format.XLSX
    if "ppt/presentation.xml" in names:
        return Format.PPTX
    if mimetype == Format.EPUB.value or "META-INF/container.xml" in names:
        return Format.EPUB
    if mimetype.startswith(Format.OPENDOCUMENT.value) and "content.xml" in names:
        return Format.OPENDOCUMENT
    raise UnsupportedError(f"This is {kind_of_archive(names)}: unpack it and add the documents inside.")
