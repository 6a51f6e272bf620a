"""What bytes are that hold no text: told by their magic numbers, fast."""

from __future__ import annotations

import struct

COMPOUND_FILE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""Begins Microsoft's compound files: .doc, .xls, .msg, and all with a password [MS-CFB]."""
MAX_MEMBERS = 20_000
"""So many names of an archive are looked at: those that tell its kind are among the first in practice."""

# Source: the `file` program's magic.
_AT_START = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"8BPS", "a Photoshop picture"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"AT&TFORM", "a DjVu document"),
    (b"%!PS", "a PostScript document"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a Windows program"),
    (b"\xcf\xfa\xed\xfe", "a macOS program"),
    (b"\xca\xfe\xba\xbe", "a compiled Java class"),
    (b"\x00asm", "a WebAssembly program"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"MSCF", "a CAB archive"),
    (b"!<arch>\n", "a library or Debian package"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"OggS", "an Ogg recording"),
    (b"ID3", "an MP3 recording"),
    (b"\xff\xfb", "an MP3 recording"),
    (b"fLaC", "a FLAC recording"),
    (b"MThd", "a MIDI file"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM film"),
    (b"wOFF", "a font"),
    (b"wOF2", "a font"),
    (b"OTTO", "a font"),
    (b"\x00\x01\x00\x00\x00", "a font"),
)
_AT_OFFSET = (
    (4, b"ftyp", "an MP4 or QuickTime film"),
    (60, b"BOOKMOBI", "a Kindle book"),
    (257, b"ustar", "a tar archive"),
)
_IN_RIFF = {b"WEBP": "a WebP picture", b"WAVE": "a WAV recording", b"AVI ": "an AVI film"}
_PICTURE_BRANDS = (b"heic", b"heix", b"mif1", b"avif")

# The streams by which compound files differ [MS-DOC], [MS-XLS], [MS-PPT], [MS-OXMSG], [MS-OFFCRYPTO].
_STREAMS = (
    ("WordDocument", "an old Word document (.doc)"),
    ("PowerPoint Document", "an old PowerPoint presentation (.ppt)"),
    ("Workbook", "an old Excel workbook (.xls)"),
    ("Book", "an old Excel workbook (.xls)"),
    ("__substg1.0_", "an Outlook message (.msg)"),
    ("VisioDocument", "a Visio drawing"),
)
_ENCRYPTED_STREAM = "EncryptedPackage"

_ARCHIVES = (
    ("AndroidManifest.xml", "an Android app"),
    ("META-INF/MANIFEST.MF", "a Java archive"),
    ("xl/workbook.bin", "a binary Excel workbook (.xlsb)"),
    ("visio/document.xml", "a Visio drawing"),
    ("Index/Document.iwa", "a document of Apple Pages, Numbers or Keynote"),
    ("FixedDocSeq.fdseq", "an XPS document"),
    ("doc.kml", "a map (KMZ)"),
)

_END = b"PK\x05\x06"
_END_BYTES = 22
_END_COMMENT_BYTES = 65_535
_LOCATOR, _LOCATOR_BYTES = b"PK\x06\x07", 20
_MEMBER, _MEMBER_BYTES = b"PK\x01\x02", 46
_LOCAL_BYTES = 30


def kind_of(data: bytes, *, is_binary: bool) -> str | None:
    """What bytes are that hold no text, with its article, or None where no magic number tells.

    Args:
        data: all bytes.
        is_binary: whether they look as if they were no text: a letter may begin with the name Otto.
    """
    for magic, what in _AT_START:
        if data.startswith(magic) and (is_binary or not magic.isalnum()):
            return what
    if data.startswith(b"RIFF"):
        return _IN_RIFF.get(data[8:12])
    if data.startswith(b"BM") and data[6:10] == bytes(4):
        return "a bitmap picture"
    for offset, magic, what in _AT_OFFSET:
        if data[offset : offset + len(magic)] == magic:
            return "a HEIC or AVIF picture" if data[8:12] in _PICTURE_BRANDS else what
    return None


def compound_kind(data: bytes) -> tuple[str | None, bool]:
    """What a compound file is, with its article, or None; and whether it has a password."""
    if _ENCRYPTED_STREAM.encode("utf-16-le") in data:
        return None, True
    kinds = (what for stream, what in _STREAMS if f"{stream}".encode("utf-16-le") in data)
    return next(kinds, None), False


def archive_members(data: bytes) -> frozenset[str] | None:
    """The names in a ZIP archive's directory; None where it has no directory.

    `zipfile` makes an object of each entry: of the million that fit into 50 MB, a gigabyte.
    """
    end = data.rfind(_END, max(0, len(data) - _END_BYTES - _END_COMMENT_BYTES))
    if end < 0 or end + _END_BYTES > len(data):
        return None
    size = struct.unpack_from("<L", data, end + 12)[0]
    locator = end - _LOCATOR_BYTES
    if locator >= 0 and data.startswith(_LOCATOR, locator):
        record = data.rfind(b"PK\x06\x06", 0, locator)
        if record < 0 or record + 48 > len(data):
            return None
        end, size = record, struct.unpack_from("<Q", data, record + 40)[0]
    at = end - size
    names: list[str] = []
    while len(names) < MAX_MEMBERS and 0 <= at <= end - _MEMBER_BYTES and data.startswith(_MEMBER, at):
        name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<HHH", data, at + 28)
        name = data[at + _MEMBER_BYTES : at + _MEMBER_BYTES + name_bytes]
        names.append(name.decode("utf-8", "replace"))
        at += _MEMBER_BYTES + name_bytes + extra_bytes + comment_bytes
    return frozenset(names) if names else None


def archive_mimetype(data: bytes) -> str:
    """What an archive says it is, in a first, stored member that is named `mimetype`; else "".

    So do OpenDocument (part 2, 3.3) and EPUB (OCF, "OCF ZIP container media type identification").
    """
    if len(data) < _LOCAL_BYTES or data[_LOCAL_BYTES : _LOCAL_BYTES + 8] != b"mimetype":
        return ""
    size, _, name_bytes, extra_bytes = struct.unpack_from("<LLHH", data, 18)
    start = _LOCAL_BYTES + name_bytes + extra_bytes
    return data[start : start + min(size, 100)].decode("ascii", "replace").strip()


def kind_of_archive(names: frozenset[str]) -> str:
    """What a ZIP archive is that is no document, with its article."""
    for name, what in _ARCHIVES:
        if name in names:
            return what
    if any(".dist-info/" in name for name in names):
        return "a Python package"
    return "a ZIP archive"
