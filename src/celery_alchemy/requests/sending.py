"""Sending tasks from a transaction.

The message is recorded now, and let out when the transaction has committed.

Above ``messages/recording.py`` and ``outbox/outbox.py``, below ``task.py``, whose
``delay_on_commit`` ends here. What a plain ``delay()`` does in a transaction is
``plain_sends.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from celery import Task
from celery.canvas import Signature
from sqlalchemy.orm import Session

from ..errors import (
    ConfigurationError,
    NoSessionError,
    SignatureError,
    UnknownTaskError,
)
from ..messages.celery_types import App, Fields, app_of, signed
from ..messages.message import Message
from ..messages.publisher import publish_directly
from ..messages.recording import recording
from ..outbox.outbox import HandOver, Outbox, Row, unique_id
from ..outbox.place import is_same_database
from ..sessions.any_session import AnySession, sync_session_of
from ..sessions.at_hand import alive
from ..sessions.off_loop import off_loop
from ..sessions.state import ledger_of
from ..sessions.transaction import on_commit, wait_for_commit
from ..signatures.options import MAPS, may_be_once, refuse_map
from .attempt import UnitOfWork, at_hand
from .eager import EagerSent
from .once_keys import once_row
from .registry import Home, home_of
from .start_locks import unlocking

__all__ = ["enqueue", "hold", "row_of", "session_at_hand"]


def enqueue(session: AnySession, signature: Signature, **options: Any) -> Any:
    """Send a signature when the session's outermost transaction has committed.

    Never if it rolls back.

    The message is finished here: arguments are serialised, ids are made for every task of the
    canvas, ``countdown`` and ``expires`` begin to count. With ``Alchemy(..., outbox=True)`` it is
    written to the outbox by the session's own COMMIT, so that a committed transaction's messages
    are published at least once whatever happens to this process and to the broker.

    Args:
        session: A Session, an AsyncSession, or a registry of either (scoped_session,
            async_scoped_session); a web request's, a script's, a task's.
        signature: A task's signature, chain, group, chord, with links and all.
        **options: As for ``Signature.apply_async``: ``countdown``, ``eta``, ``queue``, ``task_id``,
            ``headers`` ...

    Returns:
        The AsyncResult (GroupResult for a group) that ``apply_async`` would return; its id is
        final. With ``task_always_eager`` it has the task's outcome after the commit.

    Raises:
        SignatureError: It is no signature: a task without ``.s()``, None, a text.
        UnknownTaskError: The app has no such task.
        kombu.exceptions.EncodeError: The arguments cannot be serialised.
        MessageTooLargeError: The message is over ``max_message_bytes``.
    """
    signature = _checked(signature)
    is_canvas = signature.get("subtask_type") is not None
    if is_canvas and getattr(signature, "_frozen", None) is None:
        # A chain keeps the id that it is sent under: sent again it would be the same task, which a
        # once task does once.
        signature = signature.clone()
    app = app_of(signature)
    sync_session = sync_session_of(session)
    home = home_of(app)
    parts = list(_signatures(signature)) if is_canvas else [signature]
    _refuse_unknown(app, home, parts)
    _refuse_maps(app, parts)
    if app.conf.task_always_eager:
        sent = EagerSent(app, signature, options)
        on_commit(sync_session, sent, what=f"eager {signature.task}")
        return sent.result
    chosen_id = "task_id" in options or any(
        "task_id" in (part.get("options") or {}) for part in parts
    )
    with recording(app) as messages:
        result = signature.apply_async(**options)
    hold(app, home, sync_session, messages, chosen_id=chosen_id)
    return result


def _checked(signature: object) -> Signature:
    """Return a signature, also of one that came through a serializer as a dict.

    Raises:
        SignatureError: It is none.
    """
    # By the type: a Mock with a spec gives the spec out for its class.
    kind = type(signature)
    if isinstance(signature, Signature) and issubclass(kind, Signature):
        return signature
    if (
        isinstance(signature, dict)
        and issubclass(kind, dict)
        and isinstance(signature.get("task"), str)
    ):
        return signed(signature)
    if isinstance(signature, Task):
        name = str(signature.name)
        raise SignatureError(f"the task {name!r} itself", name)
    if signature is None:
        raise SignatureError("None")
    if isinstance(signature, str):
        raise SignatureError(f"the text {signature[:80]!r}", signature[:80])
    if isinstance(signature, Session):
        raise SignatureError("a Session; the session is the first argument")
    raise SignatureError(f"a {kind.__name__}")


def hold(
    app: App,
    home: Home | None,
    session: Session,
    messages: Sequence[Message],
    *,
    chosen_id: bool = False,
) -> None:
    """Let finished messages out after the session's commit.

    They go through the outbox if there is one, else directly.

    Args:
        app: The app whose broker they go to.
        home: What serves the app; None for an app without an Alchemy.
        session: Whose commit they wait for.
        messages: The finished messages, in order.
        chosen_id: The caller chose the task's id, so that it may have been used before.
    """
    undo = unlocking([(app.tasks.get(m.task_name) if m.task_name else None, m) for m in messages])
    try:
        _hold(app, home, session, messages, undo, chosen_id=chosen_id)
    except BaseException:
        if undo is not None:
            undo()
        raise


def _hold(
    app: App,
    home: Home | None,
    session: Session,
    messages: Sequence[Message],
    undo: Callable[[], None] | None,
    *,
    chosen_id: bool,
) -> None:
    what = f"sending {', '.join(sorted({m.task_name or 'event' for m in messages}))}"
    keeps = (
        home is not None and home.outbox is not None and (home.keeps_messages or _in_once(session))
    )
    if home is None or home.outbox is None or not keeps:
        wait_for_commit(
            session, partial(off_loop, partial(publish_directly, app, list(messages))), what, undo
        )
        return
    for message in messages:
        home.outbox.check(message)
    _refuse_other_database(home, home.outbox, session)
    rows = [row_of(app, home, message, chosen_id=chosen_id) for message in messages]
    wait_for_commit(session, HandOver(home.outbox, rows), what, undo)


def row_of(app: App, home: Home, message: Message, *, chosen_id: bool) -> Row:
    """Return a finished message as the row that it is kept in."""
    task = app.tasks.get(message.task_name) if message.task_name else None
    row = None if task is None else once_row(task, home, message)
    if row is None:
        return Row(unique_id(), message)
    row.may_exist = row.may_exist or chosen_id
    message.is_sole = home.is_broker and not row.may_exist
    return row


def _in_once(session: Session) -> bool:
    """Tell whether the session is a running ``once`` task's.

    What is sent in its transaction must be one with its completion, whoever sends it: the task, one
    that is called in it with its session, a thread of it.
    """
    ledger = ledger_of(session)
    if ledger is not None and ledger.once_owner:
        return True
    held = at_hand.get()
    return isinstance(held, UnitOfWork) and held.is_once and held.used_session is session


def _refuse_unknown(app: App, home: Home | None, parts: Sequence[Fields]) -> None:
    allowed = () if home is None else home.remote_tasks
    for name in (part["task"] for part in parts if part.get("subtask_type") is None):
        if name not in app.tasks and not any(fnmatchcase(name, pattern) for pattern in allowed):
            raise UnknownTaskError(name, app.main)


def _refuse_maps(app: App, parts: Sequence[Fields]) -> None:
    """Refuse a map of a ``once=True`` task that was made by hand: ``xmap(charge.s(), items)``."""
    for part in parts:
        if part["task"] in MAPS:
            called = app.tasks.get(part["kwargs"]["task"]["task"])
            if may_be_once(called):
                refuse_map(called, part["task"])


def _signatures(signature: Fields) -> Iterator[Fields]:
    """Yield a signature and all that it is made of."""
    yield signature
    for member in ("tasks", "header", "body"):
        inner = signature.get("kwargs", {}).get(member) if signature.get("subtask_type") else None
        members = inner if isinstance(inner, (list, tuple)) else [inner]
        for item in members:
            if isinstance(item, dict) and "task" in item:
                yield from _signatures(item)


def _refuse_other_database(home: Home, outbox: Outbox, session: Session) -> None:
    """Refuse a session of another database.

    Its transaction cannot carry a row of this one's outbox.

    Raises:
        ConfigurationError: It names both databases, or the session knows none for the table.
    """
    theirs, ours = outbox.place.bind_of(session).engine, home.engine
    if is_same_database(theirs, ours):
        return
    raise ConfigurationError(
        f"This session is bound to {theirs.url.render_as_string(hide_password=True)}, the outbox"
        " is in"
        f" {ours.url.render_as_string(hide_password=True)}: one transaction cannot span both.",
        "Use a session of the outbox's database, or an Alchemy with outbox=True for the other one.",
    )


def session_at_hand(what: str) -> Session:
    """Return the running request's session, or that of the innermost ``alchemy.session()`` block.

    Raises:
        NoSessionError: There is neither, or it has ended. A task is never silently sent early, and
            none waits for a commit that has been.
    """
    held = alive(at_hand.get())
    if held is None:
        raise NoSessionError(
            what,
            "Pass session=..., use enqueue(session, ...), or call it inside a task or a `with"
            " alchemy.session()` block.",
        )
    return held.session
