"""One statement of the library's own that is a transaction by itself.

Beneath ``requests/once_start.py``, what a ``once`` task finds at its start, before its own
transaction begins, and ``broker/waking.py``, which tells that something was sent. Where the driver
can be told so, no BEGIN and no COMMIT is sent, so that the statement is one round trip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.pool import PoolProxiedConnection, SingletonThreadPool, StaticPool

from ..databases import LoneStatement, database_of
from ..databases.tables import Raw, moved
from .place import Place
from .prepared import Prepared, as_sent

__all__ = ["Answer", "execute_alone", "lends_its_own", "send_alone"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the database said.

    Attributes:
        row: The first row that was read, with values as the driver gives them; None if none was.
        changed: How many rows were changed.
    """

    row: Raw | None
    changed: int


def lends_its_own(bind: Engine | Connection) -> TypeGuard[Engine]:
    """Tell whether an engine lends a connection on which nothing else is under way.

    Of an SQLite in memory there is one connection for all, which may be in a transaction.
    """
    shared = (StaticPool, SingletonThreadPool)
    return isinstance(bind, Engine) and not isinstance(bind.pool, shared)


def execute_alone(
    place: Place,
    engine: Engine,
    statement: LoneStatement,
    parameters: Mapping[str, object],
) -> Answer:
    """Execute one of the package's constant statements in a transaction of its own.

    The COMMIT of a change need not have reached the disk when this returns, where the database
    can do without. The driver is asked directly: SQLAlchemy's Connection would take 100 us of
    processor time more, a fifth of a task that reads a row, changes it and commits.

    Args:
        place: Where the table is.
        engine: The database; its pool lends the connection.
        statement: A SELECT of one row, or an UPDATE.
        parameters: By name.

    Raises:
        DBAPIError: The pool has no connection to lend.
        Exception: The driver's own error. The connection is dropped then.
    """
    schema = place.schema or engine.dialect.default_schema_name
    with _lent(engine) as connection:
        return _execute(connection, engine.dialect, moved(statement, schema), parameters)


def send_alone(engine: Engine, command: str) -> None:
    """Execute a command that has no parameters and answers nothing, in a transaction of its own.

    Raises:
        DBAPIError: The pool has no connection to lend.
        Exception: The driver's own error. The connection is dropped then.
    """
    with _lent(engine) as connection, _cursor_of(connection, engine.dialect) as cursor:
        cursor.execute(command)


@contextmanager
def _lent(engine: Engine) -> Iterator[PoolProxiedConnection]:
    """Lend a connection of the pool's, which is dropped after an error."""
    connection = engine.raw_connection()
    try:
        yield connection
    except BaseException:
        # A driver may be in mid-statement, and nothing else tells how far it has come.
        connection.invalidate()
        raise
    connection.close()


@contextmanager
def _cursor_of(connection: PoolProxiedConnection, dialect: Dialect) -> Iterator[DBAPICursor]:
    """Open a cursor of the driver's; what it has executed is committed at the end of the block."""
    restore = database_of(dialect.name).commit_itself(connection)
    cursor = connection.cursor()
    yield cursor
    cursor.close()
    if restore is None:
        connection.commit()
    else:
        restore()


def _execute(
    connection: PoolProxiedConnection,
    dialect: Dialect,
    statement: LoneStatement,
    parameters: Mapping[str, object],
) -> Answer:
    prepared = _hastened(statement, dialect)
    with _cursor_of(connection, dialect) as cursor:
        cursor.execute(prepared.text, prepared.values(parameters))
        return Answer(cursor.fetchone() if statement.is_select else None, cursor.rowcount)


@lru_cache(maxsize=64)
def _hastened(statement: LoneStatement, dialect: Dialect) -> Prepared:
    return as_sent(database_of(dialect.name).hastened(statement), dialect)
