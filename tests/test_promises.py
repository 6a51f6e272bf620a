"""The tests themselves are held to a rule: each says in its docstring what it promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "examples").rglob("tests/**/test_*.py")])


def _tests_of(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [function for function in functions if function.name.startswith("test_")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_has_a_docstring(path: Path) -> None:
    """A test without a docstring does not say what breaks for whom when it fails."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    silent = [test.name for test in _tests_of(tree) if not ast.get_docstring(test)]

    assert silent == []
