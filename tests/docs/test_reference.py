"""The reference documents every public name, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import celery_alchemy

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
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


@pytest.mark.parametrize("name", ERRORS)
def test_error_has_a_section(name: str) -> None:
    """docs/reference/errors.md has a heading for the error, so that its anchor exists."""
    assert name in _headings("errors.md")


def test_reference_has_no_section_for_a_name_that_does_not_exist() -> None:
    """A name that was renamed or removed is not documented any more."""
    headings = _headings("api.md") | _headings("errors.md")

    assert headings <= set(celery_alchemy.__all__)
