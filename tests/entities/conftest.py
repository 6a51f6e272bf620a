"""Fixtures of the tests of entities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from celery_alchemy.requests.event_loop import process_loop
from tests.entities.library import Library
from tests.services.databases import Database


class MakeLibrary(Protocol):
    """Makes a library with options of Alchemy."""

    def __call__(self, **options: Any) -> Library:
        """Return the library."""
        ...


@pytest.fixture
def make_library(database: Database) -> Iterator[MakeLibrary]:
    """Make libraries on the test's database; nothing of them is left at the end."""
    made: list[Library] = []

    def make(**options: Any) -> Library:
        made.append(Library(database, **options))
        return made[-1]

    yield make
    for library in made:
        library.close()
    process_loop.close()


@pytest.fixture
def library(make_library: MakeLibrary) -> Library:
    """A library with the default options."""
    return make_library()
