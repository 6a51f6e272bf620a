"""A session inside of somebody else's transaction.

The commit of the session is a promise, that of the Connection is the fact.

Beneath ``transaction.py``, which leaves here what is to happen when the caller's transaction has
ended.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.engine import NestedTransaction
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

from .isolation import joined_connections
from .ledger import failed_commit_reporters, ledger_of, observe

__all__ = ["callers_connection", "is_joined", "when_ended"]

#: Told whether the caller's transaction, and with it the session's work, was committed.
Finish = Callable[[bool], object]


def is_joined(session: Session) -> bool:
    """Tell whether a session is part of a test's transaction; see ``celery_alchemy.testing``."""
    bind = session.bind
    if isinstance(bind, Connection):
        return bind in joined_connections
    # One that chooses its connection itself, as Flask-SQLAlchemy's.
    ledger = ledger_of(session)
    return ledger is not None and any(used() in joined_connections for used in ledger.connections)


def callers_connection(session: Session) -> Connection | None:
    """Return the Connection in whose open transaction a session works.

    None if its own commit is the last word.
    """
    bind = session.bind
    if not isinstance(bind, Connection) or bind in joined_connections or not bind.in_transaction():
        return None
    return bind


class _Promise:
    """What is to happen when the caller's transaction has ended.

    Args:
        finish: Does it.
        is_kept: The session has committed, so that its work stays if the caller commits.
        savepoints: The names of the caller's SAVEPOINTs in which it was made: going back to one
            breaks it.
    """

    __slots__ = ("finish", "is_kept", "savepoints")

    def __init__(self, finish: Finish, is_kept: bool, savepoints: frozenset[str]) -> None:
        self.finish = finish
        self.is_kept = is_kept
        self.savepoints = savepoints


class _Promises:
    """The promises of a Connection's open transaction, and of one that has ended.

    SQLAlchemy tells of a COMMIT and a ROLLBACK before it is sent. What is due is done when the
    Connection goes on: begins again, or is given back.
    """

    __slots__ = ("due", "made")

    def __init__(self) -> None:
        self.made: list[_Promise] = []
        self.due: list[_Promise] = []

    def break_all(self, promises: list[_Promise]) -> None:
        for promise in promises:
            promise.is_kept = False

    def end(self) -> None:
        self.due += self.made
        self.made = []

    def finish(self) -> None:
        due, self.due = self.due, []
        for promise in due:
            promise.finish(promise.is_kept)


# By Connection, for one that was lost has no .info; there too, for a pool knows nothing of
# Connections.
_promises: WeakKeyDictionary[Connection, _Promises] = WeakKeyDictionary()
_PROMISES = "celery_alchemy.promises"
_followed: WeakSet[Pool] = WeakSet()


def when_ended(connection: Connection, finish: Finish, *, is_kept: bool) -> None:
    """Call ``finish`` when the open transaction of a Connection has ended.

    Args:
        connection: In a transaction that a caller has begun.
        finish: Called with True if the transaction was committed, and so was what the session did
            in it.
        is_kept: The session has committed.
    """
    promises = _promises.get(connection)
    if promises is None:
        promises = _promises[connection] = _Promises()
        _follow(connection)
    promises.made.append(_Promise(finish, is_kept, _open_savepoints(connection)))
    if not connection.invalidated:
        connection.info[_PROMISES] = promises


def _follow(connection: Connection) -> None:
    event.listen(connection, "commit", _commits)
    event.listen(connection, "rollback", _rolls_back)
    event.listen(connection, "begin", _goes_on)
    event.listen(connection, "rollback_savepoint", _savepoint_rolls_back)
    # A COMMIT that fails is seen where statements are.
    observe(connection.engine)
    pool = connection.engine.pool
    if pool not in _followed:
        _followed.add(pool)
        event.listen(pool, "checkin", _returns)


def _open_savepoints(connection: Connection) -> frozenset[str]:
    # SQLAlchemy names a SAVEPOINT after it has told of it, and has no public name for the one
    # around it.
    names: list[str] = []
    savepoint: object = connection.get_nested_transaction()
    while isinstance(savepoint, NestedTransaction):
        names.append(savepoint._savepoint)
        savepoint = savepoint._previous_nested
    return frozenset(names)


def _commits(connection: Connection) -> None:
    _promises[connection].end()


def _rolls_back(connection: Connection) -> None:
    promises = _promises[connection]
    promises.break_all(promises.made)
    promises.end()
    if connection.invalidated:
        # No ROLLBACK is sent to a connection that is lost, and it is not given back.
        promises.finish()


def _savepoint_rolls_back(connection: Connection, name: str, context: object) -> None:
    promises = _promises[connection]
    promises.break_all([promise for promise in promises.made if name in promise.savepoints])


def _goes_on(connection: Connection) -> None:
    _promises[connection].finish()


def _returns(dbapi_connection: object, record: ConnectionPoolEntry) -> None:
    promises: _Promises | None = record.info.pop(_PROMISES, None)
    if promises is not None:
        promises.finish()


def _commit_failed(connection: PoolProxiedConnection) -> None:
    # SQLAlchemy tells of no ROLLBACK after a COMMIT that failed.
    promises: _Promises | None = connection.info.get(_PROMISES)
    if promises is not None:
        promises.break_all(promises.due)


failed_commit_reporters.append(_commit_failed)
