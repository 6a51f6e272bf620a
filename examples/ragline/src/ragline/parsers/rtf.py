"""Rich Text Format to text: control words, pictures and styles left out."""

from __future__ import annotations

import re

from striprtf.striprtf import rtf_to_text

from ragline.errors import DamagedError
from ragline.limits import Limits
from ragline.text import ParsedText, clean

# Pictures are lines of hexadecimal digits, or one very long one: most of the bytes, and striprtf
# reads each.
_PICTURE = re.compile(r"(?:[0-9A-Fa-f]{32,}[\r\n]+){4,}|[0-9A-Fa-f]{512,}")
_EMPTY_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")


def parse_rtf(data: bytes, limits: Limits) -> ParsedText:
    """The text of an RTF document.

    Raises:
        DamagedError: its control words make no sense.
        TooLargeError: it has more elements (groups) or characters than the limits allow.
    """
    limits.check("elements", data.count(b"{"))
    # All but a few writers keep to ASCII; the others mean the code page that the file names, mostly
    # this one.
    source = _PICTURE.sub("", data.decode("cp1252", errors="replace"))
    try:
        text: str = rtf_to_text(source, errors="replace")  # type: ignore[no-untyped-call]
    except (ValueError, LookupError, OverflowError, TypeError) as error:
        raise DamagedError("The RTF document is damaged and cannot be read.") from error
    limits.check("characters", len(text))
    # A surrogate pair is written as two characters.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    paragraphs = clean(text).replace("|\n", "\n").strip("\n")
    return ParsedText(text=_EMPTY_LINES.sub("\n\n", paragraphs))
