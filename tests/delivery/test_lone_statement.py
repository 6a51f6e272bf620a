"""The start of a `once` task is one statement by itself, and leaves the connection as it was."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Column, Date, MetaData, String, Table, create_engine, event, insert, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.databases import postgresql
from celery_alchemy.outbox import lone_statement
from celery_alchemy.outbox.prepared import as_sent
from celery_alchemy.requests.once_statements import LOOK, START
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import WAYS, Start, start
from tests.services.databases import Database


@pytest.fixture
def stand(database: Database) -> Iterator[OutboxStand]:
    """An app with an outbox."""
    stand = OutboxStand(database)
    yield stand
    stand.close()


@WAYS
def test_body_has_a_transaction_that_can_be_rolled_back(stand: OutboxStand, begin: Start) -> None:
    """The statement may have been sent with autocommit on, on the body's own connection."""

    @stand.task(name="changes its mind", once=True)
    def changes_its_mind(session: Session) -> str:
        session.add(Effect(name="ghost"))
        session.flush()
        session.rollback()
        session.add(Effect(name="a"))
        return "done"

    ended = stand.deliver(begin(stand, changes_its_mind))

    assert (ended.state, ended.value) == ("SUCCESS", "done")
    assert stand.effects() == ["a"]


@WAYS
def test_connection_that_is_lost_at_the_start_is_replaced(stand: OutboxStand, begin: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's own transaction starts the task then; the broken connection is dropped."""
    execute = lone_statement._execute
    lost: list[Any] = []

    def lose(connection: Any, dialect: Any, *rest: Any) -> Any:
        if not lost:
            lost.append(connection.driver_connection)
            raise dialect.loaded_dbapi.OperationalError("the server went away")
        return execute(connection, dialect, *rest)

    @stand.task(name="add", once=True)
    def add(session: Session) -> None:
        session.add(Effect(name="a"))
        assert session.connection().connection.driver_connection is not lost[0]

    sent = begin(stand, add)
    monkeypatch.setattr(lone_statement, "_execute", lose)
    states = [stand.deliver(sent).state for _ in range(2)]

    assert states == ["SUCCESS", "SUCCESS"]
    assert stand.effects() == ["a"]


@pytest.mark.databases("postgresql")
@WAYS
def test_start_does_not_end_what_a_listener_of_the_pool_has_begun(database: Database, begin: Start) -> None:
    """Autocommit cannot be switched on inside of a transaction: that one is committed instead."""
    engine = create_engine(database.url)

    def set_role(dbapi_connection: Any, *more: Any) -> None:
        dbapi_connection.cursor().execute("SET application_name = 'a worker'")

    event.listen(engine, "checkout", set_role)
    stand = OutboxStand(database, bind=engine)

    @stand.task(name="names", once=True)
    def names(session: Session) -> str:
        session.add(Effect(name="a"))
        return str(session.scalar(text("SHOW application_name")))

    sent = begin(stand, names)
    ended = [stand.deliver(sent) for _ in range(2)]
    stand.close()

    assert [one.value for one in ended] == ["a worker"] * 2
    assert stand.effects() == ["a"]


@pytest.mark.databases("postgresql")
def test_commit_of_a_count_does_not_wait_for_the_disk(stand: OutboxStand) -> None:
    """The statement itself says so, for its own transaction only; a look says nothing."""

    @stand.task(name="owed", once=True)
    def owed() -> None: ...

    task_id = start(stand, owed).id
    values = {"row_id": task_id, "of": task_id, "wait": 1, "most": 5, "starts": 1, "uncounted": 0}
    with stand.database.engine.connect() as connection:
        before = connection.scalar(text("SHOW synchronous_commit"))
        changed = connection.execute(postgresql.hastened(START), values).rowcount
        during = connection.scalar(text("SHOW synchronous_commit"))
        connection.commit()
        after = connection.scalar(text("SHOW synchronous_commit"))

    assert (changed, during, after) == (1, "off", before)
    assert postgresql.hastened(LOOK) is LOOK


@pytest.mark.databases("sqlite")
def test_count_on_sqlite_does_not_wait_for_the_disk(stand: OutboxStand) -> None:
    """The connection waits less for this statement, and for the body's COMMIT as before."""
    sent: list[str] = []

    @stand.task(name="owed", once=True)
    def owed(session: Session) -> None:
        session.add(Effect(name="a"))

    message = start(stand, owed)
    with stand.alchemy.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.set_trace_callback(sent.append)
    stand.deliver(message)
    driver.set_trace_callback(None)

    words = [statement.split("(")[0].strip() for statement in sent]
    began = words.index("PRAGMA synchronous = 1")
    assert words[began + 1].startswith("UPDATE main.celery_outbox SET")
    assert words[began + 2] == "PRAGMA synchronous = 2"
    assert words[-1] == "COMMIT"
    assert driver.execute("PRAGMA synchronous").fetchone() == (2,)


def test_database_in_memory_is_asked_in_the_sessions_own_transaction() -> None:
    """Its one connection may be in somebody's transaction, which a statement by itself would commit."""
    app = Celery("memory", broker="memory://", set_as_current=False)
    alchemy = Alchemy(app, "sqlite://", outbox=True)
    alchemy.create_tables()
    runs: list[int] = []

    @app.task(name="once", once=True, shared=False)  # type: ignore[untyped-decorator]
    def once() -> None:
        runs.append(1)

    states = [once.apply(task_id="a-delivery").state for _ in range(2)]

    assert (states, runs) == (["SUCCESS"] * 2, [1])
    assert not lone_statement.lends_its_own(alchemy.engine)


def test_parameters_reach_the_driver_as_sqlalchemy_gives_them() -> None:
    """What a driver does not take as it is, such as a date on SQLite, is converted first."""
    table = Table("holiday", MetaData(), Column("day", Date), Column("name", String(20)))

    sent = as_sent(insert(table), sqlite.dialect())

    assert sent.text == "INSERT INTO holiday (day, name) VALUES (?, ?)"
    assert sent.values({"day": date(2026, 12, 24), "name": "Christmas Eve"}) == ("2026-12-24", "Christmas Eve")
