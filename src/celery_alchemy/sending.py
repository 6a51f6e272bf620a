"""Sending tasks from a transaction: record the message now, let it out when the transaction has committed.

Above ``message.py`` and ``outbox.py``, below ``task.py``, whose ``delay_on_commit`` ends here, and ``alchemy.py``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

from celery import Celery
from celery.canvas import Signature, maybe_signature
from sqlalchemy import Connection
from sqlalchemy.orm import Session

from .completion import once_row
from .errors import (
    ConfigurationError,
    NoSessionError,
    PublishInTransactionError,
    PublishInTransactionWarning,
    UnknownTaskError,
)
from .message import Message, Recorder, recording
from .outbox import HandOver, Row, bind_of, unique_id
from .publisher import publish_directly
from .registry import Home, home_of
from .request import UnitOfWork, at_hand
from .sessions import is_open
from .transaction import AnySession, has_written, on_commit, sync_session_of

__all__ = ["enqueue", "intercept", "session_at_hand"]

# Whose frames lie between a call of delay() and the look at its transaction.
_SENDERS = frozenset({"celery", __name__.split(".")[0]})


def enqueue(session: AnySession, signature: Signature, **options: Any) -> Any:
    """Send a signature when the session's outermost transaction has committed; never if it rolls back.

    The message is finished here: arguments are serialised, ids are made for every task of the canvas, ``countdown`` and
    ``expires`` begin to count. With ``Alchemy(..., outbox=True)`` it is written to the outbox by the session's own COMMIT, so that a
    committed transaction's messages are published at least once whatever happens to this process and to the broker.

    Args:
        session: A Session, an AsyncSession, or a registry of either (scoped_session, async_scoped_session); a web request's, a
            script's, a task's.
        signature: A task's signature, chain, group, chord, with links and all.
        **options: As for ``Signature.apply_async``: ``countdown``, ``eta``, ``queue``, ``task_id``, ``headers`` ...

    Returns:
        The AsyncResult (GroupResult for a group) that ``apply_async`` would return; its id is final.

    Raises:
        UnknownTaskError: The app has no such task.
        kombu.exceptions.EncodeError: The arguments cannot be serialised.
        MessageTooLargeError: The message is over ``max_message_bytes``.
    """
    signature = cast("Any", maybe_signature(signature))
    app = signature.app
    sync_session = sync_session_of(session)
    home = home_of(app)
    _refuse_unknown(app, home, signature)
    if app.conf.task_always_eager:
        result = signature.freeze(options.get("task_id"))
        on_commit(sync_session, partial(signature.apply_async, **options), what=f"eager {signature.task}")
        return result
    chosen_id = "task_id" in options or any("task_id" in (part.get("options") or {}) for part in _signatures(signature))
    with recording(app) as messages:
        result = signature.apply_async(**options)
    hold(app, home, sync_session, messages, chosen_id=chosen_id)
    return result


def hold(app: Celery[Any], home: Home | None, session: Session, messages: Sequence[Message], *, chosen_id: bool = False) -> None:
    """Let finished messages out after the session's commit: through the outbox if there is one, else directly.

    Args:
        app: The app whose broker they go to.
        home: What serves the app; None for an app without an Alchemy.
        session: Whose commit they wait for.
        messages: The finished messages, in order.
        chosen_id: The caller chose the task's id, so that it may have been used before.
    """
    keeps = home is not None and home.outbox is not None and (home.keeps_messages or _in_once(session))
    if home is None or home.outbox is None or not keeps:
        names = ", ".join(sorted({m.task_name or "event" for m in messages}))
        on_commit(session, partial(publish_directly, app, list(messages)), what=f"sending {names}")
        return
    for message in messages:
        home.outbox.check(message)
    _refuse_other_database(home, session)
    rows = [_row(app, home, message, chosen_id) for message in messages]
    on_commit(session, HandOver(home.outbox, rows), what="the outbox")


def _row(app: Celery[Any], home: Home, message: Message, chosen_id: bool) -> Row:
    task = app.tasks.get(message.task_name) if message.task_name else None
    row = None if task is None else once_row(task, home, message)
    if row is None:
        return Row(unique_id(), message)
    row.may_exist = row.may_exist or chosen_id
    return row


def _in_once(session: Session) -> bool:
    """Tell whether the session is a running ``once`` task's, whose sends must be one with its completion."""
    held = at_hand.get()
    return isinstance(held, UnitOfWork) and held.is_once and held.used_session is session


def _refuse_unknown(app: Celery[Any], home: Home | None, signature: Signature) -> None:
    allowed = () if home is None else home.remote_tasks
    for name in _task_names(signature):
        if name not in app.tasks and not any(fnmatchcase(name, pattern) for pattern in allowed):
            raise UnknownTaskError(name, app.main)


def _task_names(signature: Any) -> list[str]:
    return [part["task"] for part in _signatures(signature) if part.get("subtask_type") is None]


def _signatures(signature: Any) -> Iterator[Any]:
    """Yield a signature and all that it is made of."""
    yield signature
    for member in ("tasks", "header", "body"):
        inner = signature.get("kwargs", {}).get(member) if signature.get("subtask_type") else None
        members = inner if isinstance(inner, (list, tuple)) else [inner]
        for item in members:
            if isinstance(item, dict) and "task" in item:
                yield from _signatures(item)


def _refuse_other_database(home: Home, session: Session) -> None:
    """Refuse a session of another database: its transaction cannot carry a row of this one's outbox.

    Raises:
        ConfigurationError: It names both databases.
    """
    bind = bind_of(session)
    theirs = bind.engine if isinstance(bind, Connection) else bind
    ours = home.engine
    if theirs.url == ours.url or theirs.engine.pool is ours.pool:
        return
    same = ("host", "port", "database")
    if theirs.dialect.name == ours.dialect.name and all(getattr(theirs.url, part) == getattr(ours.url, part) for part in same):
        return
    raise ConfigurationError(
        f"This session is bound to {theirs.url.render_as_string(hide_password=True)}, the outbox is in"
        f" {ours.url.render_as_string(hide_password=True)}: one transaction cannot span both.",
        "Use a session of the outbox's database, or an Alchemy with outbox=True for the other one.",
    )


# --- without a session being named, and plain sends ----------------------------------------------------------------------


def session_at_hand(what: str) -> Session:
    """Return the running request's session, or that of the innermost ``alchemy.session()`` block.

    Raises:
        NoSessionError: There is neither. A task is never silently sent early.
    """
    held = at_hand.get()
    if held is None:
        raise NoSessionError(
            what,
            "Pass session=..., use enqueue(session, ...), or call it inside a task or a `with alchemy.session()` block.",
        )
    return held.session


def intercept(app: Celery[Any]) -> Recorder | None:
    """Judge a plain send: inside a task's transaction with uncommitted writes it is warned of, refused, deferred or let through.

    Returns:
        A recorder that holds the message until the commit (``"defer"``), or None to send now.

    Raises:
        PublishInTransactionError: ``publish_in_transaction="raise"``.
    """
    held = at_hand.get()
    if not isinstance(held, UnitOfWork):
        return None
    home = home_of(app)
    policy = "warn" if home is None else home.publish_in_transaction
    session = held.used_session
    if policy == "allow" or session is None or not _has_unsaved(session):
        return None
    if policy == "defer":
        return Recorder(app, lambda message: hold(app, home, session, [message]))
    if policy == "raise":
        raise PublishInTransactionError(held.owner())
    warnings.warn(PublishInTransactionWarning(held.owner()), stacklevel=_level_of_caller())
    return None


def _level_of_caller() -> int:
    """Return the stacklevel of the line that sent: the first outside of Celery and this package, seen from ``intercept``."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _SENDERS:
        level, frame = level + 1, frame.f_back
    return level + 1


def _has_unsaved(session: Session) -> bool:
    if not is_open(session):
        return False
    return bool(session.new or session.deleted or session.dirty) or has_written(session)
