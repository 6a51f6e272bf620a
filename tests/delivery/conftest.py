"""Fixtures of the delivery tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from tests.delivery.outbox_stand import OutboxStand
from tests.services.databases import Database


class MakeStand(Protocol):
    """Makes a stand with options of Alchemy."""

    def __call__(self, **options: Any) -> OutboxStand:
        """Return the stand."""
        ...


@pytest.fixture
def make_stand(database: Database) -> Iterator[MakeStand]:
    """Make stands on the test's database; their connections are closed at the end."""
    stands: list[OutboxStand] = []

    def make(**options: Any) -> OutboxStand:
        stands.append(OutboxStand(database, **options))
        return stands[-1]

    yield make
    for stand in stands:
        stand.close()


@pytest.fixture
def stand(make_stand: MakeStand) -> OutboxStand:
    """A stand with an outbox."""
    return make_stand()
