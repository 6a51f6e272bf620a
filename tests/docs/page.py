"""Runs the Python blocks of one Markdown page in one namespace, as a script that the tests start."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

# A block that cannot be executed is preceded by this comment, which says why.
_SKIPPED = re.compile(r"<!-- not executed: (?P<reason>.+) -->")


@dataclass(frozen=True)
class Block:
    """One fenced Python block.

    Attributes:
        line: Line of its first statement in the page, from 1.
        code: Its text.
        skipped: Why it is not executed, or None.
    """

    line: int
    code: str
    skipped: str | None


def blocks_of(text: str) -> list[Block]:
    """Return the fenced ``python`` blocks of a page, in order.

    Raises:
        ValueError: A fence is not closed.
    """
    blocks: list[Block] = []
    body: list[str] | None = None
    start, previous = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if body is not None:
            if line.rstrip() == "```":
                skipped = _SKIPPED.fullmatch(previous)
                blocks.append(Block(start, "\n".join(body), skipped["reason"] if skipped else None))
                body, previous = None, ""
            else:
                body.append(line)
        elif line.rstrip() == "```python":
            body, start = [], number + 1
        elif line.strip():
            previous = line.strip()
    if body is not None:
        raise ValueError(f"the block that starts in line {start} is not closed")
    return blocks


def main(page: Path) -> None:
    """Execute the page's blocks; tracebacks name the page and its lines."""
    namespace: dict[str, object] = {"__name__": "documentation"}
    # Pickled classes and annotations are looked up in the module that they say they come from.
    module = type(sys)("documentation")
    module.__dict__.update(namespace)
    sys.modules["documentation"] = module
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.skipped is None:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), module.__dict__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
