"""SQLite: write-ahead log, busy time-out, foreign keys and BEGIN IMMEDIATE."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache, partial
from time import monotonic

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Integer,
    Table,
    bindparam,
    event,
    literal,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState
from sqlalchemy.util import await_only

from . import on_conflict
from .chord_rows import Tally, read_within
from .holding import Held
from .isolation import as_it_is, commits_each_statement
from .tables import NOT_TRANSLATED, Query, Rows, Values, from_now, publishable, takeable
from .transient import is_busy
from .trying_again import again

BUSY_TIMEOUT_SECONDS = 30

#: Seconds between two attempts to begin where SQLite does not wait by itself.
BUSY_SECONDS = 0.005

#: SQLITE_BUSY_SNAPSHOT
_SNAPSHOT = 517

_READ_ONLY = "celery_alchemy.query_only"
_READING = "celery_alchemy.reading"

#: A key of the info of a connection in a pool: it has a write-ahead log.
_WRITES_AHEAD = "celery_alchemy.writes_ahead"

#: The value of PRAGMA synchronous with which a COMMIT to a write-ahead log does not wait for the
#: disk.
_NORMAL = 1


def configure(engine: Engine) -> None:
    """Set up an engine for several processes that write.

    A transaction that starts deferred, reads and then writes fails with SQLITE_BUSY_SNAPSHOT when
    another has written in between, and no busy time-out waits that out; BEGIN IMMEDIATE takes the
    write lock first and waits for it. The sqlite3 module sends its own deferred BEGIN only before a
    write outside of a transaction, and there is none where each transaction is begun here. A
    connection in AUTOCOMMIT has the ``isolation_level`` None, as SQLAlchemy sets it, and begins
    nothing. Sources:
    https://www.sqlite.org/lang_transaction.html, https://www.sqlite.org/wal.html,
    https://docs.sqlalchemy.org/en/20/dialects/sqlite.html, on transactional DDL
    """
    file_based = engine.url.database not in (None, "", ":memory:")

    is_autocommit = getattr(engine.dialect, "_on_connect_isolation_level", None) == "AUTOCOMMIT"

    def on_connect(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        # Recipes have connect_args set it to None where no AUTOCOMMIT is meant.
        dbapi_connection.isolation_level = None if is_autocommit else ""
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_SECONDS * 1000}")
            cursor.execute("PRAGMA foreign_keys = ON")
            if file_based:
                cursor.execute("PRAGMA journal_mode = WAL")
                record.info[_WRITES_AHEAD] = True
        finally:
            cursor.close()

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "reset", _end_failed_commit)
    # Not by the engine's "begin" event, which makes every Connection build a dispatcher: 20 us a
    # transaction.
    vars(engine.dialect)["do_begin"] = _begin


def _end_failed_commit(
    dbapi_connection: DBAPIConnection, record: object, reset_state: PoolResetState
) -> None:
    # A COMMIT refused by a deferred constraint leaves the transaction open, write lock included,
    # and SQLAlchemy sends no ROLLBACK after a failed COMMIT. aiosqlite
    driver_connection = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    if not reset_state.terminate_only and driver_connection.in_transaction:
        dbapi_connection.rollback()


def _begin(dbapi_connection: DBAPIConnection) -> None:
    _begin_with(dbapi_connection, "BEGIN IMMEDIATE")


def _begin_reading(dbapi_connection: DBAPIConnection) -> None:
    _begin_with(dbapi_connection, "BEGIN DEFERRED")


def _begin_with(dbapi_connection: DBAPIConnection, statement: str) -> None:
    if dbapi_connection.isolation_level is None:
        return
    cursor, began = dbapi_connection.cursor(), monotonic()
    try:
        cursor.execute(statement)
    except sqlite3.OperationalError as exc:
        if not is_busy(exc):
            raise
        _begin_later(cursor, statement, began)
    finally:
        cursor.close()


def _begin_later(cursor: DBAPICursor, statement: str, began: float) -> None:
    """Begin a transaction again and again, until the connection's busy time-out is over.

    SQLite does not always wait by itself: a connection that also reads, or meets another one's end,
    is told at once. Nothing has begun then. One that reads what another has changed since is told
    so for as long as it reads. Sources: https://www.sqlite.org/c3ref/busy_handler.html,
    https://www.sqlite.org/rescode.html#busy_snapshot
    """
    cursor.execute("PRAGMA busy_timeout")
    [[milliseconds]] = cursor.fetchall()

    def seconds_until_next(exc: Exception) -> float | None:
        code = getattr(exc, "sqlite_errorcode", None)  # Python 3.11
        is_told = isinstance(exc, sqlite3.OperationalError) and is_busy(exc) and code != _SNAPSHOT
        return BUSY_SECONDS if is_told and monotonic() - began < milliseconds / 1000 else None

    again(partial(cursor.execute, statement), seconds_until_next, _rest_of(cursor))


def _rest_of(cursor: object) -> Callable[[float], object] | None:
    """Return how a driver's user waits: one of aiosqlite has an event loop, which goes on."""
    if isinstance(cursor, sqlite3.Cursor):
        return None
    return lambda seconds: await_only(asyncio.sleep(seconds))


def reading(engine: Engine) -> Engine:
    """Return the engine whose transactions take no lock for writing at their start.

    It has the same pool.

    They read what was committed before their first statement, while another connection writes.
    Source: https://www.sqlite.org/lang_transaction.html
    """
    if vars(engine.dialect).get("do_begin") is not _begin:
        # A user's own engine begins as it was told to.
        return engine
    found: Engine | None = vars(engine).get(_READING)
    if found is None:
        found = engine.execution_options()
        found.dialect = copy(engine.dialect)
        vars(found.dialect)["do_begin"] = _begin_reading
        # With the engine, for a session has one connection for each Engine object.
        vars(engine)[_READING] = found
    return found


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool
) -> Sequence[str]:
    """Return what makes the transaction read-only.

    A SQLite statement cannot be given a time limit.
    """
    if not read_only:
        return ()
    for name in ("commit", "rollback"):
        if not event.contains(connection.engine, name, _allow_writes):
            event.listen(connection.engine, name, _allow_writes)
    connection.info[_READ_ONLY] = True
    return ("PRAGMA query_only = ON",)


def _allow_writes(connection: Connection) -> None:
    # query_only belongs to the connection, not to the transaction: it must not follow it back into
    # the pool.
    if connection.info.pop(_READ_ONLY, False):
        connection.exec_driver_sql("PRAGMA query_only = OFF")


def hasten(connection: Connection) -> None:
    """Nothing: what a COMMIT waits for is set outside of transactions."""


def end_if_silent(connection: Connection, seconds: float) -> None:
    """Nothing: the lock of a process that stands still is that process's, until it is ended."""


def commit_itself(connection: PoolProxiedConnection) -> Callable[[], object] | None:
    """Have statements of a connection that was set up here not wait for the disk.

    Its driver is told to send no BEGIN, so that each is a transaction of its own. With a
    write-ahead log a COMMIT that does not wait may be forgotten when the power fails, but breaks
    nothing; the next one that waits has the disk keep both.
    Source: https://www.sqlite.org/pragma.html#pragma_synchronous
    """
    driver = connection.driver_connection
    if not connection.info.get(_WRITES_AHEAD) or not isinstance(driver, sqlite3.Connection):
        return None
    isolation_level, driver.isolation_level = driver.isolation_level, None
    [[level]] = driver.execute("PRAGMA synchronous").fetchall()
    if level > _NORMAL:
        driver.execute(f"PRAGMA synchronous = {_NORMAL}")

    def restore() -> None:
        driver.execute(f"PRAGMA synchronous = {level}")
        driver.isolation_level = isolation_level

    return restore


#: What a COMMIT waits for belongs to the connection.
hastened = as_it_is


def claim(
    connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int
) -> Rows:
    """Lease due rows in one statement, which is atomic by itself.

    There is one writer at a time, and no SKIP LOCKED.

    Source: https://www.sqlite.org/lang_returning.html
    """
    due = (
        select(table.c.id)
        .where(table.c.queue.is_(None), table.c.due_at <= from_now(0))
        .order_by(table.c.due_at)
        .limit(limit)
    )
    statement = (
        update(table)
        .where(table.c.id.in_(due.scalar_subquery()))
        .values(claim=claim, due_at=from_now(lease_seconds))
        .returning(*publishable(table))
    )
    return connection.execute(statement, execution_options=NOT_TRANSLATED).all()


def take(
    connection: Connection, table: Table, worker: str, queues: Sequence[str], limit: int
) -> Rows:
    """Take messages for a worker in one statement, atomic by itself.

    For each priority and queue an index scan of its own, begun only while there is room: SQLite
    reads the parts of a UNION ALL one after the other, and stops at the LIMIT. It takes 500 parts
    and, before 3.32, 999 parameters. Source: https://www.sqlite.org/limits.html
    """
    places = [(priority, queue) for priority in range(9, -1, -1) for queue in queues]
    if len(places) > _MOST_PARTS:
        due = _due_places(table, queues).limit(_MOST_PARTS)
        found = connection.execute(due, execution_options=NOT_TRANSLATED).all()
        places = [(row.priority, row.queue) for row in found]
    if not places:
        return []
    parameters: dict[str, object] = {"worker": worker, "room": limit}
    for number, (priority, queue) in enumerate(places):
        parameters[f"priority_{number}"], parameters[f"queue_{number}"] = priority, queue
    statement = _take_statement(table, len(places))
    return connection.execute(statement, parameters, execution_options=NOT_TRANSLATED).all()


#: Priorities with queues in one statement.
_MOST_PARTS = 400


@lru_cache(maxsize=32)
def _take_statement(table: Table, places: int) -> Executable:
    c, room = table.c, bindparam("room", type_=Integer())
    parts = [
        select(
            select(c.id)
            .where(
                c.queue == bindparam(f"queue_{n}"),
                c.priority == bindparam(f"priority_{n}"),
                c.due_at <= from_now(0),
            )
            .order_by(c.due_at)
            .limit(room)
            .subquery()
        )
        for n in range(places)
    ]
    due = select(union_all(*parts).subquery().c.id).limit(room)
    return (
        update(table)
        .where(c.id.in_(due.scalar_subquery()))
        .values(claim=bindparam("worker"), due_at=None, sends=c.sends + 1)
        .returning(*takeable(table))
    )


def is_any_due(table: Table, queues: Sequence[str]) -> ColumnElement[bool]:
    """Return whether a message of these queues is due: one entry of the index for each place."""
    return _due_places(table, queues).exists()


def _due_places(table: Table, queues: Sequence[str]) -> Query:
    """Return the priorities, 9 first, and queues with a message that is due."""
    priorities = union_all(
        *(select(literal(priority).label("priority")) for priority in range(9, -1, -1))
    ).subquery("priorities")
    names = union_all(*(select(literal(name).label("queue")) for name in queues)).subquery("names")
    c = table.c
    first = (
        select(c.due_at)
        .where(
            c.queue == names.c.queue,
            c.priority == priorities.c.priority,
            c.due_at.is_not(None),
        )
        .order_by(c.due_at)
        .limit(1)
        .scalar_subquery()
    )
    return (
        select(priorities.c.priority, names.c.queue)
        .select_from(priorities.join(names, true()))
        .where(first <= from_now(0))
        .order_by(priorities.c.priority.desc())
    )


def mark(connection: Connection) -> int | None:
    """Return how many rows the connection has changed since it was opened; no statement is sent."""
    driver: object = connection.connection.driver_connection
    changes: int | None = getattr(driver, "total_changes", None)
    return changes


def held(connection: Connection, mark: int | None) -> Held | None:
    """Compare the rows that the connection has changed with those of when the transaction began.

    Changed tables are not counted, and there is one lock for all rows.
    Source: https://www.sqlite.org/c3ref/total_changes.html
    """
    if mark is None:
        return None
    driver = connection.connection.driver_connection
    assert driver is not None
    return Held(writes=driver.total_changes != mark, locked=None)


keep_result: Callable[..., None] = partial(on_conflict.keep_result, insert)
add_unless_there: Callable[..., bool] = partial(on_conflict.add_unless_there, insert)
tally: Callable[..., Tally] = partial(on_conflict.tally, insert)


def sees_counted(connection: Connection) -> bool:
    """Tell whether the open transaction may count a part: there is one that writes at a time."""
    return not commits_each_statement(connection)


#: Whoever writes sees all that is committed.
read_counted = read_within


def read(connection: Connection, statement: Query) -> Values:
    """Read without a transaction.

    One would wait for the one that writes, and keep others from it.

    Values are as the driver gives them.
    """
    driver = connection.connection.driver_connection
    if driver is None or not hasattr(driver, "execute"):
        return connection.execute(statement, execution_options=NOT_TRANSLATED).all()
    compiled = statement.compile(
        dialect=connection.dialect, compile_kwargs={"render_postcompile": True}
    )
    values = [compiled.params[name] for name in compiled.positiontup or ()]
    try:
        found: Values = driver.execute(str(compiled), values).fetchall()
    except sqlite3.OperationalError as exc:
        raise OperationalError(str(compiled), values, exc) from exc
    return found
