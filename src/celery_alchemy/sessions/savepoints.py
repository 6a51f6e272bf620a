"""What was written since a SAVEPOINT is no write any more when that is rolled back.

Beneath the ledger, which counts what the session's transaction has written. A SAVEPOINT that the
application makes past the session is not seen: what it has written counts on.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from sqlalchemy import Connection
from sqlalchemy.orm import Session, SessionTransaction

from ..databases import database_of
from ..databases.holding import TAKEN_BACK
from .state import BeforeSavepoint, Ledger, ledger_of

__all__ = ["note_savepoint", "take_back"]


def note_savepoint(ledger: Ledger, transaction: SessionTransaction, connection: Connection) -> None:
    """Take note of a SAVEPOINT on a connection of the ledger's transaction."""
    if ledger.savepoints is None:
        ledger.savepoints = WeakKeyDictionary()
    before = ledger.savepoints.setdefault(transaction, BeforeSavepoint(ledger.writes))
    for place, counted, mark in _counts(ledger):
        if ledger.connections[place]() is connection:
            before.changes[place] = counted - mark


def take_back(session: Session, transaction: SessionTransaction) -> None:
    """Have the ledger forget what was written since a SAVEPOINT that was rolled back."""
    ledger = ledger_of(session)
    if ledger is None or ledger.savepoints is None:
        return
    before = ledger.savepoints.pop(transaction, None)
    if before is None:
        return
    ledger.writes = before.writes
    marks = [TAKEN_BACK if mark is None else mark for mark in ledger.marks]
    for place, counted, _ in _counts(ledger):
        if place in before.changes:
            marks[place] = counted - before.changes[place]
    ledger.marks = tuple(marks)


def _counts(ledger: Ledger) -> Iterator[tuple[int, int, int]]:
    """Yield the place, the count and the mark of each connection whose database counts changes."""
    for place, (reference, mark) in enumerate(zip(ledger.connections, ledger.marks, strict=True)):
        connection = reference()
        if connection is None or connection.invalidated or mark is None:
            continue
        read = database_of(connection.dialect.name).mark
        counted = None if read is None else read(connection)
        if counted is not None:
            yield place, counted, mark
