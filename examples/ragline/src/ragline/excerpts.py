"""A few lines of a long passage, around what was looked for."""

from __future__ import annotations

LINES = 5
LINES_BEFORE = 1
CHARACTERS = 400
CHARACTERS_BEFORE = 150
CUT = "…"


def excerpt(text: str, at: int) -> str:
    """The lines around a place of a text, with an ellipsis at each end where something is left out.

    Args:
        text: the text.
        at: what was looked for begins here.
    """
    start = _start(text, at)
    end = _end(text, start, at)
    before = f"{CUT} " if text[:start].strip() else ""
    after = f" {CUT}" if text[end:].strip() else ""
    return f"{before}{text[start:end].strip()}{after}"


def _start(text: str, at: int) -> int:
    start = at
    for _ in range(LINES_BEFORE + 1):
        start = max(text.rfind("\n", 0, start), 0)
    if at - start > CHARACTERS_BEFORE:
        far = at - CHARACTERS_BEFORE
        start = text.find(" ", far, at) if " " in text[far:at] else far
    return start


def _end(text: str, start: int, at: int) -> int:
    # The line end before the first line does not count.
    end = start
    for _ in range(LINES):
        end = text.find("\n", end + 1)
        if end < 0:
            end = len(text)
            break
    if end - start > CHARACTERS:
        near = start + CHARACTERS
        end = max(text.rfind(" ", at, near), at + 1) if " " in text[at:near] else near
    return end
