"""What a plain ``delay()`` does inside of a task's open transaction.

Above ``sending.py``, whose ``hold`` keeps what waits for the commit. ``messages/recording.py`` asks
here before each send that nobody records.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial

from sqlalchemy.orm import Session

from ..errors import PublishInTransactionError, PublishInTransactionWarning
from ..messages.celery_types import App
from ..messages.message import Message
from ..messages.recording import Recorder
from ..outbox.outbox import HandOver
from ..outbox.place import is_same_database
from ..sessions.sources import is_open
from ..sessions.transaction import on_end
from ..sessions.uncommitted import has_written
from .attempt import UnitOfWork, at_hand
from .registry import Home, home_of
from .sending import hold, row_of

__all__ = ["intercept", "session_that_holds"]

# Whose frames lie between a call of delay() and the look at its transaction.
_SENDERS = frozenset({"celery", __name__.split(".")[0]})


def intercept(app: App) -> Recorder | None:
    """Judge a plain send.

    Inside a task's transaction with uncommitted writes it is warned of, refused, deferred or let
    through. Where SQLite is the broker, writing the message would wait for the transaction's own
    lock: it is refused or deferred then, and beside a transaction that only reads it is sent when
    that ends.

    Returns:
        A recorder that holds the message, or None to send now.

    Raises:
        PublishInTransactionError: ``publish_in_transaction="raise"``.
    """
    held = at_hand.get()
    if not isinstance(held, UnitOfWork) or held.used_session is None:
        return None
    session, home = held.used_session, home_of(app)
    is_locked = home is not None and home.is_broker and _has_only_lock(session, home)
    if not _has_unsaved(session):
        return Recorder(app, partial(_send_at_end, app, home, session)) if is_locked else None
    policy = "warn" if home is None else home.publish_in_transaction
    if policy == "raise":
        raise PublishInTransactionError(held.owner())
    if is_locked or policy == "defer":
        return Recorder(app, partial(_hold_plain, app, home, session))
    if policy == "warn":
        warnings.warn(PublishInTransactionWarning(held.owner()), stacklevel=_level_of_caller())
    return None


def _hold_plain(app: App, home: Home | None, session: Session, message: Message) -> None:
    """Let a plain send out after the session's commit; its id may be one that the caller chose."""
    hold(app, home, session, [message], chosen_id=True)


def _send_at_end(app: App, home: Home | None, session: Session, message: Message) -> None:
    """Send a plain message when the session's transaction has ended, whichever way."""
    # A database that is the broker keeps messages.
    assert home is not None
    assert home.outbox is not None
    on_end(session, HandOver(home.outbox, [row_of(app, home, message, chosen_id=True)]))


def session_that_holds(app: App) -> Session | None:
    """Return the session whose transaction holds back a plain send; None where it is sent now."""
    held, home = at_hand.get(), home_of(app)
    if home is None or home.publish_in_transaction != "defer" or not isinstance(held, UnitOfWork):
        return None
    session = held.used_session
    return session if session is not None and _has_unsaved(session) else None


def _has_only_lock(session: Session, home: Home) -> bool:
    """Tell whether a session holds the one lock that writing a message would need.

    Only SQLite has one. A message that was written now would wait for the lock of its own task.
    """
    if home.engine.dialect.name != "sqlite" or not session.in_transaction():
        return False
    return is_same_database(home.place.bind_of(session).engine, home.engine)


def _level_of_caller() -> int:
    """Return the stacklevel of the line that sent, seen from ``intercept``.

    It is the first outside of Celery and this package.
    """
    level, frame = 0, sys._getframe(1)
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _SENDERS
    ):
        level, frame = level + 1, frame.f_back
    return level + 1


def _has_unsaved(session: Session) -> bool:
    if not is_open(session):
        return False
    return bool(session.new or session.deleted or session.dirty) or has_written(session)
