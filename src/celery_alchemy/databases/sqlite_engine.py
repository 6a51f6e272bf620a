"""How an engine on SQLite is set up: write-ahead log, busy time-out, foreign keys, its BEGIN."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from copy import copy
from functools import partial
from time import monotonic
from typing import Any, cast

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState
from sqlalchemy.util import await_only

from .transient import is_busy
from .trying_again import again

BUSY_TIMEOUT_SECONDS = 30

#: Seconds between two attempts to begin: a tenth of what was waited, but not less and not more.
BUSY_SECONDS = 0.0005
BUSY_MAX_SECONDS = 0.002

#: The most where many threads of a process wait: as long as SQLite itself.
BUSY_SHARED_SECONDS = 0.1

#: The threads of this process that wait for a write lock, one object each.
_waiting: set[object] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_waiting.clear)

#: SQLITE_BUSY_SNAPSHOT
_SNAPSHOT = 517

_READING = "celery_alchemy.reading"

#: Keys of the info of a connection in a pool: it has a write-ahead log; the busy time-out that it
#: has, but for the moment in which it begins.
WRITES_AHEAD = "celery_alchemy.writes_ahead"
_BUSY_TIMEOUT = "celery_alchemy.busy_timeout"


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
                record.info[WRITES_AHEAD] = True
        finally:
            cursor.close()

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "reset", _at_return)
    # Not by the engine's "begin" event, which makes every Connection build a dispatcher: 20 us a
    # transaction.
    vars(engine.dialect)["do_begin"] = _begin


def _at_return(
    dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry, reset_state: PoolResetState
) -> None:
    """Give a connection back to its pool as it came from there."""
    if reset_state.terminate_only:
        return
    # A COMMIT refused by a deferred constraint leaves the transaction open, write lock included,
    # and SQLAlchemy sends no ROLLBACK after a failed COMMIT. aiosqlite
    driver_connection = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    if driver_connection.in_transaction:
        dbapi_connection.rollback()
    if _BUSY_TIMEOUT in record.info:
        cursor = dbapi_connection.cursor()
        _wait_again(cursor, record.info)
        cursor.close()


def _begin(connection: DBAPIConnection) -> None:
    if connection.isolation_level is None:
        return
    cursor = connection.cursor()
    try:
        if isinstance(cursor, sqlite3.Cursor):
            _begin_in_turn(cursor, cast("PoolProxiedConnection", connection).info)
        else:
            # Each PRAGMA would be another trip to aiosqlite's thread.
            _begin_with(cursor, "BEGIN IMMEDIATE")
    finally:
        cursor.close()


def _begin_in_turn(cursor: DBAPICursor, info: dict[Any, Any]) -> None:
    """Begin with the write lock, and ask for it so often that the gap between two writers is met.

    SQLite itself asks again after up to 100 ms: a process that wrote on and on, with pauses of some
    milliseconds, kept others from beginning for seconds. Asked each 2 ms it is about one of that
    process's transactions; that costs each transaction 5 us. A signal may strike between the
    statements: the time-out that the connection had before is kept in its info.

    Source: sqliteDefaultBusyCallback in https://sqlite.org/src/file?name=src/main.c
    """
    milliseconds = info.get(_BUSY_TIMEOUT)
    if milliseconds is None:
        milliseconds = _busy_timeout(cursor)
    info[_BUSY_TIMEOUT] = milliseconds
    try:
        cursor.execute("PRAGMA busy_timeout = 0")
        _begin_with(cursor, "BEGIN IMMEDIATE", milliseconds)
    finally:
        _wait_again(cursor, info)


def _wait_again(cursor: DBAPICursor, info: dict[Any, Any]) -> None:
    """Have a connection wait for a lock as long as it did before."""
    milliseconds = info.get(_BUSY_TIMEOUT)
    if milliseconds is not None:
        cursor.execute(f"PRAGMA busy_timeout = {milliseconds}")
        info.pop(_BUSY_TIMEOUT, None)


def _begin_reading(connection: DBAPIConnection) -> None:
    if connection.isolation_level is None:
        return
    cursor = connection.cursor()
    try:
        _begin_with(cursor, "BEGIN DEFERRED")
    finally:
        cursor.close()


def _begin_with(cursor: DBAPICursor, statement: str, milliseconds: int | None = None) -> None:
    """Begin a transaction, again and again until the connection's busy time-out is over.

    SQLite does not always wait by itself: a connection that also reads, or meets another one's end,
    is told at once. Nothing has begun then. One that reads what another has changed since is told
    so for as long as it reads. Sources: https://www.sqlite.org/c3ref/busy_handler.html,
    https://www.sqlite.org/rescode.html#busy_snapshot

    Args:
        cursor: The connection's.
        statement: What begins.
        milliseconds: The time-out; None for the one that the connection has.
    """
    began = monotonic()
    try:
        cursor.execute(statement)
    except sqlite3.OperationalError as exc:
        if not is_busy(exc):
            raise
        timeout = _busy_timeout(cursor) if milliseconds is None else milliseconds
        if monotonic() - began >= timeout / 1000:
            raise
    else:
        return

    def seconds_until_next(exc: Exception) -> float | None:
        code = getattr(exc, "sqlite_errorcode", None)  # Python 3.11
        is_told = isinstance(exc, sqlite3.OperationalError) and is_busy(exc) and code != _SNAPSHOT
        waited = monotonic() - began
        if not is_told or waited >= timeout / 1000:
            return None
        # All waiting threads of the process together ask as often as one would.
        seconds = min(max(waited / 10, BUSY_SECONDS), BUSY_MAX_SECONDS)
        return min(seconds * len(_waiting), BUSY_SHARED_SECONDS)

    waiter = object()
    _waiting.add(waiter)
    try:
        again(partial(cursor.execute, statement), seconds_until_next, _rest_of(cursor))
    finally:
        _waiting.discard(waiter)


def _busy_timeout(cursor: DBAPICursor) -> int:
    """Return a connection's busy time-out, in milliseconds."""
    cursor.execute("PRAGMA busy_timeout")
    [[milliseconds]] = cursor.fetchall()
    return int(milliseconds)


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
