"""The page on the house names every room, in the order of the import contracts, in the room's own words."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import celery_alchemy

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = Path(celery_alchemy.__file__).parent


def _first_line(room: str) -> str:
    module = PACKAGE / room / "__init__.py"
    source = (module if module.exists() else PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0]


def test_rooms_are_those_of_the_import_contract_from_top_to_bottom() -> None:
    """A reader of the page sees the order in which rooms may import each other."""
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no tomllib")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "layers")

    rooms = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)

    assert rooms == [room for layer in layers for room in layer.split(" | ")]


def test_rooms_are_described_in_their_own_words() -> None:
    """The page says of a room what the room's docstring says."""
    described = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE, flags=re.MULTILINE))

    assert described == {room: _first_line(room) for room in described}


def test_files_that_the_page_names_are_there() -> None:
    """No answer leads to a file that was moved."""
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", PAGE))

    assert [name for name in sorted(named) if not (PACKAGE / name).is_file()] == []
