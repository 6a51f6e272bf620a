"""The connection that a worker takes messages on, and what it knows of the table while it is open.

Beside the claims; the thread that takes opens it when there is something to do, and closes it after
an error, for whatever was begun on it is not known to be there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy import Connection, Engine

from .floors import Floors
from .homes import BrokerHome
from .waking import changes_of

__all__ = ["TakingConnection"]

logger: logging.Logger = logging.getLogger(__name__)


class TakingConnection:
    """The connection of one worker.

    Args:
        home: The broker's database.

    Attributes:
        floors: From when on it looks for messages.
        changes: What tells of the commits of others on SQLite; None elsewhere, and while it is
            closed.
    """

    def __init__(self, home: BrokerHome) -> None:
        self._home = home
        self._engine: Engine | None = None
        self._connection: Connection | None = None
        self.floors: Floors = Floors()
        self.changes: Callable[[], int] | None = None

    @property
    def engine(self) -> Engine:
        """The worker's own, with as many connections as a worker has."""
        if self._engine is None:
            self._engine = self._home.taking_engine()
        return self._engine

    @property
    def is_open(self) -> bool:
        """Whether it is there."""
        return self._connection is not None

    def open(self) -> Connection:
        """Return it, opened if it is not."""
        if self._connection is None:
            self._connection = self.engine.connect()
            self.changes = changes_of(self._connection)
        return self._connection

    def drop(self) -> None:
        """Have it not be lent again: since a failover it may lead to a server that only reads."""
        if self._connection is not None:
            self._connection.invalidate()

    def close(self) -> None:
        """Close it; what was seen on it may not have been taken."""
        connection, self._connection, self.changes = self._connection, None, None
        self.floors.forget()
        if connection is not None:
            try:
                connection.close()
            except Exception:
                logger.debug("A connection could not be closed", exc_info=True)

    def dispose(self) -> None:
        """Close it, and the engine with it."""
        self.close()
        if self._engine is not None:
            self._engine.dispose()
