"""The reference documents every public name, and no other."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import celery_alchemy
from celery_alchemy import testing
from tests.docs.page import blocks_of

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGES = [REFERENCE.parent.parent / "README.md", *REFERENCE.parent.rglob("*.md")]
EXECUTED = "\n".join(block.code for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8")) if block.skipped is None)
ERRORS = [
    name
    for name in celery_alchemy.__all__
    if isinstance(value := getattr(celery_alchemy, name), type) and issubclass(value, Exception)
]
OTHERS = [name for name in celery_alchemy.__all__ if name not in ERRORS]


def _headings(page: str) -> set[str]:
    text = (REFERENCE / page).read_text(encoding="utf-8")
    return set(re.findall(r"^#{2,3} `(\w+)[^`]*`$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", OTHERS)
def test_public_name_has_a_section(name: str) -> None:
    """docs/reference/api.md has a heading for the name."""
    assert name in _headings("api.md")


@pytest.mark.parametrize("name", celery_alchemy.__all__)
def test_public_name_is_used_in_an_example_that_is_executed(name: str) -> None:
    """In a block of a page that the tests run: what a reader pastes works."""
    assert re.search(rf"\b{name}\b", EXECUTED)


@pytest.mark.parametrize("name", ERRORS)
def test_error_has_a_section(name: str) -> None:
    """docs/reference/errors.md has a heading for the error, so that its anchor exists."""
    assert name in _headings("errors.md")


def test_reference_has_no_section_for_a_name_that_does_not_exist() -> None:
    """A name that was renamed or removed is not documented any more."""
    headings = _headings("api.md") | _headings("errors.md")

    assert headings <= set(celery_alchemy.__all__)


def _page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def test_fields_of_the_report_are_documented() -> None:
    """docs/reference/events.md has a line for every field of a SessionReport, and no other."""
    section = _page("events.md").split("## Callables", 1)[0]

    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == [
        field.name for field in dataclasses.fields(celery_alchemy.SessionReport)
    ]


def test_loggers_are_documented() -> None:
    """docs/reference/events.md says of every logger that speaks above DEBUG what it has to say."""
    package = Path(celery_alchemy.__file__).parent
    speaks = re.compile(r"logger\.(info|warning|error|exception)\(")
    sources = [file.read_text(encoding="utf-8") for file in package.rglob("*.py")]
    speakers = {name for source in sources if speaks.search(source) for name in re.findall(r'getLogger\("([\w.]+)"\)', source)}

    assert set(re.findall(r"^\| `(celery_alchemy\.\w+)` \|", _page("events.md"), flags=re.MULTILINE)) == speakers


def _undocumented(module: ModuleType) -> list[str]:
    """Return the public names of a module, and the public members of its classes, that have no docstring of their own."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value) or typing.get_origin(value) is not None:
            continue
        found += [name] if not value.__doc__ else []
        if isinstance(value, type):
            members = [(key, member) for key, member in vars(value).items() if not key.startswith("_")]
            functions = [(key, getattr(member, "__func__", getattr(member, "fget", member))) for key, member in members]
            found += [f"{name}.{key}" for key, function in functions if isinstance(function, FunctionType) and not function.__doc__]
    return found


@pytest.mark.parametrize("module", [celery_alchemy, testing], ids=lambda module: module.__name__)
def test_public_name_has_a_docstring(module: ModuleType) -> None:
    """What docs/reference/docstrings.md shows is more than a signature."""
    assert _undocumented(module) == []
