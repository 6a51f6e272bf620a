"""What hangs on a session's transaction: callables that wait for the outermost commit, and giving the connection back in between.

Above the ledger, below the request. Works for every Session, whoever made it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Union
from weakref import WeakSet, ref

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.util import ScopedRegistry

from .errors import OPEN_SAVEPOINT, ConfigurationError, PublishError, UncommittedChangesError
from .ledger import LEDGER, Ledger, ask_after_failure, has_sent_writes, ledger_of
from .sessions import is_open

__all__ = [
    "WAITING",
    "AnySession",
    "has_written",
    "is_joined",
    "joined_connections",
    "on_commit",
    "released",
    "set_owner",
    "sync_session_of",
    "uncommitted_changes",
]

logger: logging.Logger = logging.getLogger(__name__)

# A Session, a scoped_session, or their async twins (named as Any so that greenlet is not needed to import this package).
AnySession = Union[Session, "scoped_session[Any]", Any]

#: A key of the __dict__ of sessions for whose commit callables wait.
WAITING = "celery_alchemy.waiting"
_OWNER = "celery_alchemy.owner"
_FLUSHED = "celery_alchemy.flushed"
_COMMITTING = "celery_alchemy.committing"
_COMMITTED_NOW = "celery_alchemy.committed_now"


def sync_session_of(session: AnySession) -> Session:
    """Return the Session behind an AsyncSession, a scoped_session or an async_scoped_session, or the Session itself."""
    session = _in_scope(session)
    sync: object = getattr(session, "sync_session", session) if not isinstance(session, Session) else session
    if not isinstance(sync, Session):
        raise ConfigurationError(
            f"A session was expected and {type(session).__name__!r} was given.",
            "Give a sqlalchemy.orm.Session, an AsyncSession, a scoped_session or an async_scoped_session.",
        )
    return sync


def _in_scope(session: AnySession) -> Any:
    """Return the session that a scoped_session or an async_scoped_session stands for here; any other session itself."""
    registry = getattr(session, "registry", None)
    return registry() if isinstance(registry, ScopedRegistry) else session


def set_owner(session: Session, owner: str) -> None:
    """Name the running task whose session this is: what fails after its commit is logged, not raised.

    The task's work is committed then; an exception would make Celery record a failure and ``autoretry_for`` run the work again.
    """
    session.__dict__[_OWNER] = owner


#: Connections whose transaction a test began, to roll it back: a session's commit counts as the outermost one there.
joined_connections: WeakSet[Connection] = WeakSet()


def is_joined(session: Session) -> bool:
    """Tell whether a session is part of a test's transaction; see ``celery_alchemy.testing``."""
    bind = session.bind
    return isinstance(bind, Connection) and bind in joined_connections


# --- callables that wait for the commit --------------------------------------------------------------------------------


class Joint(Protocol):
    """A callable for ``on_commit`` that has work to do in the transaction too; those of one commit are joined into one.

    Attributes:
        is_written: The work in the transaction is done.
    """

    is_written: bool

    def __call__(self) -> object: ...

    def join(self, other: Joint) -> Joint:
        """Return one that does the work of both."""
        ...

    def before_commit(self, session: Session) -> None:
        """Do the work in the transaction, right before its COMMIT."""
        ...


@dataclass(slots=True)
class _Entry:
    transaction: SessionTransaction
    run: Callable[[], object]
    what: str


class _Waiting:
    """The callables that wait for a session's outermost commit, each with the transaction it was given in."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: list[_Entry] = []


def on_commit(session: AnySession, callable: Callable[[], object], *, what: str | None = None) -> None:  # noqa: A002 - the field's word.
    """Run a callable after the outermost transaction of a session has committed.

    It never runs when the transaction, or the SAVEPOINT that this was called in, is rolled back. Callables run in the order in
    which they were given, once, when the connection is back in its pool; they may use the session, which then begins a new
    transaction. When one raises, the others still run; then the errors are logged if the session belongs to a running task, or
    raised as PublishError from the commit.

    A session that is bound to a Connection whose transaction somebody else began has not committed until that one does.

    Args:
        session: A Session, an AsyncSession, or a registry of either (scoped_session, async_scoped_session). One without a
            transaction begins one, as any use of it would.
        callable: Takes no arguments. Under an AsyncSession it runs in the event loop's thread and must not block.
        what: A name for it in logs and errors.
    """
    session = sync_session_of(session)
    if not session.in_transaction():
        session.begin()
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:  # pragma: no cover - begin() has just made one.
        raise RuntimeError("The session has no transaction after begin().")
    if _COMMITTING in session.__dict__ and transaction.is_active and getattr(callable, "is_written", True) is False:
        # Called by a listener, of the commit's own flush for example: the joint work of this commit is already done.
        joint: Any = callable
        joint.before_commit(session)
    waiting: _Waiting = session.__dict__.setdefault(WAITING, _Waiting())
    waiting.entries.append(_Entry(transaction, callable, what or str(getattr(callable, "__qualname__", callable))))


# The listeners below run for every Session of the process, also for those that nobody asked anything of. So they look into
# __dict__ first: Session.info makes its dict when it is first asked for, 1 us.


def _before_commit(session: Session) -> None:
    if session.in_nested_transaction():
        return
    ledger: Ledger | None = session.__dict__.get(LEDGER)
    if ledger is not None and ledger.failed_on is not None:
        ask_after_failure(ledger)
    session.__dict__[_COMMITTING] = True
    waiting: _Waiting | None = session.__dict__.get(WAITING)
    if waiting is None:
        return
    joint: Any = None
    kept: list[_Entry] = []
    for entry in waiting.entries:
        if getattr(entry.run, "is_written", True):
            kept.append(entry)
        elif joint is None:
            joint = entry
            kept.append(entry)
        else:
            joint.run = joint.run.join(entry.run)
    if joint is not None:
        waiting.entries = kept
        joint.run.before_commit(session)


def _after_commit(session: Session) -> None:
    # SQLAlchemy fires this for a released SAVEPOINT as well as for the real COMMIT. It only says here how the transaction that
    # ends next has ended; also when nothing waits, because another listener of this event may send.
    session.__dict__[_COMMITTED_NOW] = session.get_nested_transaction() or session.get_transaction()


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.__dict__.pop(_COMMITTING, None)
    committed = session.__dict__.pop(_COMMITTED_NOW, None) is transaction
    waiting: _Waiting | None = session.__dict__.get(WAITING)
    if waiting is not None:
        _settle(session, transaction, waiting, committed)


def _settle(session: Session, transaction: SessionTransaction, waiting: _Waiting, committed: bool) -> None:
    mine = [entry for entry in waiting.entries if entry.transaction is transaction]
    if transaction.nested:
        if committed and transaction.parent is not None:
            outer = _outside(transaction.parent)
            for entry in mine:
                entry.transaction = outer
        else:
            waiting.entries = [entry for entry in waiting.entries if entry.transaction is not transaction]
    elif transaction.parent is None:
        del session.__dict__[WAITING]
        if committed:
            _finish(session, mine)


def _outside(transaction: SessionTransaction) -> SessionTransaction:
    """Skip the subtransactions of flushes: an entry hangs on the outermost transaction or on a SAVEPOINT."""
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def _finish(session: Session, entries: list[_Entry]) -> None:
    bind = session.bind
    if isinstance(bind, Connection) and bind.in_transaction() and bind not in joined_connections:
        _wait_for_connection(bind, session, entries)
    else:
        _run(session, entries)


def _run(session: Session, entries: list[_Entry]) -> None:
    owner: str | None = session.__dict__.get(_OWNER)
    failures: list[str] = []
    first: Exception | None = None
    for entry in entries:
        try:
            entry.run()
        except Exception as exc:
            first = first or exc
            failures.append(f"{entry.what}: {type(exc).__name__}: {exc}")
            if owner is not None:
                logger.exception("%s is committed, but %s failed after it", owner, entry.what)
    if first is not None and owner is None:
        raise PublishError(tuple(failures)) from first


event.listen(Session, "before_commit", _before_commit)
event.listen(Session, "after_commit", _after_commit)
event.listen(Session, "after_transaction_end", _after_transaction_end)


# A session inside somebody else's transaction: its commit is a promise, the connection's is the fact. SQLAlchemy tells of a
# Connection's COMMIT only before it is sent, so what was promised is held until the connection goes on: begins again, or is
# given back.
_PROMISED = "celery_alchemy.promised"
_COMMITTED = "celery_alchemy.committed"
_PROMISED_BEFORE = "celery_alchemy.promised_before_savepoint"
_followed: WeakSet[Pool] = WeakSet()


def _wait_for_connection(connection: Connection, session: Session, entries: list[_Entry]) -> None:
    if not event.contains(connection, "commit", _connection_commits):
        event.listen(connection, "commit", _connection_commits)
        event.listen(connection, "rollback", _connection_rolls_back)
        event.listen(connection, "begin", _connection_goes_on)
        event.listen(connection, "savepoint", _savepoint_begins)
        event.listen(connection, "rollback_savepoint", _savepoint_rolls_back)
    pool = connection.engine.pool
    if pool not in _followed:
        _followed.add(pool)
        event.listen(pool, "checkin", _connection_returns)
    connection.info.setdefault(_PROMISED, []).append((session, entries))


def _connection_commits(connection: Connection) -> None:
    connection.info[_COMMITTED] = connection.info.pop(_PROMISED, [])
    connection.info.pop(_PROMISED_BEFORE, None)


def _connection_rolls_back(connection: Connection) -> None:
    connection.info.pop(_PROMISED, None)
    connection.info.pop(_PROMISED_BEFORE, None)
    connection.info.pop(_COMMITTED, None)  # Its COMMIT failed.


def _savepoint_begins(connection: Connection, name: str) -> None:
    connection.info.setdefault(_PROMISED_BEFORE, {})[name] = len(connection.info.get(_PROMISED, ()))


def _savepoint_rolls_back(connection: Connection, name: str, context: object) -> None:
    # A SAVEPOINT that is not listed began before the first promise was made.
    before = connection.info.get(_PROMISED_BEFORE, {}).get(name, 0)
    del connection.info.get(_PROMISED, [])[before:]


def _connection_goes_on(connection: Connection) -> None:
    _keep_promises(connection.info)


def _connection_returns(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    _keep_promises(record.info)


def _keep_promises(info: dict[Any, Any]) -> None:
    for session, entries in info.pop(_COMMITTED, ()):
        _run(session, entries)


# --- what is not committed, and giving the connection back ---------------------------------------------------------------


def uncommitted_changes(session: Session) -> str | None:
    """Say what of a session's work is neither committed nor rolled back; None when there is nothing.

    For a session that celery-alchemy made, every statement on its connections is known, Core and textual SQL too. For another it
    is what the unit of work has flushed.
    """
    if not is_open(session):
        return None
    if session.in_nested_transaction():
        return OPEN_SAVEPOINT
    if session.new or session.deleted or any(session.is_modified(entity) for entity in session.dirty):
        return "unflushed changes"
    waiting: _Waiting | None = session.__dict__.get(WAITING)
    if waiting is not None and waiting.entries:
        return "sends that wait for the commit"
    return "uncommitted writes" if has_written(session) else None


def has_written(session: Session) -> bool:
    """Tell whether the open transaction of a session has changed rows."""
    transaction = session.get_transaction()
    if transaction is None:
        return False
    ledger = ledger_of(session)
    if ledger is not None:
        return has_sent_writes(ledger, transaction)
    flushed: Callable[[], SessionTransaction | None] | None = session.__dict__.get(_FLUSHED)
    return flushed is not None and flushed() is transaction


def _after_flush(session: Session, flush_context: object) -> None:
    transaction = session.get_transaction()
    if transaction is not None and ledger_of(session) is None:
        session.__dict__[_FLUSHED] = ref(transaction)


# The session itself does not remember: what was flushed and is no longer referenced is gone from its identity map.
event.listen(Session, "after_flush", _after_flush)


class released:  # noqa: N801 - used as a function: with released(session): ...
    """Give the session's connection back to its pool around slow work: an HTTP call, an embedding, a language model.

    Ends the transaction, which must only have read. Objects stay loaded and usable; the next use of the session, inside the block
    or after it, begins a new transaction, which may see what others have committed meanwhile. ``async with`` for an AsyncSession.

    Of a session that celery-alchemy did not make, only what the unit of work has flushed is known as a write: what Core and textual
    statements wrote is committed.

    Args:
        session: A Session, an AsyncSession, or a registry of either (scoped_session, async_scoped_session).
        commit: Commit what was written first.

    Raises:
        UncommittedChangesError: There is work that is not committed: unflushed objects, writes, pending sends, an open SAVEPOINT
            (also with ``commit=True``).
    """

    def __init__(self, session: AnySession, *, commit: bool = False) -> None:
        self._given: Any = session
        self._commit = commit

    def __enter__(self) -> None:
        _release(sync_session_of(self._given), self._commit)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        return None

    async def __aenter__(self) -> None:
        await _in_scope(self._given).run_sync(_release, self._commit)

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        return None


def _release(session: Session, commit: bool) -> None:
    what = uncommitted_changes(session)
    if what is not None and (not commit or session.in_nested_transaction()):
        raise UncommittedChangesError(what)
    if not is_open(session) or not session.in_transaction():
        return
    expire, session.expire_on_commit = session.expire_on_commit, False
    try:
        session.commit()
    finally:
        session.expire_on_commit = expire
