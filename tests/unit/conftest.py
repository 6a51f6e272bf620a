"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest

from celery_alchemy.sessions.engine import WorkerPool, set_worker_pool, worker_pool
from celery_alchemy.testing import no_leaks
from tests.services.databases import Database
from tests.unit.shop import Shop

InWorker = Callable[[str, int], None]


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
        shop.close()


@pytest.fixture
def shop(make_shop: MakeShop) -> Shop:
    """A shop with the default options."""
    return make_shop()


@pytest.fixture
def in_worker() -> Iterator[InWorker]:
    """Let this process belong to a worker of that pool and concurrency."""
    before = worker_pool()
    yield lambda name, concurrency: set_worker_pool(WorkerPool(name, concurrency))
    set_worker_pool(before)
