"""The tables of the broker as one connection reaches them.

Beneath everything that reads or writes them; ``place.py`` says which connection and which schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from sqlalchemy import Connection, Engine, Executable, Table
from sqlalchemy.exc import OperationalError, ProgrammingError

from ..databases import database_of
from ..databases.queue_tables import BROADCASTS, QUEUES, WORKERS
from ..databases.tables import Cursor, Parameters
from ..outbox.outbox import missing_table
from ..outbox.place import OutboxTable, Place

__all__ = ["BrokerTables", "begun", "seen"]


class BrokerTables:
    """The tables, in a transaction.

    Attributes:
        messages: The outbox's table, which is the queue.
        queues: Queues and bindings.
        workers: Who takes messages.
        broadcasts: What was said to all.
    """

    __slots__ = ("_there", "broadcasts", "messages", "queues", "workers")

    def __init__(self, there: OutboxTable) -> None:
        self._there = there
        tables, schema = there.table.metadata.tables, there.table.schema
        prefix = f"{schema}." if schema else ""
        self.messages: Table = there.table
        self.queues: Table = tables[prefix + QUEUES]
        self.workers: Table = tables[prefix + WORKERS]
        self.broadcasts: Table = tables[prefix + BROADCASTS]

    @property
    def connection(self) -> Connection:
        """The connection that they are reached by."""
        return self._there.connection

    @property
    def outbox(self) -> OutboxTable:
        """The outbox's table for its own statements."""
        return self._there

    def run(self, statement: Executable, parameters: Parameters = None) -> Cursor:
        """Execute a statement that was made of these tables."""
        return self._there.run(statement, parameters)


@contextmanager
def begun(
    place: Place, bind: Engine | Connection, silent_seconds: float | None = None
) -> Iterator[BrokerTables]:
    """Give the tables in a transaction of its own, which ends with the block.

    Args:
        place: Where they are.
        bind: How they are reached.
        silent_seconds: The server ends the transaction when it hears nothing for so long, where it
            can: what it has locked must not wait for a process that stands still. None for never.

    Raises:
        MissingTableError: One of them has not been made.
    """
    try:
        with ExitStack() as stack:
            if isinstance(bind, Connection):
                connection = bind
                stack.enter_context(bind.begin())
            else:
                connection = stack.enter_context(bind.begin())
            if silent_seconds is not None:
                database_of(connection.dialect.name).end_if_silent(connection, silent_seconds)
            yield BrokerTables(place.on(connection))
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc


def seen(place: Place, engine: Engine) -> AbstractContextManager[BrokerTables]:
    """Give the tables in a transaction that only reads: on SQLite it waits for nobody's lock.

    Raises:
        MissingTableError: One of them has not been made.
    """
    return begun(place, database_of(engine.dialect.name).reading(engine))
