"""Source code to text: as written, with what it defines as headings."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator

from ragline.limits import Limits
from ragline.text import Block, Heading, Kind, ParsedText, Span, decode

_INDENT_LEVELS = 4
# What most languages begin a definition with, a name, and what comes behind a name there and not in a
# sentence. Of each line only its beginning is looked at.
_DEFINITION = re.compile(
    r"""([ \t]{0,16})(?:(?:export|default|pub(?:\([a-z]+\))?|public|private|protected|internal|static|abstract
    |final|sealed|async|unsafe|inline|virtual|override|partial|data|open)[ \t]+){0,4}
    (?:def|class|fun|func|function|fn|struct|enum|trait|impl|interface|module|namespace|record|object|protocol
    |mod|sub)[ \t]+(?:[A-Z][A-Z0-9_]+[ \t]+)?(?:\([^()]*\)[ \t]*)?[\w$:.~*&<>,\[\]'"\\-]+
    [ \t]*(?:$|[({;=]|(?:extends|implements|for|where|is|throws|const|final|permits)\b|:[ \t]*(?:$|\w))""",
    re.VERBOSE,
)
_SQL_DEFINITION = re.compile(
    r"""([ \t]{0,16})create[ \t]+(?:or[ \t]+replace[ \t]+)?
    (?:table|view|function|procedure|index|trigger|type)[ \t]+\S""",
    re.VERBOSE | re.IGNORECASE,
)
_PYTHON_DEFINITION = re.compile(r"([ \t]{0,60})(?:class|def|async[ \t]+def)[ \t]+\w+[ \t]*[(:\[]")
# Comments are there for the quotes in them.
_PYTHON_TEXTS = re.compile(
    r"""\#[^\n]*|(\"{3}|'{3})(?:\\.|(?!\1).)*(?:\1|\Z)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?""",
    re.VERBOSE | re.DOTALL,
)
_MAX_TITLE_CHARACTERS = 100


def parse_code(data: bytes, limits: Limits, *, name: str) -> ParsedText:
    """Source code as written; a class, function or table that it defines begins a section.

    Args:
        data: all of its bytes.
        limits: how many characters it may have.
        name: its file name.

    Raises:
        TooLargeError: it has more characters than the limit.
    """
    text, encoding = decode(data)
    limits.check("characters", len(text))
    is_python = name.lower().endswith((".py", ".pyi"))
    return ParsedText(
        text=text,
        headings=tuple(_python_definitions(text) if is_python else _definitions(text)),
        encoding=encoding,
        blocks=(Block(0, len(text), Kind.CODE),),
    )


def _definitions(text: str) -> Iterator[Heading]:
    for start, beginning in _lines(text):
        # SQL is written in capitals as often as not; "Class" at the start of a line is prose.
        pattern = _SQL_DEFINITION if beginning[:22].lstrip()[:6].lower() == "create" else _DEFINITION
        if found := pattern.match(beginning):
            yield _heading(start, beginning, found[1])


def _python_definitions(text: str) -> Iterator[Heading]:
    """Those outside of its texts, in which people write about classes too."""
    texts: list[Span] = [found.span() for found in _PYTHON_TEXTS.finditer(text) if "\n" in found[0]]
    begun = [start for start, _ in texts]
    for start, beginning in _lines(text):
        if found := _PYTHON_DEFINITION.match(beginning):
            before = bisect_right(begun, start) - 1
            if before < 0 or start >= texts[before][1]:
                yield _heading(start, beginning, found[1])


def _lines(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for line in text.split("\n"):
        yield start, line[:_MAX_TITLE_CHARACTERS]
        start += len(line) + 1


def _heading(start: int, beginning: str, indent: str) -> Heading:
    level = 1 + len(indent.expandtabs(_INDENT_LEVELS)) // _INDENT_LEVELS
    return Heading(start=start, level=level, title=beginning.strip().rstrip("{:(").rstrip())
