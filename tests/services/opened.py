"""The connections that a test has opened, so that they can be closed when it has ended."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import Pool


class Connections:
    """The pools of the engines that were used, and SQLite's connections, which must be closed by hand."""

    def __init__(self) -> None:
        self._pools: set[Pool] = set()
        self._of_sqlite: list[tuple[sqlite3.Connection, Any]] = []
        self._borrowers: dict[int, threading.Thread] = {}

    @contextmanager
    def remembered(self) -> Iterator[Connections]:
        """Remember what is opened inside of the block, in any thread."""
        listeners: list[tuple[Any, str, Callable[..., None]]] = [
            (Engine, "engine_connect", self._note_pool),
            (Pool, "connect", self._note_opened),
            (Pool, "checkout", self._note_lent),
            (Pool, "checkin", self._note_returned),
        ]
        for listener in listeners:
            event.listen(*listener)
        try:
            yield self
        finally:
            for listener in listeners:
                event.remove(*listener)

    def close(self) -> None:
        """Close what the pools hold, and what is in no pool because a crash was played; not what other threads go on with."""
        for pool in self._pools:
            if not pool._is_asyncio:
                pool.dispose()
        here = threading.current_thread()
        for connection, entry in self._of_sqlite:
            borrower = self._borrowers.get(id(connection))
            if borrower is not None and borrower is not here and borrower.is_alive():
                continue
            if borrower is not None:
                # Else its pool resets it, and logs that it cannot, whenever it is collected.
                entry.fairy_ref = None
            # One in memory belongs to its thread.
            with suppress(sqlite3.ProgrammingError):
                connection.close()

    def _note_pool(self, connection: Connection) -> None:
        self._pools.add(connection.engine.pool)

    def _note_opened(self, connection: object, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            self._of_sqlite.append((connection, record))

    def _note_lent(self, connection: object, record: object, proxy: object) -> None:
        self._borrowers[id(connection)] = threading.current_thread()

    def _note_returned(self, connection: object, record: object) -> None:
        self._borrowers.pop(id(connection), None)
