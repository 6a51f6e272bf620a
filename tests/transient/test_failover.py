"""A server that only reads since a failover: the task runs again on a new connection, unless it is read-only itself."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import is_transient
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop

SERVERS = ("postgresql", "postgresql+psycopg2", "mariadb")
ASYNC = ("postgresql+psycopg", "postgresql+asyncpg")

_READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}


def _demote_the_first(shop: Shop, target: Any) -> list[int]:
    """Have the first connection of an engine lead to a server that has become a standby; return the list of connections."""
    connections: list[int] = []

    def connect(dbapi_connection: Any, record: Any) -> None:
        connections.append(1)
        if len(connections) == 1:
            cursor = dbapi_connection.cursor()
            cursor.execute(_READ_ONLY[shop.database.name])
            cursor.close()
            dbapi_connection.commit()

    event.listen(target, "connect", connect)
    return connections


@pytest.fixture
def one(make_shop: MakeShop) -> Shop:
    """A shop with one connection, which every run of a task would get."""
    return make_shop(engine_options={"pool_size": 1, "max_overflow": 0})


@pytest.mark.databases(*SERVERS)
def test_task_runs_again_on_a_new_connection(one: Shop) -> None:
    """The connection that only reads is not lent again."""
    connections = _demote_the_first(one, one.alchemy.engine)
    errors: list[BaseException] = []

    @one.task(transient_retries=1)
    def write(session: Session) -> None:
        try:
            session.execute(text("INSERT INTO book (title) VALUES ('Emma')"))
        except DBAPIError as exc:
            errors.append(exc)
            raise

    traced = one.trace(write)

    assert traced.state == "SUCCESS"
    assert [is_transient(error) for error in errors] == [True]
    assert one.titles() == ["Emma"]
    assert len(connections) == 2


@pytest.mark.databases(*ASYNC)
def test_async_task_runs_again_on_a_new_connection(one: Shop) -> None:
    """Of an async driver too."""
    runs: list[int] = []

    @one.task(transient_retries=1)
    async def write(session: AsyncSession) -> None:
        runs.append(1)
        if len(runs) == 1:
            # As the first connection would be: for the rest of its life.
            await session.execute(text(_READ_ONLY["postgresql"]))
            await session.commit()
        session.add(Book(title="Emma"))

    traced = one.trace(write)

    assert traced.state == "SUCCESS"
    assert one.titles() == ["Emma"]
    assert len(runs) == 2


@pytest.mark.databases(*SERVERS)
def test_read_only_task_does_not_run_again(one: Shop) -> None:
    """It has forbidden the write itself; record_failure is told at once, and the connection stays."""
    connections: list[int] = []
    event.listen(one.alchemy.engine, "connect", lambda *_: connections.append(1))
    seen: list[str] = []

    @one.task(transient_retries=3, read_only=True, record_failure=lambda session, exc: seen.append("recorded"))
    def write(session: Session) -> None:
        seen.append("run")
        session.execute(text("INSERT INTO book (title) VALUES ('Emma')"))

    traced = one.trace(write)

    assert traced.state == "FAILURE"
    assert seen == ["run", "recorded"]
    assert len(connections) == 1


class FakeError(Exception):
    """An error of a MySQL driver: a number and a text."""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("The MySQL server is running with the --read-only option so it cannot execute this statement", True),
        ("The MariaDB server is running with the --read-only option so it cannot execute this statement", True),
        ("The MySQL server is running with the --super-read-only option so it cannot execute this statement", True),
        ("The MySQL server is running with the --secure-file-priv option so it cannot execute this statement", False),
    ],
)
def test_option_that_prevents_a_statement_is_asked_for_its_name(message: str, expected: bool) -> None:
    """The number 1290 stands for several options of the server."""
    assert is_transient(DBAPIError("INSERT", {}, FakeError(1290, message))) is expected
