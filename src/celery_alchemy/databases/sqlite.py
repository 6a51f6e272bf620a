"""SQLite: write-ahead log, busy time-out, foreign keys and BEGIN IMMEDIATE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import Connection, Engine, Row, Table, event, select, update

from ..errors import ConfigurationError
from ..tables import from_now, publishable

BUSY_TIMEOUT_SECONDS = 30
_READ_ONLY = "celery_alchemy.query_only"


def configure(engine: Engine) -> None:
    """Set up an engine for several processes that write.

    A transaction that starts deferred, reads and then writes fails with SQLITE_BUSY_SNAPSHOT when another has written in between,
    and no busy time-out waits that out; BEGIN IMMEDIATE takes the write lock first and waits for it. The sqlite3 module would
    send its own deferred BEGIN before the first write, so it is told to send none.
    Sources: https://www.sqlite.org/lang_transaction.html, https://www.sqlite.org/wal.html,
    https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#serializable-isolation-savepoints-transactional-ddl
    """
    file_based = engine.url.database not in (None, "", ":memory:")

    def on_connect(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_SECONDS * 1000}")
            cursor.execute("PRAGMA foreign_keys = ON")
            if file_based:
                cursor.execute("PRAGMA journal_mode = WAL")
        finally:
            cursor.close()

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "reset", _end_failed_commit)
    # Not by the engine's "begin" event, which makes every Connection build a dispatcher: 20 us a transaction.
    cast("Any", engine.dialect).do_begin = _begin


def _end_failed_commit(dbapi_connection: Any, record: Any, reset_state: Any) -> None:
    # A COMMIT refused by a deferred constraint leaves the transaction open, write lock included, and SQLAlchemy sends no ROLLBACK
    # after a failed COMMIT.
    driver_connection = getattr(dbapi_connection, "driver_connection", dbapi_connection)  # aiosqlite
    if not reset_state.terminate_only and driver_connection.in_transaction:
        dbapi_connection.rollback()


def _begin(dbapi_connection: Any) -> None:
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute("BEGIN IMMEDIATE")
    finally:
        cursor.close()


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool, application_name: str | None = None
) -> Sequence[str]:
    """Return what makes the transaction read-only; a SQLite statement cannot be given a time limit."""
    if not read_only:
        return ()
    if connection.get_isolation_level() == "AUTOCOMMIT":
        raise ConfigurationError("read_only=True cannot be combined with AUTOCOMMIT on SQLite.", "Use one of the two.")
    for name in ("commit", "rollback"):
        if not event.contains(connection.engine, name, _allow_writes):
            event.listen(connection.engine, name, _allow_writes)
    connection.info[_READ_ONLY] = True
    return ("PRAGMA query_only = ON",)


def _allow_writes(connection: Connection) -> None:
    # query_only belongs to the connection, not to the transaction: it must not follow it back into the pool.
    if connection.info.pop(_READ_ONLY, False):
        connection.exec_driver_sql("PRAGMA query_only = OFF")


def claim(connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int) -> Sequence[Row[Any]]:
    """Lease due rows in one statement, atomic by itself: there is one writer at a time, and no SKIP LOCKED.

    Source: https://www.sqlite.org/lang_returning.html
    """
    due = select(table.c.id).where(table.c.due_at <= from_now(0)).order_by(table.c.due_at).limit(limit)
    statement = (
        update(table)
        .where(table.c.id.in_(due.scalar_subquery()))
        .values(claim=claim, due_at=from_now(lease_seconds))
        .returning(*publishable(table))
    )
    return connection.execute(statement).all()
