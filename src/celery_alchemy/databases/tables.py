"""The library's own tables, and the database's clock in which their times are written.

Underneath the outbox, the relay and ``once``. One table holds messages on their way, tasks that are
owed, completed and dead: see docs/decisions for the measurement. A second one holds what the steps
of unfinished ``once`` tasks have returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import (
    Boolean,
    ClauseElement,
    Column,
    ColumnElement,
    CursorResult,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    SmallInteger,
    String,
    Table,
    and_,
    null,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import visitors
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import ExternallyTraversible
from sqlalchemy.types import NullType, TypeEngine

from .chord_tables import build_chords
from .column_types import BLOB, ID, ID_MAX_LENGTH, QUEUE, TEXT, TIME
from .queue_tables import build_queue_tables
from .result_table import build_results

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ID_MAX_LENGTH",
    "NOT_TRANSLATED",
    "AnyColumn",
    "Cursor",
    "Found",
    "Parameters",
    "Query",
    "Raw",
    "Rows",
    "Values",
    "build_outbox",
    "build_steps",
    "from_now",
    "metadata",
    "moved",
    "outbox",
    "outbox_in",
    "publishable",
    "steps",
    "takeable",
]

if TYPE_CHECKING:
    # Of any number of columns, as SQLAlchemy 2.1 has it; at run time their number says nothing.
    Query = Select[Unpack[tuple[Any, ...]]]
    Found = Row[Unpack[tuple[Any, ...]]]
    Cursor = CursorResult[Unpack[tuple[Any, ...]]]
else:
    Query = Select
    Found = Row
    Cursor = CursorResult

#: What a query has found.
Rows = Sequence[Found]

#: From when on a worker looks, for priorities and queues.
Since = Mapping[tuple[int, str], datetime]

#: One column of a query; of which type is not said.
AnyColumn = ColumnElement[Any]

#: A row of which only the place of each value is known, and several.
Raw = Sequence[Any]
Values = Sequence[Raw]

#: What a statement is executed with, once or for each of several.
Parameters = Mapping[str, object] | Sequence[Mapping[str, object]] | None

_Clause = TypeVar("_Clause", bound=ClauseElement)


def build_outbox(
    metadata: MetaData, name: str = "celery_outbox", schema: str | None = None
) -> Table:
    """Return the table, made in a MetaData.

    Its columns, in the order in which a row lives:

    - ``id``: the ``once`` key of the task (its task id, or its name and the user's key), or a
      unique id of the message.
    - ``task_id``: Celery's id of the task; NULL for a message that is no task.
    - ``task_name``: for people and for ``status``.
    - ``once``: the row stays after its message was published, until the task's own transaction
      completes it.
    - ``redeliver_seconds``: how long after a publish or a start an owed task is sent again.
    - ``max_deliveries``: how many starts without an end make it dead.
    - ``body``, ``envelope``: the finished message (``messages/message.py``).
    - ``created_at``: when the row was written.
    - ``due_at``: when the relay takes it; NULL for a row that nothing is to be done with. A lease
      is a ``due_at`` in the future.
    - ``claim``: the fencing token of the process that holds the lease; NULL if none does.
    - ``sends``: how often the message was published.
    - ``failures``: how often publishing failed in a row.
    - ``deliveries``: starts of the task that have not ended.
    - ``error``: what went wrong last.
    - ``completed_at``, ``result``: when the task's transaction completed it, and its result.
    - ``died_at``: when it was set aside.
    - ``queue``: the queue that it waits in, where the database is the broker: ``due_at`` is when a
      worker may take it then, and ``claim`` the worker that has it. NULL for a message that is on
      its way to another broker.
    - ``priority``: 0 to 9, of which 9 is taken first.
    """
    table = Table(
        name,
        metadata,
        Column("id", ID, primary_key=True),
        Column("task_id", ID),
        Column("task_name", ID),
        Column("once", Boolean, nullable=False),
        Column("redeliver_seconds", Integer),
        Column("max_deliveries", Integer),
        Column("body", BLOB),
        Column("envelope", TEXT),
        Column("created_at", TIME, nullable=False),
        Column("due_at", TIME),
        Column("claim", String(36)),
        Column("sends", Integer, nullable=False),
        Column("failures", Integer, nullable=False),
        Column("deliveries", Integer, nullable=False),
        Column("error", TEXT),
        Column("completed_at", TIME),
        Column("result", TEXT),
        Column("died_at", TIME),
        Column("queue", QUEUE),
        Column("priority", SmallInteger),
        schema=schema,
    )
    _index(table)
    build_queue_tables(metadata, schema)
    build_results(metadata, schema)
    build_chords(metadata, schema)
    return table


def _index(table: Table) -> None:
    """Give the table its indexes.

    They are partial where the database has such: completed rows are kept for days and must cost the
    relay nothing. MySQL keeps NULLs at one end of the index, which a range scan never reads.
    """
    c = table.c
    for columns, where in (
        ((c.due_at,), and_(c.due_at.is_not(None), c.queue.is_(None))),
        ((c.completed_at,), c.completed_at.is_not(None)),
        ((c.died_at,), c.died_at.is_not(None)),
        ((c.queue, c.priority, c.due_at), and_(c.queue.is_not(None), c.due_at.is_not(None))),
        ((c.claim,), and_(c.queue.is_not(None), c.claim.is_not(None))),
    ):
        Index(
            f"{table.name}_{columns[0].name}", *columns, postgresql_where=where, sqlite_where=where
        )


def build_steps(metadata: MetaData, schema: str | None = None) -> Table:
    """Return the table of recorded steps, made in a MetaData.

    Its columns:

    ========== ==========================================================================
    id         of the row of the task in the outbox's table
    name       the step's, unique within the task
    position   grows with each step of a task: later ones were committed later
    value      what the step returned, as JSON
    created_at when the step was committed
    ========== ==========================================================================

    No foreign key: each message that is handed over would have its row's steps looked for.
    """
    return Table(
        "celery_steps",
        metadata,
        Column("id", ID, primary_key=True),
        Column("name", ID, primary_key=True),
        Column("position", Integer, nullable=False),
        Column("value", TEXT, nullable=False),
        Column("created_at", TIME, nullable=False),
        schema=schema,
    )


def publishable(table: Table) -> Sequence[AnyColumn]:
    """Return what the relay needs of a row to publish it.

    The other half of the columns would be read for nothing.

    ``created_at``, which rows are sorted by, as the driver gives it: SQLite keeps whatever is
    written into a column, and one row that cannot be converted would fail all of its batch.
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


def takeable(
    table: Table, *, before_update: bool = False, was_due_at: AnyColumn | None = None
) -> Sequence[AnyColumn]:
    """Return what a worker needs of a row that it takes; times as the driver gives them.

    Args:
        table: The table.
        before_update: The row is read first and counted as taken afterwards.
        was_due_at: When it was due, where it matters from when on a worker looks.
    """
    c = table.c
    return (
        c.id,
        c.queue,
        c.priority,
        c.once,
        (c.sends + 1).label("sends") if before_update else c.sends,
        c.failures,
        c.body,
        c.envelope,
        type_coerce(c.created_at, NullType()).label("created_at"),
        type_coerce(from_now(0), NullType()).label("taken_at"),
        type_coerce(null() if was_due_at is None else was_due_at, NullType()).label("was_due_at"),
    )


metadata: MetaData = MetaData()
outbox: Table = build_outbox(metadata)
steps: Table = build_steps(metadata)

#: Execution options of every statement of the library: a connection's ``schema_translate_map`` is
#: the user's, for the user's tables. Given with the execution, because a connection's option wins
#: over a statement's.
NOT_TRANSLATED: dict[str, object] = {"schema_translate_map": None}


@cache
def outbox_in(schema: str | None) -> Table:
    """Return the outbox's table in a schema, in a MetaData with all of them.

    Without a schema, ``outbox`` itself.
    """
    if schema is None:
        return outbox
    there = MetaData()
    build_steps(there, schema)
    return build_outbox(there, schema=schema)


def _moved(statement: _Clause, schema: str | None) -> _Clause:
    """Return one of the library's constant statements for the tables in a schema.

    Made once for each schema. A ``schema_translate_map`` of our own would do the same at each
    execution, with a regular expression over the statement's text.

    Args:
        statement: Of ``outbox`` and ``steps``; kept for ever.
        schema: The schema; None leaves the statement as it is.
    """
    if schema is None:
        return statement
    tables = {
        table: outbox_in(schema).metadata.tables[f"{schema}.{table.name}"]
        for table in (outbox, steps)
    }

    def replace(element: ExternallyTraversible, **kw: object) -> ExternallyTraversible | None:
        if isinstance(element, Table):
            return tables.get(element)
        if not isinstance(element, Column):
            return None
        table = tables.get(element.table)
        return None if table is None else table.c[element.key]

    return cast("_Clause", visitors.replacement_traverse(statement, {}, replace))


if TYPE_CHECKING:
    # A cached function has lost its parameters' types.
    moved = _moved
else:
    moved = cache(_moved)


class from_now(FunctionElement[datetime]):  # noqa: N801 - an SQL function.
    """The database's clock plus some seconds: ``from_now(15.0)``.

    The clock, not the start of the transaction: a lease that counted from the beginning of a long
    transaction would be over at its commit. Never the application's clock, which differs between
    machines.
    """

    type: TypeEngine[datetime] = TIME
    inherit_cache: bool | None = True

    def __init__(self, seconds: object = 0) -> None:
        super().__init__(seconds)


def _seconds(element: from_now, compiler: SQLCompiler, **kw: object) -> str:
    return compiler.process(next(iter(element.clauses)), **kw)


@compiles(from_now, "postgresql")
def _postgresql(element: from_now, compiler: SQLCompiler, **kw: object) -> str:
    # https://www.postgresql.org/docs/current/functions-datetime.html#FUNCTIONS-DATETIME-CURRENT
    seconds = f"CAST({_seconds(element, compiler, **kw)} AS double precision)"
    return f"(clock_timestamp() + {seconds} * interval '1 second')"


@compiles(from_now, "mysql")
@compiles(from_now, "mariadb")
def _mysql(element: from_now, compiler: SQLCompiler, **kw: object) -> str:
    # https://dev.mysql.com/doc/refman/8.0/en/date-and-time-functions.html#function_utc-timestamp
    return f"(UTC_TIMESTAMP(6) + INTERVAL {_seconds(element, compiler, **kw)} SECOND)"


@compiles(from_now, "sqlite")
def _sqlite(element: from_now, compiler: SQLCompiler, **kw: object) -> str:
    # https://www.sqlite.org/lang_datefunc.html: %f gives milliseconds; the zeros make it the text
    # SQLAlchemy stores.
    seconds = f"(CAST({_seconds(element, compiler, **kw)} AS TEXT) || ' seconds')"
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {seconds})"
