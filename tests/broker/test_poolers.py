"""PostgreSQL behind a pooler: who listens where nothing is told?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.pool import NullPool

from celery_alchemy.broker import ears
from celery_alchemy.broker.ears import Ear, ear_on
from tests.broker.pooler import Pooler
from tests.services.databases import Database

pytestmark = pytest.mark.databases("postgresql")


@pytest.fixture(params=["psycopg", "psycopg2"])
def engine_of(request: pytest.FixtureRequest) -> Callable[[str], Engine]:
    """Make engines of a driver, without a pool."""

    def make(url: str) -> Engine:
        return create_engine(make_url(url).set(drivername=f"postgresql+{request.param}"), poolclass=NullPool)

    return make


@contextmanager
def listening(engine: Engine) -> Iterator[Ear | None]:
    with engine.connect() as connection:
        yield ear_on(connection, "news")


def tell(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("NOTIFY news")


def test_nobody_listens_through_a_pooler_that_does_not_tell(database: Database, engine_of: Any) -> None:
    """In transaction mode the pooler would warn of each telling in its log, without end."""
    with Pooler(database.url, tells=False) as pooler, listening(engine_of(pooler.url)) as ear:
        assert ear is None
        assert b"LISTEN celery_alchemy_trial" in pooler.asked
        assert b"LISTEN news" not in pooler.asked


def test_process_tries_a_deaf_pooler_once(database: Database, engine_of: Any) -> None:
    """Each try takes a second of whoever waits for a result."""
    with Pooler(database.url, tells=False) as pooler:
        engine = engine_of(pooler.url)
        for _ in range(2):
            with listening(engine) as ear:
                assert ear is None

        assert pooler.asked.count(b"UNLISTEN") == 0
        assert pooler.asked.count(b"LISTEN celery_alchemy_trial") == 1


def test_what_is_told_is_heard_through_a_pooler_in_session_mode(
    database: Database, engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a connection is its client's own."""
    monkeypatch.setattr(ears, "TRIAL_SECONDS", 20.0)
    with Pooler(database.url, tells=True) as pooler, listening(engine_of(pooler.url)) as ear:
        assert ear is not None
        tell(engine_of(database.url))

        assert ear.heard_within(20) == {"news"}


def test_connection_to_the_server_itself_is_not_tried(database: Database, engine_of: Any) -> None:
    """What is heard there needs no trial."""
    engine = engine_of(database.url)
    with listening(engine) as ear:
        assert ear is not None
        tell(engine)

        assert ear.heard_within(20) == {"news"}
