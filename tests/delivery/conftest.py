"""Fixtures of the delivery tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from tests.delivery.stand import Stand
from tests.services.databases import Database


class MakeStand(Protocol):
    """Makes a stand with options of Alchemy."""

    def __call__(self, **options: Any) -> Stand:
        """Return the stand."""
        ...


@pytest.fixture
def make_stand(database: Database) -> Iterator[MakeStand]:
    """Make stands on the test's database; their connections are closed at the end."""
    stands: list[Stand] = []

    def make(**options: Any) -> Stand:
        stands.append(Stand(database, **options))
        return stands[-1]

    yield make
    for stand in stands:
        stand.close()


@pytest.fixture
def stand(make_stand: MakeStand) -> Stand:
    """A stand with an outbox."""
    return make_stand()
