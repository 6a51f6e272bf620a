"""The code keeps the house's measures: how long a file, a body and a line may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import celery_alchemy

PACKAGE = Path(celery_alchemy.__file__).parent
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_BODY = 40
MOST_COLUMNS = 100


def _files() -> list[tuple[str, str]]:
    """Return the path and the text of every file of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(str(path.relative_to(PACKAGE)), path.read_text(encoding="utf-8")) for path in paths]


def _long_bodies(source: str) -> list[str]:
    """Return the names and lengths of the functions whose bodies are too long, docstrings not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body if ast.get_docstring(node) is None else node.body[1:]
        if not body:
            continue
        lines = (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1
        if lines > MOST_LINES_OF_A_BODY:
            found.append(f"{node.name}: {lines}")
    return found


def _is_wide(line: str) -> bool:
    """Tell whether a line is too long; an address, and a word to a checker, cannot be folded."""
    return len(re.sub(r"  # (noqa|type|pyright): .*", "", line)) > MOST_COLUMNS and not re.search(r"https?://\S+$", line)


def test_lines_are_narrow() -> None:
    """A line is read without turning the head, and two files fit side by side."""
    wide = [f"{name}:{number}" for name, text in _files() for number, line in enumerate(text.splitlines(), 1) if _is_wide(line)]

    assert wide == []


def test_files_are_short() -> None:
    """A reader finds the whole subject of a file in at most 400 lines."""
    too_long = {name: len(text.splitlines()) for name, text in _files() if len(text.splitlines()) > MOST_LINES_OF_A_FILE}

    assert too_long == {}


def test_bodies_are_short() -> None:
    """A function is read at one look: its body has at most 40 lines."""
    too_long = {name: found for name, text in _files() if (found := _long_bodies(text))}

    assert too_long == {}


def test_long_body_is_found_inside_of_another_function() -> None:
    """The measure sees a function in a function, and does not count a docstring."""
    lines = "\n".join(f"        x{number} = {number}" for number in range(MOST_LINES_OF_A_BODY))
    fits = f'def outer():\n    def inner():\n        """One.\n\n        Two.\n        """\n{lines}\n    return inner'

    assert _long_bodies(fits) == ["outer: 46"]
    assert _long_bodies(f"{fits[: -len('    return inner')]}        y = 1\n") == ["outer: 46", "inner: 41"]
