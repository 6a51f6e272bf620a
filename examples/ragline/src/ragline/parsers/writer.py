"""Blocks of text put together: offsets of headings and pages, tables whose parts keep their header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ragline.limits import Limits
from ragline.text import Block, Heading, Kind, ParsedText, Span, clean, moved
from ragline.tokens import EstimatedTokens

SEPARATOR = "\n\n"
MAX_PART_TOKENS = 120
"""Estimated; of figures the model makes up to twice as many tokens, and it reads 254."""
MAX_HEADER_TOKENS = 40
"""A longer header would fill the parts: each cell is then written with its column's name."""

Row = Sequence[str]

_SPACE = re.compile(r"\s+")
_COUNTER = EstimatedTokens()


class TextWriter:
    """Collects a document block by block; blocks stand apart by an empty line.

    Args:
        limits: pages, elements (cells) and characters are counted while they come.
    """

    def __init__(self, limits: Limits) -> None:
        self.headings: list[Heading] = []
        self._limits = limits
        self._parts: list[str] = []
        self._length = 0
        self._cells = 0
        self._page_starts: list[int] = []
        self._table_parts: list[Span] = []
        self._blocks: list[Block] = []

    def page(self) -> None:
        """Begin a page."""
        self._page_starts.append(self._next_start())
        self._limits.check("pages", len(self._page_starts))

    def block(self, text: str, *, level: int | None = None, is_code: bool = False) -> None:
        """Write a paragraph, code, or a heading of a level; nothing where there is only white space."""
        text = clean(text).strip("\n").rstrip()
        if text.strip():
            start = self._append(text)
            if level is not None:
                title = " ".join(text.split())
                self.headings.append(Heading(start=start, level=level, title=title))
            if is_code:
                self._blocks.append(Block(start, start + len(text), Kind.CODE))

    def table(self, rows: Iterable[Row]) -> None:
        """Write a table; its first row names the columns, and is there again where the table is divided."""
        filled = []
        for row in rows:
            self._cells += len(row)
            self._limits.check("elements", self._cells)
            cells = [_SPACE.sub(" ", clean(cell)).strip() for cell in row]
            if any(cells):
                filled.append(cells)
        for part in table_parts(filled):
            start = self._append(part)
            self._table_parts.append((start, start + len(part)))
            self._blocks.append(Block(start, start + len(part), Kind.TABLE))

    def insert(self, parsed: ParsedText, *, level: int = 0) -> None:
        """Write another document's text, its headings `level` levels lower."""
        text = parsed.text.rstrip()
        if not text.strip():
            return
        start = self._append(text)
        for heading in parsed.headings:
            own = Heading(heading.start + start, heading.level + level, heading.title)
            self.headings.append(own)
        self._table_parts.extend((first + start, last + start) for first, last in parsed.table_parts)
        self._blocks.extend(moved(parsed.blocks, start))

    def parsed(self, encoding: str | None = None) -> ParsedText:
        """The document."""
        return ParsedText(
            text="".join(self._parts),
            headings=tuple(self.headings),
            page_starts=tuple(self._page_starts),
            encoding=encoding,
            table_parts=tuple(self._table_parts),
            blocks=tuple(self._blocks),
        )

    def _next_start(self) -> int:
        return self._length + len(SEPARATOR) if self._parts else 0

    def _append(self, text: str) -> int:
        start = self._next_start()
        if self._parts:
            self._parts.append(SEPARATOR)
        self._parts.append(text)
        self._length = start + len(text)
        self._limits.check("characters", self._length)
        return start


def table_parts(rows: Sequence[Row]) -> Iterator[str]:
    """The text of a table, in parts that each begin with its first row.

    A row that is longer than a part has the column's name before each cell, and so has every row of a table
    of many columns, whose header would fill the parts.
    """
    if not rows:
        return
    header, *body = rows
    first_line = _line(header)
    reserved = estimated_tokens(first_line)
    room = MAX_PART_TOKENS - reserved if reserved <= MAX_HEADER_TOKENS else 0
    lines: list[str] = []
    if not body or not room:
        yield first_line
    for row in body:
        line = _line(row)
        if room and estimated_tokens(line) <= room:
            lines.append(line)
            continue
        yield from divided(first_line, lines) if lines else ()
        lines = []
        yield _record(header, row)
    if lines:
        yield from divided(first_line, lines)


def divided(header: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines of a table in parts of a bounded length, each with the header's line before its own."""
    reserved = tokens = estimated_tokens(header)
    group = [header]
    for line in lines:
        own = estimated_tokens(line)
        if len(group) > 1 and tokens + own > MAX_PART_TOKENS:
            yield "\n".join(group)
            group, tokens = [header], reserved
        group.append(line)
        tokens += own
    yield "\n".join(group)


def estimated_tokens(text: str) -> int:
    """How long a text is, without a model's vocabulary."""
    return _COUNTER.count([text])[0]


def _line(row: Row) -> str:
    return " | ".join(row).rstrip(" |") or "|"


def _record(header: Row, row: Row) -> str:
    names = [*header, *[""] * len(row)]
    pairs = [(name, cell) for name, cell in zip(names, row, strict=False) if cell]
    return "\n".join(f"{name}: {cell}" if name else cell for name, cell in pairs)
