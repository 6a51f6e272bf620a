"""Source code to text: as written, with what it defines as headings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ragline.limits import Limits
from ragline.text import Block, Heading, Kind, ParsedText, decode

_INDENT_LEVELS = 4
# What most languages begin a definition with. Of each line only its beginning is looked at.
_DEFINITION = re.compile(
    r"""([ \t]{0,16})(?:(?:export|default|pub(?:\([a-z]+\))?|public|private|protected|internal|static|abstract
    |final|sealed|async|unsafe|inline|virtual|override|partial|data|open)[ \t]+){0,4}
    (?:def|class|func|function|fn|struct|enum|trait|impl|interface|module|namespace|record|object|protocol
    |mod|sub
    |create[ \t]+(?:or[ \t]+replace[ \t]+)?(?:table|view|function|procedure|index|trigger|type))[ \t]+\S""",
    re.VERBOSE,
)
_SQL_DEFINITION = re.compile(_DEFINITION.pattern, re.VERBOSE | re.IGNORECASE)
_MAX_TITLE_CHARACTERS = 100


def parse_code(data: bytes, limits: Limits) -> ParsedText:
    """Source code as written; a class, function or table that it defines begins a section.

    Raises:
        TooLargeError: it has more characters than the limit.
    """
    text, encoding = decode(data)
    limits.check("characters", len(text))
    return ParsedText(
        text=text,
        headings=tuple(_definitions(text)),
        encoding=encoding,
        blocks=(Block(0, len(text), Kind.CODE),),
    )


def _definitions(text: str) -> Iterator[Heading]:
    start = 0
    for line in text.split("\n"):
        beginning = line[:_MAX_TITLE_CHARACTERS]
        # SQL is written in capitals as often as not; "Class" at the start of a line is prose.
        pattern = _SQL_DEFINITION if line[:6].lower() == "create" else _DEFINITION
        if found := pattern.match(beginning):
            level = 1 + len(found[1].expandtabs(_INDENT_LEVELS)) // _INDENT_LEVELS
            yield Heading(start=start, level=level, title=beginning.strip().rstrip("{:").rstrip())
        start += len(line) + 1
