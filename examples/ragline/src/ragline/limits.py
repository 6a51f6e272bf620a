"""How much work one document may be: what parsers count, and what bounds their process."""

from __future__ import annotations

from dataclasses import dataclass

from ragline.errors import TooLargeError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one document may cost; the defaults let a book of 5,000 pages through.

    Attributes:
        seconds: processor time of parsing it. Not time of the clock: a busy machine refuses nothing.
        memory_bytes: address space of the process that parses it.
        pages: pages of a PDF, slides of a presentation.
        elements: tags of markup, cells of a table, values of data.
        characters: the length of the text that is made of it.
        unpacked_bytes: what a ZIP-based document unpacks to: 1 MB of ZIP can hold a gigabyte of zeros.
    """

    seconds: int = 60
    memory_bytes: int = 1_000_000_000
    pages: int = 5_000
    elements: int = 2_000_000
    characters: int = 20_000_000
    unpacked_bytes: int = 200_000_000

    def check(self, kind: str, count: int) -> None:
        """See that a document stays within one of the limits.

        Args:
            kind: "pages", "elements", "characters" or "unpacked_bytes".
            count: how many there are, or have been read so far.

        Raises:
            TooLargeError: there are too many; the text says of what, and how many there may be.
        """
        limit: int = getattr(self, kind)
        if count > limit:
            said = "bytes when it is unpacked" if kind == "unpacked_bytes" else kind
            raise TooLargeError(f"It has more than {limit:,} {said}, which is the limit.")


DEFAULT_LIMITS = Limits()
