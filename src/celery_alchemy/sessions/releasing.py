"""Giving a session's connection back in between: ``released``, and what it refuses to lose.

Above the transaction, beside the life of a request. Works for every Session, whoever made it.
"""

from __future__ import annotations

from types import TracebackType

from sqlalchemy.orm import Session

from ..errors import ConfigurationError, LocksHeldError, UncommittedChangesError
from ..errors.sessions import OPEN_SAVEPOINT
from .any_session import AnySession, in_scope, sync_session_of
from .sources import is_open
from .transaction import has_waiting_sends
from .uncommitted import has_written, held_by, is_unflushed

__all__ = ["released", "uncommitted_changes"]

_WRITES = "uncommitted writes (of the body, or of what is around it)"

# PostgreSQL gives a transaction its id for any of these.
_UNSEEN = (
    "uncommitted writes that no statement shows (of a function or the driver's cursor), or what"
    " the database cannot tell from them: LOCK TABLE, a SAVEPOINT past the session that was rolled"
    " back"
)


def uncommitted_changes(session: Session) -> str | None:
    """Say what of a session's work is neither committed nor rolled back.

    None when there is nothing.
    """
    return _shown(session) or (_WRITES if held_by(session).writes else None)


def _shown(session: Session) -> str | None:
    """Say what there is without asking the database."""
    if not is_open(session):
        return None
    if session.in_nested_transaction():
        return OPEN_SAVEPOINT
    if is_unflushed(session):
        return "unflushed changes"
    if not has_waiting_sends(session):
        return None
    return "sends or callables of on_commit that wait for the commit"


class released:  # noqa: N801 - used as a function: with released(session): ...
    """Give the session's connection back to its pool around slow work.

    Slow work is an HTTP call, an embedding, a language model.

    Ends the transaction, which must only have read. Objects stay loaded and usable; the next use of
    the session, inside the block or after it, begins a new transaction, which may see what others
    have committed meanwhile. ``async with`` for an AsyncSession.

    What no statement shows, of a function or of the driver's own cursor, is asked of the database:
    PostgreSQL knows it, SQLite for sessions that celery-alchemy made, MySQL and MariaDB do not. Of
    a session that celery-alchemy did not make, these know what its unit of work has flushed.

    Args:
        session: A Session, an AsyncSession, or a registry of either (scoped_session,
            async_scoped_session).
        commit: Commit what was written first; row locks end with it.
        locks: False to let row locks go, which end with the transaction.

    Raises:
        UncommittedChangesError: There is work that is not committed: unflushed objects, writes,
            pending sends, an open SAVEPOINT (also with ``commit=True``).
        ConfigurationError: ``with`` was given an AsyncSession, or ``async with`` a Session.
        LocksHeldError: The transaction holds row locks: of ``ForUpdate`` entities,
            ``with_for_update`` or FOR UPDATE and FOR SHARE in text.

    Guarantees: What it refuses is left as it is. Nothing is asked of the database before it is
    called.
    """

    def __init__(self, session: AnySession, *, commit: bool = False, locks: bool = True) -> None:
        self._given: AnySession = session
        self._commit = commit
        self._keeps_locks = locks

    def __enter__(self) -> None:
        given = in_scope(self._given)
        if not isinstance(given, Session) and hasattr(given, "sync_session"):
            raise ConfigurationError(
                "`with released(...)` was given an AsyncSession, whose transaction cannot be ended"
                " without await.",
                "Write `async with released(session)`.",
            )
        self._release(sync_session_of(given))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    async def __aenter__(self) -> None:
        given = in_scope(self._given)
        if not hasattr(given, "run_sync"):
            sync_session_of(given)
            raise ConfigurationError(
                "`async with released(...)` was given a plain Session.",
                "Write `with released(session)`.",
            )
        await given.run_sync(self._release)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def _release(self, session: Session) -> None:
        if not is_open(session):
            return
        what = _shown(session)
        if what == OPEN_SAVEPOINT or (what is not None and not self._commit):
            raise UncommittedChangesError(what)
        if not self._commit:
            self._refuse_loss(session)
        if session.in_transaction():
            _commit_without_expiry(session)

    def _refuse_loss(self, session: Session) -> None:
        held = held_by(session)
        if held.writes:
            raise UncommittedChangesError(_WRITES if has_written(session) else _UNSEEN)
        if held.locked and self._keeps_locks:
            raise LocksHeldError(held.locked)


def _commit_without_expiry(session: Session) -> None:
    expire, session.expire_on_commit = session.expire_on_commit, False
    try:
        session.commit()
    finally:
        session.expire_on_commit = expire
