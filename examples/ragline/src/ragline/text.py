"""Bytes to clean text: the encoding found, line ends and unstorable characters normalised."""

from __future__ import annotations

import codecs
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ragline.errors import UnsupportedError

Span = tuple[int, int]
"""Offsets in characters, from the first to behind the last."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading at `start` (offset in characters of the text); level 1 is the highest."""

    start: int
    level: int
    title: str


class Kind(str, enum.Enum):
    """What a part of a text is, other than prose."""

    CODE = "code"
    """Written character below character, and shown so."""
    TABLE = "table"
    """A row a line, its cells apart by `|`."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a text that is no prose, in characters of the whole text."""

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class ParsedText:
    """What a parser makes of a document.

    Attributes:
        text: the text that every offset and every quotation refers to.
        headings: in ascending order of `start`.
        page_starts: where each page begins, ascending, the first at 0; empty for formats without pages.
        encoding: the encoding found, for formats that are plain text.
        table_parts: ascending ranges that are kept whole where they fit: each part of a table begins with the
            table's header row.
        blocks: what is code or a table, ascending and apart: whoever shows them lets their columns line up.
    """

    text: str
    headings: tuple[Heading, ...] = ()
    page_starts: tuple[int, ...] = ()
    encoding: str | None = None
    table_parts: tuple[Span, ...] = ()
    blocks: tuple[Block, ...] = ()


def moved(blocks: Iterable[Block], by: int) -> list[Block]:
    """Blocks of a text that has become part of another one, behind so many characters."""
    return [Block(block.start + by, block.end + by, block.kind) for block in blocks]


# C0 controls but tab and newline, DEL, and the lone surrogates that no database can store as UTF-8.
# PostgreSQL refuses U+0000 in text (Source: PostgreSQL documentation, 8.3 "Character Types").
_UNSTORABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


def clean(text: str) -> str:
    """Text with `\\n` as its only line end and no character that a database refuses.

    A line or page separator of another kind becomes a newline; an unstorable character becomes a space, so
    that words on both sides stay apart.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0b", "\n").replace("\x0c", "\n")
    return _UNSTORABLE.sub(" ", text)


_MARKED = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLED_BYTES = 65_536
# C0 controls that no text has: all but tab, line feeds, form feed, carriage return, backspace and escape.
_CONTROLS = bytes(code for code in range(32) if code not in (8, 9, 10, 11, 12, 13, 27))
MAX_CONTROL_SHARE = 0.02
"""One tenth of random bytes are such controls; text in encodings of one or two bytes has hardly any."""

MIN_GOOD_TO_BAD = 4
"""Damaged UTF-8 has at least so many characters beyond ASCII for each place that is none. Words in the code
pages of Korean and Thai have up to two by chance, those of other languages less than one."""


def looks_binary(data: bytes) -> bool:
    """Whether these bytes are no text in any encoding, judged by the first 64 KB.

    charset-normalizer's own `is_binary` takes some English README files for binary data.
    """
    if _marked_encoding(data) or _unmarked_wide_encoding(data):
        return False
    sample = data[:_SAMPLED_BYTES]
    if not sample:
        return False
    return len(sample) - len(sample.translate(None, _CONTROLS)) > MAX_CONTROL_SHARE * len(sample)


def decode(data: bytes) -> tuple[str, str]:
    """The text of plain-text bytes, and the name of the encoding that they were in.

    A byte order mark decides; then the zeros of UTF-16 without one; then UTF-8 that is valid but for a few
    bytes, which become U+FFFD; then charset-normalizer's best guess by language.

    Raises:
        UnsupportedError: no encoding gives text.
    """
    wide = _marked_encoding(data) or _unmarked_wide_encoding(data)
    if wide:
        return clean(data.decode(wide, errors="replace")), wide
    text = data.decode("utf-8", errors="replace")
    bad = text.count("\ufffd") - data.count("\ufffd".encode())
    good = len(text) - len(text.encode("ascii", "ignore")) - bad
    if good >= MIN_GOOD_TO_BAD * bad:
        return clean(text), "utf-8"
    from charset_normalizer import from_bytes  # 10 ms, for texts in old encodings alone

    best = from_bytes(data).best()
    if best is None:
        raise UnsupportedError("The text is in no encoding that could be recognised.")
    return clean(str(best)), best.encoding


def _marked_encoding(data: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKED if data.startswith(mark)), None)


def _unmarked_wide_encoding(data: bytes) -> str | None:
    """UTF-16 of mostly Latin text: every second byte is zero, and hardly any of the others."""
    sample = data[:_SAMPLED_BYTES]
    half = len(sample) // 2
    if half < 2:
        return None
    even, odd = sample[0::2].count(0) / half, sample[1::2].count(0) / half
    if odd > 0.4 and even < 0.05:
        return "utf-16-le"
    if even > 0.4 and odd < 0.05:
        return "utf-16-be"
    return None
