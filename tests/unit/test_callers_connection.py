"""Sessions in a caller's Connection: what they promise happens if, and when, the caller's transaction is committed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from celery_alchemy import on_commit, on_end
from tests.unit.shop import Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql")

Ran = list[str]

DEFERRED_CHECK = """
CREATE TABLE loan (book_id INTEGER REFERENCES book (id) DEFERRABLE INITIALLY DEFERRED)
"""


@pytest.fixture
def ran() -> Ran:
    """What has run, in order."""
    return []


@pytest.fixture
def engine(shop: Shop) -> Engine:
    return shop.alchemy.engine


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection


def work_in(connection: Connection, ran: Ran, name: str, title: str | None = None) -> None:
    """Commit a session in the connection, with a callable that waits."""
    with Session(connection, join_transaction_mode="create_savepoint") as session:
        if title is not None:
            add_books(session, [title])
        on_commit(session, lambda: ran.append(name))
        on_end(session, lambda: ran.append(f"end of {name}"))
        session.commit()


@pytest.mark.databases("postgresql", "postgresql+psycopg2", "mariadb")
@pytest.mark.parametrize("way", ["rollback", "block"])
def test_caller_sees_its_own_error_when_the_connection_is_lost(shop: Shop, engine: Engine, ran: Ran, way: str) -> None:
    """What was promised is dropped, what waits for the end happens, and the rollback of the caller works."""
    with engine.connect() as connection:
        if way == "rollback":
            outer = connection.begin()
            work_in(connection, ran, "x", "Emma")
            shop.database.disconnect_others()
            with pytest.raises(DBAPIError):
                connection.execute(text("SELECT 1"))
            outer.rollback()
        else:
            with pytest.raises(DBAPIError, match=r"SELECT 1"), connection.begin():
                work_in(connection, ran, "x", "Emma")
                shop.database.disconnect_others()
                connection.execute(text("SELECT 1"))
        assert connection.execute(text("SELECT 1")).scalar_one() == 1

    assert ran == ["end of x"]
    assert shop.titles() == []


@pytest.mark.databases("postgresql", "mariadb")
def test_lost_connection_of_a_closed_caller_drops_promises(shop: Shop, engine: Engine, ran: Ran) -> None:
    """Nothing is left for the next one that gets a connection of the pool."""
    with engine.connect() as connection:
        connection.begin()
        work_in(connection, ran, "x")
        shop.database.disconnect_others()
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT 1"))
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))

    assert ran == ["end of x"]


def test_promise_that_was_made_before_a_savepoint_outlives_its_rollback(connection: Connection, ran: Ran) -> None:
    """Only what was promised inside of it is gone."""
    with connection.begin():
        work_in(connection, ran, "before", "Emma")
        savepoint = connection.begin_nested()
        work_in(connection, ran, "inside", "Persuasion")
        inner = connection.begin_nested()
        work_in(connection, ran, "deeper", "Sanditon")
        inner.commit()
        savepoint.rollback()
        kept = connection.begin_nested()
        work_in(connection, ran, "kept", "Lady Susan")
        kept.commit()
    connection.begin()

    assert [name for name in ran if not name.startswith("end")] == ["before", "kept"]
    assert [name for name in ran if name.startswith("end")] == [
        "end of before",
        "end of inside",
        "end of deeper",
        "end of kept",
    ]


@pytest.mark.parametrize("goes_on", [False, True])
def test_nothing_is_sent_when_the_caller_s_commit_is_refused(shop: Shop, engine: Engine, ran: Ran, goes_on: bool) -> None:
    """A constraint that is checked at the COMMIT: it is no commit, though SQLAlchemy has told of one."""
    shop.database.execute(DEFERRED_CHECK)
    with engine.connect() as connection:
        with pytest.raises(IntegrityError), connection.begin():
            work_in(connection, ran, "x", "Emma")
            connection.execute(text("INSERT INTO loan VALUES (99)"))
        # SQLite's transaction is still open then, which SQLAlchemy does not know.
        if goes_on and shop.database.name != "sqlite":
            connection.execute(text("SELECT 1"))

    assert ran == ["end of x"]
    assert shop.titles() == []


def test_two_sessions_keep_their_order(connection: Connection, ran: Ran) -> None:
    """Each after its own commit's, when the caller has committed."""
    with connection.begin():
        work_in(connection, ran, "one", "Emma")
        work_in(connection, ran, "two", "Persuasion")
        assert ran == []
    connection.close()

    assert ran == ["one", "end of one", "two", "end of two"]
