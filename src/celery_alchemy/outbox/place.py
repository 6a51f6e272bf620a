"""Where the library's table is, and how its statements get there from a user's session.

Underneath the outbox, the records of once tasks and the relay. A session belongs to the user: it
may translate schemas, route its statements, filter its queries or have another search path. None of
that is meant for this table. Its statements are sent in the session's own transaction, on its
connection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    Insert,
    Table,
    Update,
    UpdateBase,
    inspect,
    update,
)
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateSchema

from ..databases.tables import NOT_TRANSLATED, Cursor, Parameters, Query, moved, outbox, outbox_in
from ..errors import ConfigurationError
from ..sessions.isolation import with_level_of
from .prepared import prepared

__all__ = ["DEFAULT_PLACE", "OutboxTable", "Place", "is_same_database"]

#: What a session that routes its statements is asked for: a write.
_A_WRITE = update(outbox).values(claim=None)

_GIVE_ENGINE = "Say where the table is: Alchemy(..., engine=...)."


class OutboxTable:
    """The table as one connection reaches it.

    Attributes:
        connection: The connection.
        table: The table, in its schema.
    """

    __slots__ = ("connection", "table")

    def __init__(self, connection: Connection, table: Table) -> None:
        self.connection: Connection = connection
        self.table: Table = table

    def execute(self, statement: Query | UpdateBase, parameters: Parameters = None) -> Cursor:
        """Execute one of the package's constant statements.

        They are of ``tables.outbox`` and ``tables.steps``.
        """
        there = moved(statement, self.table.schema)
        return self.connection.execute(there, parameters, execution_options=NOT_TRANSLATED)

    def change(self, statement: Insert | Update, parameters: Mapping[str, object]) -> int:
        """Execute one of the constant statements that read nothing.

        Return how many rows it has changed.

        The text is made once and not looked up for each execution: 70 us less, a seventh of a task
        that reads a row, changes it and commits.
        """
        return self.change_here(moved(statement, self.table.schema), parameters)

    def change_here(self, statement: Insert | Update, parameters: Mapping[str, object]) -> int:
        """As ``change()``, for a statement that was made of ``table``, once and for all."""
        there = prepared(statement, self.connection.dialect)
        return self.connection.exec_driver_sql(there.text, there.values(parameters)).rowcount

    def run(self, statement: Executable, parameters: Parameters = None) -> Cursor:
        """Execute a statement that was made of ``table``."""
        return self.connection.execute(statement, parameters, execution_options=NOT_TRANSLATED)


class Place:
    """A database and a schema in it.

    Args:
        schema: The schema of the table; None for the one that the database gives a new connection.
        engine: The database, where the sessions cannot tell.
    """

    def __init__(self, schema: str | None = None, engine: Engine | None = None) -> None:
        self.schema: str | None = schema
        self.engine: Engine | None = engine

    def on(self, connection: Connection) -> OutboxTable:
        """Return the table as a connection reaches it."""
        # Qualified in any case: a transaction may have another search path, or MySQL database, by
        # now.
        schema = self.schema or connection.dialect.default_schema_name
        return OutboxTable(connection, outbox_in(schema))

    def within(self, session: Session) -> OutboxTable:
        """Return the table as a session's own transaction reaches it; begins one if there is none.

        Raises:
            ConfigurationError: The session knows no database for the table.
        """
        return self.on(session.connection({"bind": self.bind_of(session)}))

    @contextmanager
    def begin(self, engine: Engine) -> Iterator[OutboxTable]:
        """Give the table in a transaction of its own, which ends with the block."""
        with engine.begin() as connection:
            yield self.on(connection)

    def bind_of(self, session: Session) -> Engine | Connection:
        """Return what the session knows the table's database by.

        A session keeps a connection for each Engine object, so the object matters: an engine with
        other execution options is another connection, and another transaction.

        Raises:
            ConfigurationError: The session knows no database for the table.
        """
        return with_level_of(session, self._bind_of(session))

    def _bind_of(self, session: Session) -> Engine | Connection:
        named = self.engine
        if named is None:
            bind = session.bind
            return _asked(session) if bind is None or _routes(session) else bind
        for bind in _binds_of(session):
            if is_same_database(bind, named):
                return bind
        if _routes(session):
            try:
                asked = _asked(session)
            except ConfigurationError:
                return named
            if is_same_database(asked, named):
                return asked
        return named

    def create(self, engine: Engine) -> None:
        """Make the tables, and on PostgreSQL their schema, where they do not exist."""
        with engine.begin() as connection:
            makes_schema = self.schema is not None and connection.dialect.name == "postgresql"
            # Not IF NOT EXISTS: that asks for the right to create schemas also where there is one.
            if makes_schema and not inspect(connection).has_schema(str(self.schema)):
                connection.execute(CreateSchema(str(self.schema)))
            table = self.on(connection).table
            connection.execution_options(**NOT_TRANSLATED)
            table.metadata.create_all(connection)


#: That of a session whose database and schema are what it has by itself.
DEFAULT_PLACE = Place()


def is_same_database(bind: Engine | Connection, other: Engine) -> bool:
    """Tell whether two engines reach the same database, be it by different drivers."""
    engine = bind.engine
    if engine is other or engine.pool is other.pool or engine.url == other.url:
        return True
    ours, theirs = engine.url, other.url
    same = (ours.host, ours.port, ours.database) == (theirs.host, theirs.port, theirs.database)
    return same and engine.dialect.name == other.dialect.name


def _routes(session: Session) -> bool:
    return type(session).get_bind is not Session.get_bind


def _binds_of(session: Session) -> list[Engine | Connection]:
    # What ``binds=`` was given. It is public since SQLAlchemy 2.1.
    kept = vars(session)
    more: Mapping[object, Engine | Connection] = (
        kept.get("binds") or kept.get("_Session__binds") or {}
    )
    return [*([] if session.bind is None else [session.bind]), *more.values()]


def _asked(session: Session) -> Engine | Connection:
    """Ask a session where it would send a write.

    Raises:
        ConfigurationError: It does not know, or it chooses by the row.
    """
    name = f"{type(session).__module__}.{type(session).__qualname__}"
    if hasattr(session, "shard_chooser"):
        raise ConfigurationError(
            f"A {name} chooses a database by the row, and {outbox.name!r} is in one of them.",
            _GIVE_ENGINE,
        )
    try:
        bind: object = _get_bind_of_write(session)
    except UnboundExecutionError as exc:
        raise ConfigurationError(
            f"A {name} is bound to no database for the table {outbox.name!r}.",
            "Beside binds=, bind its sessionmaker to the engine that has this table,"
            " sessionmaker(engine, binds=...), or name it: Alchemy(..., engine=...).",
        ) from exc
    except Exception as exc:
        raise ConfigurationError(
            f"A {name} cannot tell the database of the table {outbox.name!r}: its get_bind() raised"
            f" {type(exc).__name__}: {' '.join(str(exc).split())[:200]}",
            _GIVE_ENGINE,
        ) from exc
    if not isinstance(bind, (Engine, Connection)):
        given = type(bind).__name__
        raise ConfigurationError(f"A {name} gives a {given!r} for {outbox.name!r}.", _GIVE_ENGINE)
    return bind


def _get_bind_of_write(session: Session) -> object:
    # SQLAlchemy's own recipe for read replicas asks for this flag, and a flush is what this is.
    # https://docs.sqlalchemy.org/en/20/orm/persistence_techniques.html#custom-vertical-partitioning
    before, session._flushing = session._flushing, True
    try:
        return session.get_bind(clause=_A_WRITE)
    finally:
        session._flushing = before
