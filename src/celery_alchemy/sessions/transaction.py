"""What hangs on the end of a session's transaction.

Callables wait for its commit, or for its end whichever way; a send is one of them. What was given
in a SAVEPOINT is dropped when that is rolled back.

Above ``ledger.py``, below the requests. Works for every Session, whoever made it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from types import CoroutineType

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from ..errors import PublishError
from . import zope
from .any_session import AnySession, sync_session_of
from .at_hand import owner_of
from .callables import end_coroutine, refuse_unawaitable, refuse_uncallable
from .callers_connection import callers_connection, when_ended
from .commits import Commits, commits_under_way
from .joint_work import is_unwritten, write_joint
from .ledger import ask_after_failure
from .state import STATE, Entry, SessionState, Waiting, report_unsent, state_for, state_of
from .uncommitted import has_written, held_by, is_unflushed

__all__ = [
    "has_waiting_sends",
    "note_rollback",
    "on_commit",
    "on_end",
    "wait_for_commit",
]

logger: logging.Logger = logging.getLogger("celery_alchemy.transaction")

#: The methods that close a session.
# reset: 2.0.22
_CLOSES = tuple(name for name in ("close", "invalidate", "reset") if hasattr(Session, name))


def on_commit(
    session: AnySession,
    callable: Callable[[], object],  # noqa: A002 - the field's word.
    *,
    what: str | None = None,
) -> None:
    """Run a callable after the outermost transaction of a session has committed.

    It never runs when the transaction, or the SAVEPOINT that this was called in, is rolled back.
    Callables run in the order in which they were given, once, when the connection is back in its
    pool. They may use the session, which then begins a new transaction: what they send and write in
    it is committed when all have run. When one raises, the others still run; then the errors are
    logged if the session belongs to a running task, or raised as PublishError from the commit.

    A session that is bound to a Connection whose transaction somebody else began has not committed
    until that one does. One that is joined to a transaction manager by zope.sqlalchemy is marked as
    changed, so that it is committed.

    Args:
        session: A Session, an AsyncSession, or a registry of either (scoped_session,
            async_scoped_session). One without a transaction begins one, as any use of it would.
        callable: Takes no arguments. Under an AsyncSession it runs in the event loop's thread, must
            not block, and may be a coroutine function, which is awaited there.
        what: A name for it in logs and errors.

    Raises:
        CallableError: It cannot be called, or it is a coroutine function for a plain Session.
    """
    refuse_uncallable(callable, "on_commit()", "on_commit(session, lambda: ...)")
    refuse_unawaitable(callable, session, "on_commit")
    wait_for_commit(sync_session_of(session), callable, what or _name_of(callable))


def wait_for_commit(
    session: Session,
    run: Callable[[], object],
    what: str,
    undo: Callable[[], object] | None = None,
) -> None:
    """As ``on_commit``, with something to take back when nothing is committed.

    Args:
        session: Whose outermost commit is waited for.
        run: The callable.
        what: Its name.
        undo: Called when ``run`` is not, or has raised.
    """
    if not session.in_transaction():
        session.begin()
    zope.mark_changed(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:  # pragma: no cover - begin() has just made one.
        raise RuntimeError("The session has no transaction after begin().")
    state = state_for(session)
    if state.is_committing and transaction.is_active and is_unwritten(run):
        # Called by a listener, of the commit's own flush for example: the joint work of this commit
        # is already done.
        run.before_commit(session)
    _waiting_of(state).entries.append(Entry(transaction, run, what, undo))


def on_end(
    session: AnySession,
    callable: Callable[[], object],  # noqa: A002 - the field's word.
    *,
    what: str | None = None,
) -> None:
    """Run a callable when the outermost transaction of a session has ended, whichever way.

    The place for giving back a lock that must be held until others can see the rows. It runs after
    the callables of ``on_commit``, once, when the connection is back in its pool: after a commit, a
    rollback, a close, or the loss of the connection. A SAVEPOINT's end is none. It may use the
    session, which then begins a new transaction: what it sends and writes in it is committed, also
    after a rollback.

    In a session that has not begun yet it waits for the transaction that begins next, at the latest
    for the session's close. In one that is bound to a Connection whose transaction somebody else
    began, it waits for the end of that one. ``released()`` and an explicit commit end a transaction
    too.

    Args:
        session: A Session, an AsyncSession, or a registry of either.
        callable: Takes no arguments. Under an AsyncSession it runs in the event loop's thread, must
            not block, and may be a coroutine function, which is awaited there.
        what: A name for it in logs and errors.

    Raises:
        CallableError: It cannot be called, or it is a coroutine function for a plain Session.
        PublishError: From a commit, outside of tasks: the callable has failed after it. In a task,
            and after a rollback or a close, the error is logged, so that it hides no other.
    """
    refuse_uncallable(callable, "on_end()", "on_end(session, lambda: ...)")
    refuse_unawaitable(callable, session, "on_end")
    session = sync_session_of(session)
    # Opens a session that was not used so far; it has no connection for that.
    if not session.in_transaction():
        zope.join(session)
    if not session.in_transaction() and "close" not in session.__dict__:
        for name in _CLOSES:
            setattr(session, name, partial(_closed, session, getattr(type(session), name)))
    _waiting_of(state_for(session)).ends.append((callable, what or _name_of(callable)))


def _closed(session: Session, close: Callable[[Session], None]) -> None:
    """Close a session, and end what waits for the end of its transaction.

    It may have no transaction whose end would be told.
    """
    for name in _CLOSES:
        session.__dict__.pop(name, None)
    try:
        close(session)
    finally:
        state = state_for(session)
        waiting, state.waiting = state.waiting, None
        if waiting is not None:
            _finish(session, waiting, None, committed=False)


def _name_of(callable: Callable[[], object]) -> str:  # noqa: A002 - as above.
    return str(getattr(callable, "__qualname__", callable))


def _waiting_of(state: SessionState) -> Waiting:
    if state.waiting is None:
        state.waiting = Waiting()
    return state.waiting


def has_waiting_sends(session: Session) -> bool:
    """Tell whether callables wait for the commit of a session's open transaction."""
    state = state_of(session)
    return state is not None and state.waiting is not None and bool(state.waiting.entries)


def note_rollback(session: Session) -> None:
    """Note that what waits for a session's commit waits in vain.

    It does so on purpose, so nobody is warned.
    """
    state = state_of(session)
    if state is not None and state.waiting is not None:
        state.waiting.was_rolled_back = True


# The listeners below run for every Session of the process, also for those that nobody asked
# anything of. So they look for the state without a call, which would cost each transaction 0.3 us.


def _before_commit(session: Session) -> None:
    if session.in_nested_transaction():
        return
    state: SessionState = session.__dict__.get(STATE) or state_for(session)
    ledger = state.ledger
    if ledger is not None and ledger.failed_on is not None:
        ask_after_failure(ledger)
    state.is_committing = True
    if state.waiting is not None:
        write_joint(session, state.waiting)
    commits = commits_under_way.get()
    if commits is not None:
        _announce(session, commits)


def _announce(session: Session, commits: Commits) -> None:
    """Say whether a COMMIT is one of writes, while a request that may run again is under way."""
    is_writing = has_written(session) or is_unflushed(session)
    if not is_writing and commits.asks():
        is_writing = held_by(session).writes
    commits.begin_commit(is_writing=is_writing)


def _after_commit(session: Session) -> None:
    # SQLAlchemy fires this for a released SAVEPOINT as well as for the real COMMIT. It only says
    # here how the transaction that ends next has ended; also when nothing waits, because another
    # listener of this event may send.
    nested = session.get_nested_transaction()
    state: SessionState = session.__dict__.get(STATE) or state_for(session)
    state.committed_now = nested or session.get_transaction()
    commits = commits_under_way.get()
    if commits is not None and nested is None:
        sends = state.waiting is not None and bool(state.waiting.entries)
        commits.note_committed(wrote=has_written(session), sends=sends)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    state: SessionState | None = session.__dict__.get(STATE)
    if state is None:
        return
    if transaction.parent is None:
        state.is_committing = False
    committed, state.committed_now = state.committed_now is transaction, None
    if state.waiting is not None:
        _settle(session, transaction, state, state.waiting, committed)


def _settle(
    session: Session,
    transaction: SessionTransaction,
    state: SessionState,
    waiting: Waiting,
    committed: bool,
) -> None:
    """Drop what waited in a SAVEPOINT that was rolled back; finish with the outermost transaction.

    What waited in a SAVEPOINT that was released waits for the transaction around it.
    """
    if transaction.nested:
        mine = [entry for entry in waiting.entries if entry.transaction is transaction]
        if committed and transaction.parent is not None:
            outer = _outside(transaction.parent)
            for entry in mine:
                entry.transaction = outer
        elif mine:
            waiting.entries = [
                entry for entry in waiting.entries if entry.transaction is not transaction
            ]
            _undo(mine)
        waiting.was_rolled_back = False
    elif transaction.parent is None:
        for name in _CLOSES if waiting.ends else ():
            session.__dict__.pop(name, None)
        state.waiting = None
        owner = owner_of(session) if committed else None
        connection = callers_connection(session)
        if connection is None:
            _finish(session, waiting, owner, committed=committed)
        else:
            when_ended(connection, partial(_finish, session, waiting, owner), is_kept=committed)


def _outside(transaction: SessionTransaction) -> SessionTransaction:
    """Skip the subtransactions of flushes.

    An entry hangs on the outermost transaction or on a SAVEPOINT.
    """
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def _finish(session: Session, waiting: Waiting, owner: str | None, committed: bool) -> None:
    """Do all that waited for the end of a transaction.

    Args:
        session: Whose transaction it was.
        waiting: All that.
        owner: The request whose transaction it was, whose committed work must not be recorded as
            failed.
        committed: How it has ended.
    """
    entries, waiting.entries = waiting.entries, []
    ends, waiting.ends = waiting.ends, []
    failures: list[tuple[str, Exception]] = []
    own: Exception | None = None
    if committed:
        own = _run_committed(entries, owner, failures)
    else:
        _undo(entries)
        if not waiting.was_rolled_back and sys.exc_info()[0] is None:
            report_unsent(entries)
    for run, what in ends:
        try:
            made = run()
            if isinstance(made, CoroutineType):
                end_coroutine(made, what)
        except Exception as exc:
            failures.append((what, exc))
            if owner is not None or not committed:
                logger.exception("The transaction has ended, but %s failed after it", what)
    if committed or ends:
        _commit_what_followed(session, owner, failures, committed=committed)
    if failures and committed and owner is None:
        raise PublishError(
            tuple(f"{what}: {type(exc).__name__}: {exc}" for what, exc in failures)
        ) from failures[0][1]
    if own is not None:
        raise own


def _commit_what_followed(
    session: Session, owner: str | None, failures: list[tuple[str, Exception]], *, committed: bool
) -> None:
    """Commit what the callables have sent and written through the session: nobody else would.

    Where a transaction manager ends the session's transactions, that is left to it.
    """
    if not session.in_transaction() or zope.is_joined(session):
        return
    try:
        if has_waiting_sends(session) or is_unflushed(session) or held_by(session).writes:
            session.commit()
    except Exception as exc:
        what = "what its callables have sent and written"
        failures.append((what, exc))
        session.rollback()
        if owner is not None:
            logger.exception("%s is committed, but %s is not", owner, what)
        elif not committed:
            logger.exception("The transaction has ended, and %s is not committed", what)


def _run_committed(
    entries: list[Entry], owner: str | None, failures: list[tuple[str, Exception]]
) -> Exception | None:
    """Run what waited for the commit.

    Return the error of a task that ran eagerly, which is the caller's to see.
    """
    own: Exception | None = None
    for entry in entries:
        try:
            made = entry.run()
            if isinstance(made, CoroutineType):
                end_coroutine(made, entry.what)
        except Exception as exc:
            if getattr(entry.run, "raises_its_own", False) and (
                owner is None or getattr(entry.run, "fails_its_owner", False)
            ):
                own = own or exc
                continue
            failures.append((entry.what, exc))
            if owner is not None:
                logger.exception("%s is committed, but %s failed after it", owner, entry.what)
            _undo([entry])
    return own


def _undo(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.undo is None:
            continue
        try:
            entry.undo()
        except Exception:
            logger.exception(
                "%s came to nothing, and what it had taken could not be given back", entry.what
            )


event.listen(Session, "before_commit", _before_commit)
event.listen(Session, "after_commit", _after_commit)
event.listen(Session, "after_rollback", note_rollback)
event.listen(Session, "after_transaction_end", _after_transaction_end)
