"""What really happens on each database, through each driver, is recognised: no error here is made up."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from celery_alchemy import is_transient
from celery_alchemy.databases.transient import is_lost_connection
from tests.services.databases import Database

SERVERS = (
    "postgresql+psycopg",
    "postgresql+psycopg2",
    "postgresql+asyncpg",
    "mariadb+pymysql",
    "mariadb+mysqldb",
    "mariadb+asyncmy",
    "mariadb+aiomysql",
)
POSTGRESQL = SERVERS[:3]
FILES = ("sqlite+pysqlite", "sqlite+aiosqlite")

Work = Callable[[Connection], object]


class Provoker:
    """Two connections of one driver to one database, and what they do to each other."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._url = make_url(database.url)
        database.execute("CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
        database.execute("INSERT INTO counter VALUES (1, 0), (2, 0)")

    def error_of(self, work: Work, *, url: Any = None, **options: Any) -> Exception:
        """Run work in a transaction on a connection of its own, and return what it raises."""
        try:
            if self._url.get_dialect().is_async and self._url.get_driver_name() != "psycopg":
                asyncio.run(self._run_async(work, url or self._url, options))
            else:
                self._run(create_engine(url or self._url, poolclass=NullPool, **options), work)
        except Exception as exc:  # noqa: BLE001 - which one it is, is the question.
            return exc
        raise AssertionError("no error")

    @staticmethod
    def _run(engine: Engine, work: Work) -> None:
        with engine.begin() as connection:
            work(connection)

    @staticmethod
    async def _run_async(work: Work, url: Any, options: dict[str, Any]) -> None:
        engine = create_async_engine(url, poolclass=NullPool, **options)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(work)
        finally:
            await engine.dispose()

    def elsewhere(self) -> Connection:
        """Return a connection of the test's own to the same database."""
        return self.database.engine.connect()


@pytest.fixture
def provoker(database: Database) -> Provoker:
    """A provoker on the test's database."""
    return Provoker(database)


def add(connection: Connection, row: int) -> None:
    """Change a row, and so lock it."""
    connection.execute(text("UPDATE counter SET value = value + 1 WHERE id = :id"), {"id": row})


@pytest.mark.databases(*SERVERS)
def test_deadlock_is_transient(provoker: Provoker) -> None:
    """Two transactions change two rows in opposite order; the server ends one of the two."""
    victim = victim_of_deadlock(provoker, nullcontext)

    assert is_transient(victim)
    assert not is_lost_connection(victim)


@pytest.mark.databases(*POSTGRESQL, "mariadb+pymysql", "mariadb+mysqldb")
def test_deadlock_in_a_savepoint_is_transient(provoker: Provoker) -> None:
    """MySQL has forgotten the SAVEPOINT by the time that SQLAlchemy goes back to it, and says only that.

    The async drivers of MySQL hide that a deadlock came before it.
    """
    assert is_transient(victim_of_deadlock(provoker, Connection.begin_nested))


def victim_of_deadlock(provoker: Provoker, block: Callable[..., AbstractContextManager[object]]) -> BaseException:
    """Return the error of the transaction that the server ends; its second change is made in a block."""
    both_hold_one = threading.Barrier(2, timeout=20)
    errors: list[BaseException | None] = []

    def transact(first: int, second: int) -> Work:
        def work(connection: Connection) -> None:
            add(connection, first)
            both_hold_one.wait()
            with block(connection):
                add(connection, second)

        return work

    def rival() -> None:
        try:
            errors.append(provoker.error_of(transact(2, 1)))
        except AssertionError:
            errors.append(None)

    thread = threading.Thread(target=rival)
    thread.start()
    try:
        errors.append(provoker.error_of(transact(1, 2)))
    except AssertionError:
        errors.append(None)
    thread.join(30)

    [victim] = [error for error in errors if error is not None]
    return victim


@pytest.mark.databases(*POSTGRESQL)
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_serialization_failure_is_transient(provoker: Provoker, level: str) -> None:
    """Another transaction changed the row after this one's snapshot."""

    def work(connection: Connection) -> None:
        connection.execute(text("SELECT value FROM counter")).all()
        provoker.database.execute("UPDATE counter SET value = 7")
        add(connection, 1)

    error = provoker.error_of(work, isolation_level=level)

    assert is_transient(error)
    assert not is_lost_connection(error)


@pytest.mark.databases(*POSTGRESQL)
def test_serialization_failure_at_commit_is_transient(provoker: Provoker) -> None:
    """Write skew: each of two transactions reads what the other changes; the second COMMIT is refused."""
    other = provoker.elsewhere().execution_options(isolation_level="SERIALIZABLE")

    def work(connection: Connection) -> None:
        connection.execute(text("SELECT sum(value) FROM counter")).all()
        other.execute(text("SELECT sum(value) FROM counter")).all()
        add(connection, 1)
        add(other, 2)
        other.commit()

    with other:
        error = provoker.error_of(work, isolation_level="SERIALIZABLE")

    assert is_transient(error)


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("way", ["lock time-out", "nowait"])
def test_lock_that_is_not_available_is_transient(provoker: Provoker, way: str) -> None:
    """Somebody else holds the row for longer than this one waits."""
    limit = "SET LOCAL lock_timeout = 10" if provoker.database.name == "postgresql" else "SET innodb_lock_wait_timeout = 1"

    def work(connection: Connection) -> None:
        if way == "nowait":
            connection.execute(text("SELECT * FROM counter WHERE id = 1 FOR UPDATE NOWAIT")).all()
        connection.execute(text(limit))
        add(connection, 1)

    with provoker.elsewhere() as other:
        add(other, 1)
        error = provoker.error_of(work)

    assert is_transient(error)
    assert not is_lost_connection(error)


@pytest.mark.databases(*SERVERS)
def test_killed_connection_is_transient(provoker: Provoker) -> None:
    """The server cuts the connection between two statements: a restart, a failover, an administrator."""

    def work(connection: Connection) -> None:
        add(connection, 1)
        assert provoker.database.disconnect_others() > 0
        add(connection, 2)

    error = provoker.error_of(work)

    assert is_transient(error)
    assert is_lost_connection(error)


@pytest.mark.databases(*SERVERS)
def test_connection_killed_before_the_commit_is_transient(provoker: Provoker) -> None:
    """It is COMMIT that finds the connection gone."""

    def work(connection: Connection) -> None:
        add(connection, 1)
        assert provoker.database.disconnect_others() > 0

    error = provoker.error_of(work)

    assert is_transient(error)
    assert is_lost_connection(error)


@pytest.mark.databases(*SERVERS)
def test_server_that_does_not_answer_is_transient(provoker: Provoker) -> None:
    """Nobody listens: a restart takes a moment."""
    error = provoker.error_of(lambda connection: None, url=make_url(provoker.database.url).set(port=1))

    assert is_transient(error)
    assert is_lost_connection(error)


@pytest.mark.databases(*POSTGRESQL)
def test_server_without_a_free_connection_is_transient(provoker: Provoker) -> None:
    """It says that there are too many; soon there will be fewer."""
    role = f"celery_alchemy_test_{secrets.token_hex(4)}"
    provoker.database.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    try:
        error = provoker.error_of(lambda connection: None, url=make_url(provoker.database.url).set(username=role))
    finally:
        provoker.database.execute(f"DROP ROLE {role}")

    assert "too many connections" in str(error)
    assert is_transient(error)


@pytest.mark.databases(*SERVERS)
def test_database_that_does_not_exist_is_not_transient(provoker: Provoker) -> None:
    """The server answers that there is none of that name, and will answer so again."""
    error = provoker.error_of(lambda connection: None, url=make_url(provoker.database.url).set(database="no_such"))

    assert not is_transient(error)


@pytest.mark.databases(*FILES)
def test_busy_file_is_transient(provoker: Provoker) -> None:
    """Another connection writes for longer than this one waits."""
    with provoker.elsewhere() as other:
        add(other, 1)
        error = provoker.error_of(lambda connection: add(connection, 2), connect_args={"timeout": 0})

    assert is_transient(error)
    assert not is_lost_connection(error)


@pytest.mark.databases(*FILES)
def test_snapshot_that_cannot_be_written_is_transient(provoker: Provoker) -> None:
    """A transaction that read, then writes when another has written in between (SQLITE_BUSY_SNAPSHOT)."""
    provoker.database.rows("PRAGMA journal_mode = WAL")

    def work(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")
        connection.execute(text("SELECT value FROM counter")).all()
        provoker.database.execute("UPDATE counter SET value = 7")
        add(connection, 1)

    assert is_transient(provoker.error_of(work))


@pytest.mark.databases(*SERVERS, *FILES)
@pytest.mark.parametrize(
    "statement",
    ["INSERT INTO counter VALUES (1, 0)", "INSERT INTO counter VALUES (3, NULL)", "SELECT * FROM no_such", "SELEC"],
    ids=["duplicate", "null", "no such table", "syntax"],
)
def test_error_that_stays_is_not_transient(provoker: Provoker, statement: str) -> None:
    """Running it again would fail again."""
    assert not is_transient(provoker.error_of(lambda connection: connection.execute(text(statement))))


@pytest.mark.databases(*SERVERS)
def test_statement_time_out_is_not_transient(provoker: Provoker) -> None:
    """A slow statement is slow the next time too."""
    is_postgresql = provoker.database.name == "postgresql"
    limit = "SET LOCAL statement_timeout = 20" if is_postgresql else "SET max_statement_time = 0.02"
    # MariaDB's sleep() is interrupted without an error.
    columns = "information_schema.columns"
    slow = "SELECT pg_sleep(20)" if is_postgresql else f"SELECT count(*) FROM {columns} a, {columns} b, {columns} c"

    def work(connection: Connection) -> None:
        connection.execute(text(limit))
        connection.execute(text(slow))

    assert not is_transient(provoker.error_of(work))
