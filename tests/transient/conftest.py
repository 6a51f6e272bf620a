"""Fixtures of the tests of transient errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_alchemy.databases import trying_again
from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.conftest import make_stand, stand
from tests.delivery.proxy import CommitProxy
from tests.services.databases import Database
from tests.unit.conftest import make_shop, shop

__all__ = ["make_shop", "make_stand", "shop", "stand"]


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds waited between two runs; nobody really waits."""
    seconds: list[float] = []
    monkeypatch.setattr(trying_again, "sleep", seconds.append)
    return seconds


@pytest.fixture
def proxy(database: Database) -> Iterator[CommitProxy]:
    """A proxy that can lose a COMMIT, by which the app of the test reaches its database."""
    with CommitProxy(database.url) as proxy:
        database.url = proxy.url
        yield proxy
