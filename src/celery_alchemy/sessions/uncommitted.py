"""What the open transaction of a session has changed or locked.

Its statements tell, or the database is asked.

Above the ledger, beneath ``releasing.py`` and ``requests/once.py``, which refuse to lose it or to
commit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import ref

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from ..databases import Held, database_of
from ..databases.statements import locked_tables
from .ledger import ledger_of, locked_in, sent_writes_in
from .sources import is_open
from .state import state_for, state_of

__all__ = ["has_written", "held_by", "is_unflushed"]


def is_unflushed(session: Session) -> bool:
    """Tell whether a session holds changes of objects that it has not sent to the database."""
    return bool(
        session.new
        or session.deleted
        or any(session.is_modified(entity) for entity in session.dirty)
    )


def has_written(session: Session) -> bool:
    """Tell whether the open transaction has sent a statement whose text shows a change.

    Of a session that celery-alchemy did not make, what its unit of work has flushed is known.
    """
    transaction = session.get_transaction()
    if transaction is None:
        return False
    state = state_of(session)
    if state is None:
        return False
    if state.ledger is not None:
        return sent_writes_in(state.ledger, transaction)
    return state.flushed is not None and state.flushed() is transaction


def held_by(session: Session) -> Held:
    """Return what the open transaction of a session has changed or locked.

    Where no statement shows a change the database is asked: the driver's own cursor, COPY and
    functions change rows too. MySQL and MariaDB cannot say; SQLite can for sessions that
    celery-alchemy made.

    Raises:
        DBAPIError: The transaction is aborted, or the connection is lost.
    """
    transaction = session.get_transaction() if is_open(session) else None
    if transaction is None:
        return Held(writes=False, locked=())
    if has_written(session):
        return Held(writes=True, locked=())
    answers = [_asked(session, connection) for connection in _own_connections(transaction)]
    told = [answer for answer in answers if answer is not None]
    if any(answer.writes for answer in told):
        return Held(writes=True, locked=())
    locked = {table for answer in told for table in answer.locked or ()}
    if not told or len(told) < len(answers) or any(answer.locked is None for answer in told):
        locked.update(_shown_locked(session, transaction))
    return Held(writes=False, locked=tuple(sorted(locked)))


def _shown_locked(session: Session, transaction: SessionTransaction) -> tuple[str, ...]:
    ledger = ledger_of(session)
    statement = "" if ledger is None else locked_in(ledger, transaction)
    return (locked_tables(statement) or ("a table",)) if statement else ()


def _own_connections(transaction: SessionTransaction) -> Iterator[Connection]:
    """Yield the connections whose transaction is the session's to commit.

    In a caller's transaction, a test's say, the database would tell of the caller's changes as
    well.
    """
    # SQLAlchemy 2.1.7 has a public name for them, which does not say whose transaction it is.
    for connection, begun, is_committed, _ in set(transaction._connections.values()):
        if is_committed and begun is connection.get_transaction() and not connection.invalidated:
            yield connection


def _asked(session: Session, connection: Connection) -> Held | None:
    ledger = ledger_of(session)
    marks = () if ledger is None else zip(ledger.connections, ledger.marks, strict=True)
    mark = next((mark for reference, mark in marks if reference() is connection), None)
    return database_of(connection.dialect.name).held(connection, mark)


def _after_flush(session: Session, flush_context: object) -> None:
    transaction = session.get_transaction()
    if transaction is not None and ledger_of(session) is None:
        state_for(session).flushed = ref(transaction)


# The session itself does not remember: what was flushed and is no longer referenced is gone from
# its identity map.
event.listen(Session, "after_flush", _after_flush)
