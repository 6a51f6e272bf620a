"""Which parts of a text are code or tables, so that whoever shows them lets their columns line up.

Below the page and above the parsers. The kind of the document tells, or what its author wrote
around the part; nothing is guessed from how lines look.
"""

from __future__ import annotations

import enum
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ragline.formats import Format, declared_format
from ragline.parsers.markup import fence_after, table_end
from ragline.text import Span

# A line that opens or closes fenced code in Markdown, as the parser has it.
_FENCE_LINE = re.compile(r"^ {0,3}(?:`{3}|~{3}).*$", re.MULTILINE)
# Source: reStructuredText specification, "Literal Blocks", "Grid Tables", "Simple Tables".
_LITERAL = re.compile(
    r"^([ \t]*)(?:\.\. (?:code-block|code|sourcecode|parsed-literal)::.*|(?!\.\. ).*::)[ \t]*\n"
    r"((?:[ \t]*\n|\1[ \t]+\S.*(?:\n|\Z))+)",
    re.MULTILINE,
)
_GRID = re.compile(r"^([ \t]*)\+(?:[-=]+\+)+[ \t]*\n(?:\1[|+].*(?:\n|\Z))+", re.MULTILINE)
_RULE = re.compile(r"[ \t]*=+(?:[ ]+=+)+[ \t]*")
_FROM_RULE = re.compile(rf"^{_RULE.pattern}\n(?:[ \t]*\S.*(?:\n|\Z))+", re.MULTILINE)


class Kind(str, enum.Enum):
    """What a part of a text is."""

    CODE = "code"
    """Written character below character, and shown so."""
    TABLE = "table"
    """A row a line, its cells apart by `|`."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a text, in characters of the whole text."""

    start: int
    end: int
    kind: Kind


def is_told_by_text(name: str) -> bool:
    """Whether the text itself tells what is code in a document of this name, as Markdown's does."""
    return declared_format(name) in (Format.MARKDOWN, Format.RESTRUCTUREDTEXT)


def blocks(name: str, span: Span, *, text: str = "", table_parts: Iterable[Span] = ()) -> list[Block]:
    """The code and the tables in a range of a document.

    Args:
        name: the document's file name, whose extension tells its kind.
        span: the range, in characters of the whole text.
        text: the whole text, or as much as there is before the end of the range and somewhat more;
            needed where `is_told_by_text` says so.
        table_parts: the parts of tables that the parser has written, as `ParsedText` has them.

    Guarantees:
        They ascend, do not overlap and are within the range.
    """
    declared = declared_format(name)
    if declared is Format.CODE:
        found = [Block(*span, Kind.CODE)]
    elif declared is Format.MARKDOWN and text:
        found = list(_of_markdown(text, span))
    elif declared is Format.RESTRUCTUREDTEXT and text:
        found = list(_of_restructuredtext(text))
    else:
        found = [Block(start, end, Kind.TABLE) for start, end in table_parts]
    clipped: list[Block] = []
    for block in sorted(found, key=lambda one: one.start):
        start = max(block.start, span[0], clipped[-1].end if clipped else 0)
        end = min(block.end, span[1])
        if start < end:
            clipped.append(Block(start, end, block.kind))
    return clipped


def _of_markdown(text: str, span: Span) -> Iterator[Block]:
    fences = list(_fences(text))
    opened = [fence[0] for fence in fences]
    yield from (Block(*fence, Kind.CODE) for fence in fences)
    # No table goes beyond an empty line.
    first, last = text.rfind("\n\n", 0, span[0]) + 1, text.find("\n\n", span[1])
    lines = text[first : last if last >= 0 else len(text)].split("\n")
    at, start = 0, first
    while at < len(lines):
        end = table_end(lines, at)
        length = sum(len(line) + 1 for line in lines[at:end])
        before = bisect_right(opened, start) - 1
        is_in_code = before >= 0 and start < fences[before][1]
        if end > at + 1 and not is_in_code:
            yield Block(start, start + length - 1, Kind.TABLE)
        at, start = end, start + length


def _fences(text: str) -> Iterator[Span]:
    fence, start = None, 0
    for line in _FENCE_LINE.finditer(text):
        before, fence = fence, fence_after(fence, line[0])
        if before is None:
            start = line.start()
        elif fence is None:
            yield start, line.end()
    if fence is not None:
        yield start, len(text)


def _of_restructuredtext(text: str) -> Iterator[Block]:
    for found in _LITERAL.finditer(text):
        written = found[2]
        indent = len(written) - len(written.lstrip())
        start = found.start(2) + written.rfind("\n", 0, indent) + 1  # with its first line's indent
        yield Block(start, found.start(2) + len(written.rstrip()), Kind.CODE)
    for pattern in (_GRID, _FROM_RULE):
        for found in pattern.finditer(text):
            written = found[0].rstrip()
            if pattern is _GRID or _RULE.fullmatch(written[written.rfind("\n") + 1 :]):
                yield Block(found.start(), found.start() + len(written), Kind.CODE)
