"""How a session ends: by a COMMIT that is one, or without.

It is closed, and never with a half-read connection in the pool.

Underneath the request, ``once`` and ``alchemy.session()``, which end their sessions by it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ..databases.transient import is_read_only
from ..errors import CommitIgnoredError
from .callers_connection import is_joined
from .ledger import ledger_of
from .transaction import note_rollback

__all__ = ["abandon", "close_quietly", "commit", "drop"]

logger: logging.Logger = logging.getLogger("celery_alchemy.closing")


def commit(session: Session, owner: Callable[[], str], *, expires: bool | None = None) -> None:
    """Commit a session's outermost transaction, and look whether it has ended.

    Args:
        session: Any session, also of a class of the user's.
        owner: Names the task, or whatever commits, for messages.
        expires: Whether its objects are read again at their next use; None for what the session
            says.

    Raises:
        CommitIgnoredError: The class's ``commit()`` has left the transaction open.
        Exception: What the database raised.
    """
    transaction = session.get_transaction() or session.begin()
    if expires is None:
        session.commit()
    else:
        before, session.expire_on_commit = session.expire_on_commit, expires
        try:
            session.commit()
        finally:
            session.expire_on_commit = before
    # Callables that waited for the commit may have begun the next one.
    if session.get_transaction() is transaction:
        class_ = type(session)
        raise CommitIgnoredError(owner(), f"{class_.__module__}.{class_.__qualname__}")


def abandon(session: Session, exc: BaseException, owner: Callable[[], str]) -> None:
    """Roll back and close, or drop the connection where it may be in the middle of a statement.

    Never raises.

    A soft time limit and the BaseExceptions of shutdown and of greenlets are raised in the middle
    of whatever runs, a COMMIT included; then nobody knows what the server will send next on that
    connection.
    """
    note_rollback(session)
    if _is_unfit(session, exc):
        _invalidate(session, owner)
    else:
        close_quietly(session, owner)


def roll_back(session: Session, exc: BaseException, owner: Callable[[], str]) -> None:
    """Roll back after an error that the session's user may catch and go on.

    Drops the connection where ``abandon()`` would; objects stay in the session. Never raises.
    """
    try:
        if _is_unfit(session, exc) and not is_joined(session):
            for connection in _open_connections(session):
                connection.invalidate(exc)
        session.rollback()
    except Exception:
        # Also where the error came up inside of SQLAlchemy's own commit.
        logger.warning("%s: rolling back failed, its session is emptied", owner(), exc_info=True)
        _invalidate(session, owner)


def _is_unfit(session: Session, exc: BaseException) -> bool:
    """Tell whether nobody else may have the connection on which an error came up."""
    ledger = ledger_of(session)
    # A GeneratorExit is only raised where a generator waits.
    interrupted = isinstance(exc, SoftTimeLimitExceeded) or not isinstance(
        exc, (Exception, GeneratorExit)
    )
    # SQLAlchemy sends no ROLLBACK after a COMMIT that failed, and SQLite's transaction is still
    # open then. Of all that the driver is asked for, only COMMIT and ROLLBACK have no statement.
    commit_failed = isinstance(exc, DBAPIError) and exc.statement is None
    # After a failover the pool would lend this connection, to a server that only reads now, to the
    # next run as well.
    reads_only = ledger is not None and not ledger.options.read_only and is_read_only(exc)
    return interrupted or commit_failed or reads_only or (ledger is not None and ledger.in_flight)


def close_quietly(session: Session, owner: Callable[[], str]) -> None:
    """Close a session.

    On any error log it and drop the connection. Never raises, so that it never hides another error.
    """
    try:
        session.close()
    except Exception:  # noqa: BLE001 - every error must be seen here.
        drop(session, owner)


def drop(session: Session, owner: Callable[[], str]) -> None:
    """Drop the connection of a session whose close has failed."""
    text = "%s: closing the session failed, its connection is dropped"
    logger.warning(text, owner(), exc_info=True)  # noqa: LOG014 - called by handlers.
    _invalidate(session, owner)


def _invalidate(session: Session, owner: Callable[[], str]) -> None:
    try:
        if is_joined(session):
            # Its connection is that of the whole test, and nothing runs on it meanwhile.
            session.close()
        else:
            session.invalidate()
            _drop_connections(session)
    except Exception:
        logger.warning("%s: dropping the session's connection failed", owner(), exc_info=True)


def _drop_connections(session: Session) -> None:
    """Drop the connections that a close which failed has left behind.

    They are with the session's transaction, out of the session's own reach.

    The garbage collector would find them; until then the pool goes without.
    """
    for connection in _open_connections(session):
        connection.invalidate()
        connection.close()


def _open_connections(session: Session) -> list[Connection]:
    """Return those that the session holds; none if its one connection is somebody else's."""
    ledger = ledger_of(session)
    if ledger is None or isinstance(session.bind, Connection):
        return []
    found = (reference() for reference in ledger.connections)
    return [one for one in found if one is not None and not one.closed]
