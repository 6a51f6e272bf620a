"""Plain text, Markdown, reStructuredText: the text stays as written, and quotations are the author's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ragline.text import Heading, ParsedText, decode

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*$")
# An adornment is a line of one repeated punctuation character (Source: reStructuredText specification,
# "Sections").
_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1*[ \t]*$")


def parse_plain(data: bytes) -> ParsedText:
    """Plain text, without headings."""
    text, encoding = decode(data)
    return ParsedText(text=text, encoding=encoding)


def parse_markdown(data: bytes) -> ParsedText:
    """Markdown as written, with its ATX (`# Title`) and setext (underlined) headings."""
    text, encoding = decode(data)
    return ParsedText(text=text, headings=tuple(_markdown_headings(text)), encoding=encoding)


def parse_restructuredtext(data: bytes) -> ParsedText:
    """reStructuredText as written, with its headings, ranked in the order in which styles first appear."""
    text, encoding = decode(data)
    return ParsedText(text=text, headings=tuple(_restructuredtext_headings(text)), encoding=encoding)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for line in text.split("\n"):
        yield start, line
        start += len(line) + 1


def _markdown_headings(text: str) -> Iterator[Heading]:
    fence: str | None = None
    previous_start, previous = 0, ""
    for start, line in _lines(text):
        mark = _FENCE.match(line)
        if fence is not None:
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = None
            previous = ""
            continue
        if mark:
            fence = mark[1]
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
