"""A store on the test's database, and its Alchemy for the fixtures of the kit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_alchemy import Alchemy
from celery_alchemy.requests.event_loop import process_loop
from tests.kit.store import Store
from tests.services.databases import Database


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


@pytest.fixture
def make_store(database: Database) -> Iterator[Callable[..., Store]]:
    """Make stores on the test's database."""
    stores: list[Store] = []

    def make(bind: Any = None, **options: Any) -> Store:
        stores.append(Store(database, bind, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    """A store with the outbox."""
    return make_store()


@pytest.fixture
def alchemy(store: Store) -> Alchemy:
    """What the kit's fixtures work on."""
    return store.alchemy
