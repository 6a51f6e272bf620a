"""Commits that a body sends past its session: as text, by what implies one, on its Connection.

Beneath the ledger, which asks here for the sessions where such a commit matters: those of a
``once`` task, which refuses it, and those of a request that ``transient_retries`` would run again,
which counts it.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from sqlalchemy import Connection
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import Session

from ..databases import database_of
from ..databases.commit_statements import CommitsBy, committing
from ..errors import OnceCommitError
from .commits import commits_under_way
from .isolation import joined_connections
from .state import STATE, Ledger, SessionState

__all__ = ["Committing", "commit_of", "refuse_or_count", "watch"]

#: The ledgers of the sessions that are watched, by the connection that a pool has lent them: that
#: is what a dialect's ``do_commit`` gets.
_watched: WeakKeyDictionary[object, Ledger] = WeakKeyDictionary()


def watch(ledger: Ledger, connection: Connection) -> None:
    """Watch a connection that a session has just begun on, if a commit past the session matters.

    Not by events of the Connection, for which it makes a dispatcher: 20 us a transaction.
    """
    ledger.commits = commits_under_way.get()
    ledger.is_watched = ledger.commits is not None or bool(ledger.once_owner)
    if ledger.is_watched:
        _watched[connection.connection] = ledger


class Committing:
    """A commit of a watched session's transaction that is about to be sent past the session.

    Args:
        ledger: Of the session.
    """

    __slots__ = ("_ledger",)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger: Ledger = ledger

    def is_done(self) -> None:
        """Note that it was carried out."""
        if self._ledger.commits is not None:
            self._ledger.commits.note_committed(wrote=True)

    def has_failed(self, *, is_answered: bool) -> None:
        """Note that it has failed: because the database said so, or nobody knows."""
        if self._ledger.commits is not None and not is_answered:
            self._ledger.commits.note_unanswered(wrote=True)


def refuse_or_count(
    ledger: Ledger, context: DefaultExecutionContext, statement: str
) -> Committing | None:
    """Judge a statement of a watched session that is about to be sent.

    Args:
        ledger: Of the session; it knows nothing of this statement yet.
        context: SQLAlchemy's ``ExecutionContext``.
        statement: The text that the driver gets.

    Returns:
        What is to be told of its end; None for a statement that commits nothing.

    Raises:
        OnceCommitError: It would commit writes of a ``once`` task.
    """
    if not (context.compiled is None or context.is_text or context.isddl):
        return None
    by = committing(statement, context.dialect.name)
    if by is CommitsBy.NOTHING:
        return None
    if by is not CommitsBy.CHANGING and not _has_changed(ledger, context.root_connection):
        return None
    if ledger.once_owner:
        # Its first words: no more of it, which may be a secret.
        raise OnceCommitError(ledger.once_owner, " ".join(statement.split()[:2]))
    committing_now = Committing(ledger)
    if by is not CommitsBy.ITSELF:
        # Before the statement itself, which may fail.
        committing_now.is_done()
        return None
    return committing_now


def commit_of(lent: object) -> Committing | None:
    """Judge a COMMIT that is about to be sent on a connection, as the pool has lent it.

    Returns:
        What is to be told of its end; None for one of a Session, which tells that itself, and for
        one that commits nothing.

    Raises:
        OnceCommitError: It would commit writes of a ``once`` task.
    """
    ledger = _watched.get(lent) if _watched else None
    if ledger is None or ledger.transaction is None:
        return None
    transaction = ledger.transaction()
    # One that has ended has no session.
    session: Session | None = None if transaction is None else transaction.session
    if session is None or session.get_transaction() is not transaction:
        return None
    state: SessionState = session.__dict__[STATE]
    if state.is_committing:
        return None
    connection = _connection_of(ledger, lent)
    if connection is None or not _has_changed(ledger, connection):
        return None
    if ledger.once_owner:
        # SQLAlchemy takes the transaction for ended, and would give the connection back as it is.
        connection.dialect.do_rollback(connection.connection)
        raise OnceCommitError(ledger.once_owner, "Connection.commit()")
    return Committing(ledger)


def _connection_of(ledger: Ledger, lent: object) -> Connection | None:
    for reference in ledger.connections:
        connection = reference()
        if connection is not None and not connection.closed and connection.connection is lent:
            return connection
    return None


def _has_changed(ledger: Ledger, connection: Connection) -> bool:
    """Tell whether the open transaction has changed anything; the database is asked if need be."""
    if ledger.writes:
        return True
    if connection in joined_connections:
        # The database would tell of the changes of the test around it.
        return False
    marks = zip(ledger.connections, ledger.marks, strict=True)
    mark = next((mark for reference, mark in marks if reference() is connection), None)
    held = database_of(connection.dialect.name).held(connection, mark)
    return held is not None and held.writes
