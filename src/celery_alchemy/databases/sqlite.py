"""SQLite: what is particular to its statements; `sqlite_engine.py` sets up an engine."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Insert,
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
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import PoolProxiedConnection

from . import on_conflict, sqlite_engine
from .chord_rows import Tally, read_within
from .holding import Held
from .isolation import as_it_is, commits_each_statement
from .sqlite_engine import WRITES_AHEAD
from .tables import NOT_TRANSLATED, Query, Rows, Since, Values, from_now, publishable, takeable

_READ_ONLY = "celery_alchemy.query_only"

#: The value of PRAGMA synchronous with which a COMMIT to a write-ahead log does not wait for the
#: disk.
_NORMAL = 1


def configure(engine: Engine) -> None:
    """Set up an engine for several processes that write; see `sqlite_engine.py`."""
    sqlite_engine.configure(engine)


def reading(engine: Engine) -> Engine:
    """Return the engine whose transactions take no lock for writing at their start."""
    return sqlite_engine.reading(engine)


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
    if not connection.info.get(WRITES_AHEAD) or not isinstance(driver, sqlite3.Connection):
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
    connection: Connection,
    table: Table,
    worker: str,
    queues: Sequence[str],
    limit: int,
    since: Since,
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
insert_or_change: Callable[..., Insert] = partial(on_conflict.insert_or_change, insert)
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
