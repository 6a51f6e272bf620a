"""Which parts of markup are code or tables: what their author wrote around them tells, not how they look."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from ragline.text import Block, Kind, Span

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_FENCE_LINE = re.compile(r"^ {0,3}(?:`{3}|~{3}).*$", re.MULTILINE)
_TABLE_RULE = re.compile(r" {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
# Source: reStructuredText specification, "Literal Blocks", "Grid Tables", "Simple Tables".
_LITERAL = re.compile(
    r"^([ \t]*)(?:\.\. (?:code-block|code|sourcecode|parsed-literal)::.*|(?!\.\. ).*::)[ \t]*\n"
    r"((?:[ \t]*\n|\1[ \t]+\S.*(?:\n|\Z))+)",
    re.MULTILINE,
)
_GRID = re.compile(r"^([ \t]*)\+(?:[-=]+\+)+[ \t]*\n(?:\1[|+].*(?:\n|\Z))+", re.MULTILINE)
_RULE = re.compile(r"[ \t]*=+(?:[ ]+=+)+[ \t]*")
_FROM_RULE = re.compile(rf"^{_RULE.pattern}\n(?:[ \t]*\S.*(?:\n|\Z))+", re.MULTILINE)


def markdown_blocks(text: str) -> tuple[Block, ...]:
    """The fenced code and the tables of Markdown, in its order."""
    fences = list(_fences(text))
    opened = [fence[0] for fence in fences]
    blocks = [Block(*fence, Kind.CODE) for fence in fences]
    lines = text.split("\n")
    at = start = 0
    while at < len(lines):
        end = table_end(lines, at)
        length = sum(len(line) + 1 for line in lines[at:end])
        before = bisect_right(opened, start) - 1
        is_in_code = before >= 0 and start < fences[before][1]
        if end > at + 1 and not is_in_code:
            blocks.append(Block(start, start + length - 1, Kind.TABLE))
        at, start = end, start + length
    return _apart(blocks)


def restructuredtext_blocks(text: str) -> tuple[Block, ...]:
    """The literal blocks and the tables of reStructuredText, whose columns line up as they are written."""
    return _apart(Block(*span, Kind.CODE) for span in _literals(text))


def table_end(lines: list[str], at: int) -> int:
    """The line behind the table that begins at a line; the line behind this one, where none begins."""
    end = at + 1
    if end < len(lines) and "|" in lines[at] and "|" in lines[end] and _TABLE_RULE.match(lines[end]):
        end += 1
        while end < len(lines) and "|" in lines[end]:
            end += 1
    return end


def fence_after(fence: str | None, line: str) -> str | None:
    """The mark of the fenced code that one is in behind a line, if any."""
    mark = _FENCE.match(line)
    if mark is None:
        return fence
    if fence is None:
        return mark[1]
    return None if mark[1].startswith(fence) and not line[mark.end() :].strip() else fence


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


def _literals(text: str) -> Iterator[Span]:
    for found in _LITERAL.finditer(text):
        written = found[2]
        indent = len(written) - len(written.lstrip())
        start = found.start(2) + written.rfind("\n", 0, indent) + 1  # with its first line's indent
        yield start, found.start(2) + len(written.rstrip())
    for pattern in (_GRID, _FROM_RULE):
        for found in pattern.finditer(text):
            written = found[0].rstrip()
            if pattern is _GRID or _RULE.fullmatch(written[written.rfind("\n") + 1 :]):
                yield found.start(), found.start() + len(written)


def _apart(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Blocks in the order of the text; one that begins within another one is part of it."""
    apart: list[Block] = []
    for block in sorted(blocks, key=lambda one: (one.start, -one.end)):
        if block.start < block.end and (not apart or block.start >= apart[-1].end):
            apart.append(block)
    return tuple(apart)
