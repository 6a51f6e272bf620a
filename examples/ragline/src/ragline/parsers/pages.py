"""The text of a page of markup, put together from tags and characters as they come."""

from __future__ import annotations

import re
from itertools import pairwise

from ragline.limits import Limits
from ragline.parsers.writer import MAX_HEADER_TOKENS, MAX_PART_TOKENS, divided, estimated_tokens
from ragline.text import Block, Heading, Kind, ParsedText, Span, clean

_BLOCKS = frozenset(
    """
    address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption
    figure footer form h1 h2 h3 h4 h5 h6 header hr html li main menu ol p pre section summary table tbody
    tfoot thead tr ul
    """.split()
)
_TIGHT = frozenset(("li", "tr", "dt", "dd", "tbody", "thead", "tfoot"))
"""Blocks that begin a line but no new paragraph."""
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_SPACE = re.compile(r"[ \t\n\r\f\xa0]+")


class _Table:
    """Where the rows of a table that is being written begin."""

    def __init__(self, part: int, start: int, headings: int) -> None:
        self.part, self.start, self.headings = part, start, headings
        self.rows: list[int] = []
        self.cells: dict[str, int] = {"th": 0, "td": 0}
        self.holds_tables = False


class PageWriter:
    """Collects text block by block and knows the offset of each heading.

    Args:
        limits: characters are counted while they come.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.clear()

    def clear(self) -> None:
        """Forget what was written."""
        self.headings: list[Heading] = []
        self.length = 0
        self._parts: list[str] = []
        self._newlines = 2  # newlines that the text ends with; nothing needs one at its very beginning
        self._wanted = 0
        self._space = False
        self._preformatted = 0
        self._code_from = 0  # the first part of the code that is being written
        self._heading: tuple[int, int, int] | None = None  # level, offset, index of its first part
        self._heading_level: int | None = None
        self._cells = 0
        self._tables: list[_Table] = []
        self._table_parts: list[Span] = []
        self._blocks: list[Block] = []

    def enter(self, name: str) -> None:
        """An element begins."""
        if name in _BLOCKS:
            self._break(name)
        if name == "pre":
            if not self._preformatted:
                self._code_from = len(self._parts)
            self._preformatted += 1
        elif name == "br":
            self._want(1)
        elif name == "li":
            self._append("- ")
        elif name == "table":
            self._tables.append(_Table(len(self._parts), self.length, len(self.headings)))
        elif name == "tr":
            self._cells = 0
            if self._tables:
                self._tables[-1].rows.append(len(self._parts))
        elif name in ("td", "th"):
            if self._cells:
                self._append(" | ")
            self._cells += 1
            if self._tables and len(self._tables[-1].rows) <= 1:
                self._tables[-1].cells[name] += 1
        elif name in _HEADINGS:
            self._heading_level, self._heading = _HEADINGS[name], None

    def leave(self, name: str) -> None:
        """An element ends."""
        if name == "pre":
            self._preformatted -= 1
            if not self._preformatted:
                self._note_block(self._code_from, Kind.CODE)
        if name in _HEADINGS:
            if self._heading is not None:
                level, start, part = self._heading
                title = "".join(self._parts[part:]).strip()
                self.headings.append(Heading(start=start, level=level, title=title))
            self._heading_level = self._heading = None
        if name == "table" and self._tables:
            self._end_table(self._tables.pop())
        if name in _BLOCKS:
            self._break(name)

    def write(self, text: str) -> None:
        """Characters, white space between them as a browser shows it."""
        if not text:
            return
        if self._preformatted:
            self._append(clean(text))
            return
        collapsed = _SPACE.sub(" ", clean(text))
        if collapsed.startswith(" "):
            self._space = True
        words = collapsed.strip(" ")
        if words:
            self._append(words)
            self._space = collapsed.endswith(" ")

    def parsed(self, encoding: str | None) -> ParsedText:
        """The page."""
        return ParsedText(
            text="".join(self._parts),
            headings=tuple(self.headings),
            encoding=encoding,
            table_parts=tuple(self._table_parts),
            blocks=tuple(self._blocks),
        )

    def _end_table(self, table: _Table) -> None:
        """Divide a long table into parts that each begin with its header row."""
        if self._tables:
            self._tables[-1].holds_tables = True
        # A table around other tables, or with headings, is a layout.
        if table.holds_tables or len(self.headings) > table.headings or len(table.rows) < 2:
            return
        bounds = [*table.rows, len(self._parts)]
        rows = ["".join(self._parts[first:last]).strip("\n") for first, last in pairwise(bounds)]
        rows = [row for row in rows if row.strip()]
        names_columns = table.cells["th"] > 1 and not table.cells["td"] and len(table.rows) > 2
        if names_columns and _is_long(rows):
            self._rewrite_from(table.rows[0], list(divided(rows[0], rows[1:])))
        elif all("\n" not in row for row in rows) and sum("|" in row for row in rows) > len(rows) / 2:
            self._note_block(table.rows[0], Kind.TABLE)

    def _note_block(self, part: int, kind: Kind) -> None:
        """Note that what was written from a part on is code, or a table."""
        written = "".join(self._parts[part:])
        start = self.length - len(written.lstrip("\n"))
        end = self.length - len(written) + len(written.rstrip())
        self._forget_blocks(start)
        if start < end:
            self._blocks.append(Block(start, end, kind))

    def _forget_blocks(self, start: int) -> None:
        while self._blocks and self._blocks[-1].start >= start:
            self._blocks.pop()

    def _rewrite_from(self, part: int, texts: list[str]) -> None:
        dropped = self._parts[part:]
        del self._parts[part:]
        self.length -= sum(map(len, dropped))
        self._forget_blocks(self.length)
        ended = "".join(self._parts[-2:])
        self._newlines = len(ended) - len(ended.rstrip("\n")) if self._parts else 2
        for text in texts:
            self._want(2)
            self._append(text)
            self._table_parts.append((self.length - len(text), self.length))
            self._blocks.append(Block(*self._table_parts[-1], Kind.TABLE))

    def _break(self, name: str) -> None:
        self._want(1 if name in _TIGHT else 2)

    def _want(self, newlines: int) -> None:
        self._wanted = max(self._wanted, newlines)
        self._space = False

    def _append(self, text: str) -> None:
        missing = self._wanted - self._newlines
        if missing > 0:
            self._emit("\n" * missing)
        elif self._space and self._newlines == 0:
            self._emit(" ")
        self._wanted, self._space = 0, False
        if self._heading_level is not None and self._heading is None:
            self._heading = (self._heading_level, self.length, len(self._parts))
        self._emit(text)
        self._newlines = len(text) - len(text.rstrip("\n"))

    def _emit(self, text: str) -> None:
        self._parts.append(text)
        self.length += len(text)
        self._limits.check("characters", self.length)


def _is_long(rows: list[str]) -> bool:
    """Whether a table, given by its header and its other rows, is to be divided."""
    own = sum(map(estimated_tokens, rows))
    return own > MAX_PART_TOKENS and estimated_tokens(rows[0]) <= MAX_HEADER_TOKENS
