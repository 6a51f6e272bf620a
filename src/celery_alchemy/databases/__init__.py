"""The statements and settings of each database: one module each, the same functions in each.

Underneath everything; imports nothing of the package but its sibling modules and ``errors``. Each
module has

``configure(engine)``
    what an engine made by Alchemy needs on this database;
``reading(engine)``
    the engine for transactions that only read;
``begin_statements(connection, timeout_seconds, read_only)``
    what a task's transaction sends first;
``hasten(connection)``
    lets the COMMIT of the open transaction not wait for the disk, where it can be told so;
``commit_itself(connection)``
    has each statement of a pool's connection be a transaction of its own, at no round trip;
    returns what takes that back, None where there is no such way;
``hastened(statement)``
    a statement whose own COMMIT does not wait for the disk, where one can be told so;
``end_if_silent(connection, seconds)``
    how the server ends the open transaction of a process that stands still;
``claim(connection, table, claim, lease_seconds, limit)``
    how a relay takes due rows of the outbox for itself;
``take(connection, table, worker, queues, limit, since)``
    how a worker takes due messages out of queues, of priority 9 first, then the oldest; ``since``
    is from when on to look for priorities and queues, where the database keeps what is gone in its
    indexes: there, and only there, a row tells in ``was_due_at`` when it was due;
``is_any_due(table, queues)``
    whether a worker would find any, as an expression;
``mark(connection)``
    a number, read when a transaction begins, that ``held()`` compares with a later one; None where
    that needs none, until the first rollback to a SAVEPOINT;
``held(connection, mark)``
    what the open transaction of a connection has changed or locked, asked of the database; None
    where it cannot say;
``keep_result(connection, table, values)``
    how the result of a task is written, whether its row is there or not; see ``result_rows.py``;
``insert_or_change(table, values, changed, where)``
    an INSERT that changes the row of its ``id`` instead if there is one and it meets a condition,
    and else leaves it; None where the database has no such statement, and its transactions go on
    after an INSERT that has failed;
``add_unless_there(connection, table, values)``
    how a part of a chord is noted, once;
``tally(connection, table, values)``
    how the parts of a chord are counted, one transaction after the other; see ``chord_rows.py``;
``sees_counted(connection)``
    whether the open transaction may count one;
``read_counted(connection, statement)``
    how the parts are read by whoever has counted the last one;
``read(connection, statement)``
    how results are read by whoever waits for them: behind no lock, on a connection without a
    transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from sqlalchemy import ColumnElement, Connection, Engine, Insert, Table
from sqlalchemy.pool import PoolProxiedConnection

from . import generic, mysql, postgresql, sqlite
from .chord_rows import Tally
from .holding import Held
from .isolation import LoneStatement, commits_each_statement
from .tables import Query, Rows, Since, Values

__all__ = [
    "Database",
    "Held",
    "LoneStatement",
    "Tally",
    "commits_each_statement",
    "database_of",
    "is_known",
]


class Database(Protocol):
    """What each module of this package offers: it has these functions, there is no class.

    Beside it a database needs its clock in SQL, ``tables.from_now``.
    """

    @property
    def mark(self) -> Callable[[Connection], int | None] | None: ...

    def configure(self, engine: Engine) -> None: ...

    def reading(self, engine: Engine) -> Engine: ...

    def begin_statements(
        self, connection: Connection, timeout_seconds: float | None, read_only: bool
    ) -> Sequence[str]: ...

    def hasten(self, connection: Connection) -> None: ...

    def end_if_silent(self, connection: Connection, seconds: float) -> None: ...

    def commit_itself(self, connection: PoolProxiedConnection) -> Callable[[], object] | None: ...

    def hastened(self, statement: LoneStatement) -> LoneStatement: ...

    def claim(
        self, connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int
    ) -> Rows: ...

    def take(
        self,
        connection: Connection,
        table: Table,
        worker: str,
        queues: Sequence[str],
        limit: int,
        since: Since,
    ) -> Rows: ...

    def is_any_due(self, table: Table, queues: Sequence[str]) -> ColumnElement[bool]: ...

    def held(self, connection: Connection, mark: int | None) -> Held | None: ...

    def keep_result(
        self, connection: Connection, table: Table, values: dict[str, object]
    ) -> None: ...

    def insert_or_change(
        self,
        table: Table,
        values: Mapping[str, object],
        changed: Mapping[str, object],
        where: ColumnElement[bool],
    ) -> Insert | None: ...

    def add_unless_there(
        self, connection: Connection, table: Table, values: dict[str, object]
    ) -> bool: ...

    def tally(self, connection: Connection, table: Table, values: dict[str, object]) -> Tally: ...

    def sees_counted(self, connection: Connection) -> bool: ...

    def read_counted(self, connection: Connection, statement: Query) -> Rows: ...

    def read(self, connection: Connection, statement: Query) -> Values: ...


_BY_DIALECT: dict[str, Database] = {
    "postgresql": postgresql,
    "mysql": mysql,
    "mariadb": mysql,
    "sqlite": sqlite,
}
_GENERIC: Database = generic


def is_known(dialect_name: str) -> bool:
    """Tell whether there is a module for a SQLAlchemy dialect name."""
    return dialect_name in _BY_DIALECT


def database_of(dialect_name: str) -> Database:
    """Return the module for a SQLAlchemy dialect name.

    Databases without one get what the SQL standard gives: their sessions work, the library's own
    tables do not.
    """
    return _BY_DIALECT.get(dialect_name, _GENERIC)
