"""Telling zope.sqlalchemy that a transaction has something to commit, though no row has changed.

Beneath the transaction. The package is not imported: what a session is joined with is among the
session's own listeners.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from sqlalchemy.orm import Session

__all__ = ["is_joined", "join", "mark_changed"]


@runtime_checkable
class _Join(Protocol):
    """zope.sqlalchemy's ``ZopeTransactionEvents``, from its version 1.4 on.

    Source:
    https://github.com/zopefoundation/zope.sqlalchemy/blob/4.1/src/zope/sqlalchemy/datamanager.py
    """

    def mark_changed(self, session: Session) -> None: ...

    def join_transaction(self, session: Session) -> None: ...


def mark_changed(session: Session) -> None:
    """Have the transaction manager that a session is joined to, if any, commit it.

    It closes the sessions that have flushed nothing, and never meets one that has no connection
    yet.
    """
    found = _join_of(session)
    if found is not None:
        found.mark_changed(session)


def join(session: Session) -> None:
    """Join a session to its transaction manager, if it has one.

    So it is ended with the others.
    """
    found = _join_of(session)
    if found is not None:
        found.join_transaction(session)


def is_joined(session: Session) -> bool:
    """Tell whether a transaction manager ends the transactions of a session."""
    return _join_of(session) is not None


def _join_of(session: Session) -> _Join | None:
    for listener in session.dispatch.after_flush:
        owner = getattr(listener, "__self__", None)
        # One attribute first: a protocol looks at all of them, 12 us for each message on Python
        # 3.11.
        if hasattr(owner, "join_transaction") and isinstance(owner, _Join):
            return owner
    return None
