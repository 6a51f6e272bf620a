"""Plain text, Markdown, reStructuredText: the text stays as written, and quotations are the author's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ragline.limits import Limits
from ragline.parsers.layout import fence_after, markdown_blocks, restructuredtext_blocks, table_end
from ragline.parsers.writer import MAX_HEADER_TOKENS, divided, estimated_tokens
from ragline.text import Heading, ParsedText, Span, decode

_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*$")
# An adornment is a line of one repeated punctuation character (Source: reStructuredText specification,
# "Sections").
_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1*[ \t]*$")


def parse_plain(data: bytes, limits: Limits) -> ParsedText:
    """Plain text, without headings."""
    text, encoding = _decode(data, limits)
    return ParsedText(text=text, encoding=encoding)


def parse_markdown(data: bytes, limits: Limits) -> ParsedText:
    """Markdown as written, with its ATX (`# Title`) and setext (underlined) headings.

    A long table has its header row again wherever it is divided.
    """
    text, encoding = _decode(data, limits)
    text, table_parts = _divide_tables(text)
    return ParsedText(
        text=text,
        headings=tuple(_markdown_headings(text)),
        encoding=encoding,
        table_parts=table_parts,
        blocks=markdown_blocks(text),
    )


def parse_restructuredtext(data: bytes, limits: Limits) -> ParsedText:
    """reStructuredText as written, with its headings, ranked in the order in which styles first appear."""
    text, encoding = _decode(data, limits)
    headings = tuple(_restructuredtext_headings(text))
    return ParsedText(text=text, headings=headings, encoding=encoding, blocks=restructuredtext_blocks(text))


def _decode(data: bytes, limits: Limits) -> tuple[str, str]:
    text, encoding = decode(data)
    limits.check("characters", len(text))
    return text, encoding


def _divide_tables(text: str) -> tuple[str, tuple[Span, ...]]:
    """The text with the header of each long table repeated, and where the parts of those tables are."""
    lines = text.split("\n")
    written: list[str] = []
    spans: list[Span] = []
    at, start = 0, 0
    fence: str | None = None
    while at < len(lines):
        fence = fence_after(fence, lines[at])
        end = table_end(lines, at) if fence is None else at + 1
        header, rows = "\n".join(lines[at : at + 2]), lines[at + 2 : end]
        parts = list(divided(header, rows)) if rows and estimated_tokens(header) <= MAX_HEADER_TOKENS else []
        if len(parts) < 2:
            written.extend(lines[at:end])
            start += sum(len(line) + 1 for line in lines[at:end])
        for number, part in enumerate(parts if len(parts) > 1 else []):
            if number:
                written.append("")
                start += 1
            written.append(part)
            spans.append((start, start + len(part)))
            start += len(part) + 1
        at = end
    return "\n".join(written), tuple(spans)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for line in text.split("\n"):
        yield start, line
        start += len(line) + 1


def _markdown_headings(text: str) -> Iterator[Heading]:
    fence: str | None = None
    previous_start, previous = 0, ""
    for start, line in _lines(text):
        before, fence = fence, fence_after(fence, line)
        if before is not None or fence is not None:
            previous = ""
            continue
        if atx := _ATX.match(line):
            yield Heading(start=start, level=len(atx[1]), title=(atx[2] or "").strip())
            previous = ""
            continue
        if (
            previous.strip()
            and (setext := _SETEXT.match(line))
            and not previous.lstrip().startswith(("|", ">", "-"))
        ):
            yield Heading(start=previous_start, level=1 if setext[1][0] == "=" else 2, title=previous.strip())
            previous = ""
            continue
        previous_start, previous = start, line


def _restructuredtext_headings(text: str) -> Iterator[Heading]:
    lines = list(_lines(text))
    styles: list[str] = []
    at = 0
    while at + 1 < len(lines):
        start, line = lines[at]
        overline = _ADORNMENT.match(line)
        if overline and at + 2 < len(lines) and _adorns(lines[at + 2][1], lines[at + 1][1], overline[1]):
            title, style, used = lines[at + 1][1].strip(), overline[1] * 2, 3
        elif not overline and _adorns(lines[at + 1][1], line):
            title, style, used = line.strip(), lines[at + 1][1][0], 2
        else:
            at += 1
            continue
        if style not in styles:
            styles.append(style)
        yield Heading(start=start, level=styles.index(style) + 1, title=title)
        at += used


def _adorns(adornment: str, title: str, character: str | None = None) -> bool:
    """Whether `adornment` underlines `title`: one character repeated, at least as wide as the title."""
    found = _ADORNMENT.match(adornment)
    if not found or not title.strip() or (character is not None and found[1] != character):
        return False
    # Shorter than four characters it may be a bullet or an ellipsis, unless the title is as short.
    return len(adornment.rstrip()) >= len(title.strip()) and not title.startswith(("  ", "\t"))
