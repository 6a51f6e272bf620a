"""Fixtures of the broker's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection

from celery_alchemy.databases.tables import metadata
from celery_alchemy.requests.event_loop import process_loop
from tests.broker.broker_stand import BrokerStand
from tests.broker.lines import Line, OpenLine, database_broker
from tests.services.brokers import Broker
from tests.services.databases import Database


@pytest.fixture
def open_line(database: Database) -> Iterator[OpenLine]:
    """Open connections to the broker; they are closed at the end."""
    metadata.create_all(database.engine)
    opened: list[Connection] = []

    def open_one() -> Line:
        opened.append(Connection(f"alchemy+{database.url}"))
        return Line(opened[-1])

    yield open_one
    for connection in opened:
        connection.release()


@pytest.fixture
def line(open_line: OpenLine) -> Line:
    """One connection to the broker."""
    return open_line()


@pytest.fixture
def broker(database: Database, tmp_path: Path) -> Iterator[Broker]:
    """The database as the broker of the test's workers."""
    broker = database_broker(database, tmp_path)
    yield broker
    broker.close()


@pytest.fixture
def stand(database: Database) -> BrokerStand:
    """An app on a database that is its broker, and so its result backend."""
    return BrokerStand(database)


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()
