"""The library's own table, and the database's clock in which its times are written.

Underneath the outbox, the relay and ``once``. One table holds messages on their way, tasks that are owed, completed and dead: see
docs/decisions for the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    type_coerce,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType, TypeEngine

__all__ = ["ID_MAX_LENGTH", "build_outbox", "from_now", "metadata", "outbox", "publishable"]

ID_MAX_LENGTH = 255

_ID = String(ID_MAX_LENGTH).with_variant(mysql.VARCHAR(ID_MAX_LENGTH, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")
_TIME = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_BLOB = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
_TEXT = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def build_outbox(metadata: MetaData, name: str = "celery_outbox") -> Table:
    """Return the table, made in a MetaData.

    Its columns, in the order in which a row lives:

    ========== ===================================================================================================
    id         ``once`` key of the task (its task id, or its name and the user's key), or a unique id of the message
    task_id    Celery's id of the task; NULL for a message that is no task
    task_name  for people and for ``status``
    once       the row stays after its message was published, until the task's own transaction completes it
    redeliver_seconds  how long after a publish or a start an owed task is sent again
    max_deliveries     how many starts without an end make it dead
    body, envelope     the finished message (``message.py``)
    created_at when the row was written
    due_at     when the relay takes it: NULL for a row that nothing is to be done with. A lease is a due_at in the future
    claim      the fencing token of the process that holds the lease; NULL if none does
    sends      how often the message was published
    failures   how often publishing failed in a row
    deliveries starts of the task that have not ended
    error      what went wrong last
    completed_at, result  when the task's transaction completed it, and its result
    died_at    when it was set aside
    ========== ===================================================================================================
    """
    table = Table(
        name,
        metadata,
        Column("id", _ID, primary_key=True),
        Column("task_id", _ID),
        Column("task_name", String(255)),
        Column("once", Boolean, nullable=False),
        Column("redeliver_seconds", Integer),
        Column("max_deliveries", Integer),
        Column("body", _BLOB),
        Column("envelope", _TEXT),
        Column("created_at", _TIME, nullable=False),
        Column("due_at", _TIME),
        Column("claim", String(36)),
        Column("sends", Integer, nullable=False),
        Column("failures", Integer, nullable=False),
        Column("deliveries", Integer, nullable=False),
        Column("error", _TEXT),
        Column("completed_at", _TIME),
        Column("result", _TEXT),
        Column("died_at", _TIME),
    )
    # Partial where the database has partial indexes: completed rows are kept for days and must cost the relay nothing. MySQL
    # keeps NULLs at one end of the index, which a range scan on due_at never reads.
    for column in (table.c.due_at, table.c.completed_at, table.c.died_at):
        where = column.is_not(None)
        Index(f"{name}_{column.name}", column, postgresql_where=where, sqlite_where=where)
    return table


def publishable(table: Table) -> Sequence[ColumnElement[Any]]:
    """Return what the relay needs of a row to publish it; the other half of the columns would be read for nothing.

    ``created_at``, which rows are sorted by, as the driver gives it: SQLite keeps whatever is written into a column, and one row
    that cannot be converted would fail all of its batch.
    """
    columns = table.c
    return (
        columns.id,
        columns.once,
        columns.redeliver_seconds,
        columns.body,
        columns.envelope,
        type_coerce(columns.created_at, NullType()).label("created_at"),
        columns.sends,
        columns.failures,
    )


metadata: MetaData = MetaData()
outbox: Table = build_outbox(metadata)


class from_now(FunctionElement[Any]):  # noqa: N801 - an SQL function.
    """The database's clock plus some seconds: ``from_now(15.0)``.

    The clock, not the start of the transaction: a lease that counted from the beginning of a long transaction would be over at
    its commit. Never the application's clock, which differs between machines.
    """

    type: TypeEngine[Any] = _TIME
    inherit_cache: bool | None = True

    def __init__(self, seconds: Any = 0) -> None:
        super().__init__(seconds)


def _seconds(element: from_now, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(next(iter(element.clauses)), **kw))


@compiles(from_now, "postgresql")
def _postgresql(element: from_now, compiler: Any, **kw: Any) -> str:
    # https://www.postgresql.org/docs/current/functions-datetime.html#FUNCTIONS-DATETIME-CURRENT
    return f"(clock_timestamp() + CAST({_seconds(element, compiler, **kw)} AS double precision) * interval '1 second')"


@compiles(from_now, "mysql")
@compiles(from_now, "mariadb")
def _mysql(element: from_now, compiler: Any, **kw: Any) -> str:
    # https://dev.mysql.com/doc/refman/8.0/en/date-and-time-functions.html#function_utc-timestamp
    return f"(UTC_TIMESTAMP(6) + INTERVAL {_seconds(element, compiler, **kw)} SECOND)"


@compiles(from_now, "sqlite")
def _sqlite(element: from_now, compiler: Any, **kw: Any) -> str:
    # https://www.sqlite.org/lang_datefunc.html: %f gives milliseconds; the zeros make it the text SQLAlchemy stores.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', (CAST({_seconds(element, compiler, **kw)} AS TEXT) || ' seconds'))"
