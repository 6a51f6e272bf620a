"""Writes that no statement's text shows are asked of the database, before they are lost or committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from celery_alchemy import OnceCommitError, UncommittedChangesError, released
from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.conftest import MakeStand, make_stand
from tests.unit.shop import Book, Shop

__all__ = ["make_stand"]

Writes = Callable[[Session], object]

CREATE_FUNCTION = """
CREATE FUNCTION stock(named varchar) RETURNS void LANGUAGE sql
AS $$ INSERT INTO book (title) VALUES (named) $$
"""
TWO_STATEMENTS = "SELECT 1; INSERT INTO book (title) VALUES ('x')"


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


def cursor_of(session: Session) -> Any:
    """Return a cursor of the driver's own, which SQLAlchemy knows nothing of."""
    return session.connection().connection.cursor()


def insert_by_cursor(session: Session) -> None:
    """Write past SQLAlchemy."""
    cursor = cursor_of(session)
    cursor.execute("INSERT INTO book (title) VALUES ('x')")
    cursor.close()


async def insert_by_async_driver(session: AsyncSession) -> None:
    """Write past SQLAlchemy, which begins asyncpg's transaction with its first statement."""
    await session.execute(text("SELECT 1"))
    connection = await (await session.connection()).get_raw_connection()
    driver: Any = connection.driver_connection
    await driver.execute("INSERT INTO book (title) VALUES ('x')")


def copy(session: Session) -> None:
    """Write as a bulk load does."""
    with cursor_of(session) as cursor, cursor.copy("COPY book (title) FROM STDIN") as rows:
        rows.write_row(["x"])


ON_POSTGRESQL: dict[str, Writes] = {
    "driver cursor": insert_by_cursor,
    "COPY": copy,
    "function": lambda s: s.execute(text("SELECT stock('x')")),
    "function in a query": lambda s: s.execute(select(text("stock('x')"))),
    "EXPLAIN ANALYZE": lambda s: s.execute(text("EXPLAIN ANALYZE INSERT INTO book (title) VALUES ('x')")),
    "SELECT INTO": lambda s: s.execute(text("SELECT id, title INTO more FROM book")),
    "two statements": lambda s: s.connection().connection.cursor().execute(TWO_STATEMENTS),
    "two statements in text": lambda s: s.connection().exec_driver_sql(TWO_STATEMENTS),
    "from_statement": lambda s: s.scalars(
        select(Book).from_statement(text("INSERT INTO book (title) VALUES ('x') RETURNING *"))
    ).all(),
    "catalog": lambda s: cursor_of(s).execute("COMMENT ON TABLE book IS 'x'"),
}


@pytest.fixture
def with_function(shop: Shop) -> Shop:
    """A shop whose database has a function that writes."""
    shop.database.execute(CREATE_FUNCTION)
    return shop


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("kind", ON_POSTGRESQL)
def test_unseen_write_is_not_released(with_function: Shop, kind: str) -> None:
    """PostgreSQL is asked whether the transaction has an id, and nothing is committed."""
    shop, write = with_function, ON_POSTGRESQL[kind]

    @shop.task()
    def work(session: Session) -> None:
        write(session)
        with released(session):
            raise LookupError("the block must not run")

    with pytest.raises(UncommittedChangesError, match="uncommitted writes"):
        work()
    assert shop.titles() == []
    assert shop.checked_out() == 0


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("kind", ON_POSTGRESQL)
def test_unseen_write_of_a_foreign_session_is_not_released(with_function: Shop, kind: str) -> None:
    """The database knows it of a session that somebody else made too."""
    with sessionmaker(with_function.alchemy.engine)() as session:
        ON_POSTGRESQL[kind](session)
        with pytest.raises(UncommittedChangesError), released(session):
            raise LookupError


@pytest.mark.databases("sqlite")
def test_unseen_write_is_not_released_on_sqlite(shop: Shop) -> None:
    """The driver counts the rows that its connection has changed."""

    @shop.task()
    def work(session: Session) -> None:
        insert_by_cursor(session)
        with released(session):
            raise LookupError

    with pytest.raises(UncommittedChangesError, match="uncommitted writes"):
        work()
    assert shop.titles() == []


@pytest.mark.databases("sqlite")
def test_writes_of_an_earlier_transaction_do_not_count_on_sqlite(shop: Shop) -> None:
    """The count goes on for the life of a connection; what matters is where it was at the beginning."""

    @shop.task()
    def work(session: Session) -> int:
        insert_by_cursor(session)
        session.commit()
        session.scalars(select(Book)).all()
        with released(session):
            return shop.checked_out()

    assert work() == 0


@pytest.mark.databases("mariadb")
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1; INSERT INTO book (title) VALUES ('x')",
        "SELECT id INTO OUTFILE '/nowhere/x' FROM book",
        "/* c */ WITH a AS (SELECT 1) INSERT INTO book (title) SELECT 'x' FROM a",
    ],
)
def test_text_that_begins_like_a_read_is_read_to_its_end(shop: Shop, statement: str) -> None:
    """Where the database cannot be asked the text is all that there is."""

    @shop.task()
    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        with pytest.raises(Exception, match=r"syntax|x'|Unknown"):
            session.connection().exec_driver_sql(statement)
        with released(session):
            raise LookupError

    with pytest.raises(UncommittedChangesError):
        work()


@pytest.mark.databases("mariadb")
def test_select_from_an_insert_is_a_write(shop: Shop) -> None:
    """MariaDB has INSERT ... RETURNING, which an entity can be loaded from."""
    made = text("INSERT INTO book (title) VALUES ('x') RETURNING id, title")

    @shop.task()
    def work(session: Session) -> None:
        session.scalars(select(Book).from_statement(made)).all()
        with released(session):
            raise LookupError

    with pytest.raises(UncommittedChangesError):
        work()
    assert shop.titles() == []


READS = [
    "SELECT ';' AS a, 'INTO' AS b",
    "WITH a AS (SELECT 1 AS one) SELECT one FROM a",
    "SELECT 1 -- ; INSERT",
    "SELECT 1;",
    "/* UPDATE */ SELECT 1",
]


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize("statement", READS)
def test_reading_text_is_released(shop: Shop, statement: str) -> None:
    """Words in quotes and comments are none of the statement's."""

    @shop.task()
    def work(session: Session) -> int:
        session.execute(text(statement)).all()
        with released(session):
            return shop.checked_out()

    assert work() == 0


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_nothing_is_asked_unless_somebody_releases(shop: Shop) -> None:
    """A task that only reads sends its own statements and no other."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        sent.append(statement)

    @shop.task()
    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))

    event.listen(shop.alchemy.engine, "before_cursor_execute", note)
    work()
    event.remove(shop.alchemy.engine, "before_cursor_execute", note)

    assert sent == ["SELECT 1"]


@pytest.mark.databases("postgresql+psycopg", "postgresql+asyncpg", "sqlite+aiosqlite")
def test_unseen_write_of_an_async_task_is_not_released(shop: Shop) -> None:
    """The question is asked by the session's own driver, in its loop."""

    @shop.task()
    async def work(session: AsyncSession) -> None:
        await insert_by_async_driver(session)
        async with released(session):
            raise LookupError

    traced = shop.trace(work)

    assert isinstance(traced.value, UncommittedChangesError)
    assert shop.titles() == []


@pytest.mark.databases("postgresql+asyncpg")
def test_unseen_write_of_a_foreign_async_session_is_not_released(shop: Shop) -> None:
    """As that of a Session."""

    async def work() -> None:
        engine = create_async_engine(shop.database.url)
        async with async_sessionmaker(engine)() as session:
            await insert_by_async_driver(session)
            with pytest.raises(UncommittedChangesError):
                async with released(session):
                    raise LookupError
        await engine.dispose()

    asyncio.run(work())


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("way", ["commit", "released"])
def test_once_task_does_not_commit_unseen_writes(make_stand: MakeStand, way: str) -> None:
    """Two deliveries would leave two rows: it fails, and leaves none."""
    stand = make_stand()

    @stand.task(name="works", once=True)
    def works(session: Session) -> None:
        cursor = cursor_of(session)
        cursor.execute("INSERT INTO effect (name) VALUES ('x')")
        cursor.close()
        if way == "commit":
            session.commit()
        else:
            with released(session):
                pass
        raise LookupError

    works.delay()
    ended = stand.deliver(stand.sent()[0])

    expected = OnceCommitError if way == "commit" else UncommittedChangesError
    assert isinstance(ended.value, expected)
    assert stand.effects() == []


@pytest.mark.databases("sqlite", "postgresql")
def test_once_task_may_commit_what_it_has_only_read(make_stand: MakeStand) -> None:
    """A commit that ends a reading transaction does no harm."""
    stand = make_stand()

    @stand.task(name="works", once=True)
    def works(session: Session) -> str:
        session.execute(text("SELECT 1"))
        session.commit()
        return "done"

    works.delay()

    assert stand.deliver(stand.sent()[0]).value == "done"
