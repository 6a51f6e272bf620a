"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from celery_alchemy.testing import no_leaks
from tests.services.databases import Database
from tests.unit.shop import Shop


class MakeShop(Protocol):
    """Makes a shop with options of Alchemy."""

    def __call__(self, **options: Any) -> Shop:
        """Return the shop."""
        ...


@pytest.fixture
def make_shop(database: Database) -> Iterator[MakeShop]:
    """Make shops on the test's database, in which every test gives back what it took; their engines are disposed of at the end."""
    shops: list[Shop] = []

    def make(**options: Any) -> Shop:
        shops.append(Shop(database, **options))
        return shops[-1]

    with no_leaks():
        yield make
    for shop in shops:
        shop.alchemy.engine.dispose()
        with shop.app.connection_for_write() as connection, connection.channel() as channel:
            channel.queue_declare("celery")
            channel.queue_purge("celery")
        shop.app.close()


@pytest.fixture
def shop(make_shop: MakeShop) -> Shop:
    """A shop with the default options."""
    return make_shop()
