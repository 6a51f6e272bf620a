"""An owed ``once`` task outside of its run: its retry, the starts of processes that died, and its death.

Underneath ``once.py`` and ``failure.py``; the worker's parent process comes here too, when no child is left to do it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.orm import Session

from . import completion
from .completion import State
from .message import Message, recording
from .outbox import Row
from .transient import is_lost_connection, is_transient

__all__ = [
    "ATTEMPTS",
    "Overtaken",
    "count_lost_start",
    "error_text",
    "give_up",
    "in_session_of",
    "insist",
    "record_death",
    "resend_owed",
    "set_aside",
]

logger: logging.Logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: How often a change of a record is tried. On the stricter isolation levels all but one of several deliveries that start at once are
#: refused by the database, which is no failure of the task; each refusal means that another one has got on.
ATTEMPTS = 10


class Overtaken(Exception):  # noqa: N818 - a signal to begin again, not an error.
    """Another delivery changed the task's record meanwhile, and left it open: begin again, in a new transaction."""


def insist(act: Callable[[], _T]) -> _T:
    """Do something that ends its own transaction, again if the database has refused it in favour of another delivery.

    InnoDB chooses the victim of a deadlock among statements that write neighbours in an index, though no delivery waits for another.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return act()
        except Overtaken:
            continue
        except Exception as exc:
            if is_lost_connection(exc) or not is_transient(exc):
                raise
    return act()


def in_session_of(task: Any, work: Callable[[Session], Any]) -> Any:
    """Do something in a session of what serves a task, outside of its unit of work, and commit it."""
    with task.home().session() as session:
        result = work(session)
        session.commit()
    return result


def error_text(exc: BaseException) -> str:
    """Name an error for people: without the parameters of a statement, which SQLAlchemy's own text repeats."""
    cause = exc.orig if isinstance(exc, StatementError) and exc.orig is not None else exc
    try:
        said = str(cause)
    except Exception:
        logger.warning("A %s cannot be written as text", type(cause).__name__, exc_info=True)
        said = "(its text cannot be had)"
    # What no database takes: NUL, on PostgreSQL, and half of a surrogate pair, which has no UTF-8.
    return f"{type(exc).__name__}: {said}".replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def record_death(task: Any, key: str, error: str, in_own_session: Callable[[Callable[[Session], Any]], Any]) -> State | None:
    """Set a task aside that has failed for good; logged, never raised: the task's own error stands.

    Args:
        task: The task.
        key: Its row.
        error: Why it failed, for people.
        in_own_session: Does something in a session and transaction of its own and commits it.

    Returns:
        The completed state if the task's work turns out to have been committed; else None.
    """
    try:
        state: State = insist(lambda: in_own_session(lambda session: set_aside(session, task, key, error)))
    except Exception:
        logger.exception("Task %s[%s] failed for good and could not be recorded as dead", task.name, task.request.id)
        return None
    return state if state.kind == "completed" else None


def set_aside(session: Session, task: Any, key: str, error: str) -> State:
    """Make a task dead in the session's transaction.

    Returns:
        A ``fresh`` death, or what another delivery has written before: its death or its completion.

    Raises:
        Overtaken: Another delivery has written the record since we looked.
    """
    state = State("owed")
    if getattr(task.request, completion.ROW_HEADER, None) != key:
        # An UPDATE that finds no row may lock where others insert.
        state = completion.look(session, key)
    if state.kind == "owed" and not completion.die(session, key, error):
        state = completion.look(session, key)
        if state.kind == "owed":
            raise Overtaken(key)
    # Under task_always_eager there was no message, and to make one would run the task.
    if state.kind == "new" and not task.app.conf.task_always_eager:
        row = _row_of_request(task, key)
        try:
            completion.insert_dead(session, row, error)
        except IntegrityError as exc:
            raise Overtaken(key) from exc
    return State("dead", error=error, fresh=True) if state.kind in ("new", "owed") else state


def _row_of_request(task: Any, key: str) -> Row:
    """Make the row of a task that came past the outbox from its request, as it was before its first attempt."""
    request = task.request
    with recording(task.app) as messages:
        task.plain_signature_from_request(request, retries=0).apply_async()
    message: Message = messages[0]
    home = task.home()
    return Row(key, message, task.redeliver_seconds(home, request.timelimit), task.deliveries_allowed(home))


def resend_owed(task: Any, key: str, send: Callable[[], Any]) -> None:
    """Send a retry of a ``once`` task so that it stays owed: its message replaces the one in the record, then goes out.

    Args:
        task: The task.
        key: Its row.
        send: Sends the retry's message.
    """
    with recording(task.app) as messages:
        send()
    home = task.home()
    message = messages[0]
    message.headers[completion.ROW_HEADER] = key
    row = Row(key, message, task.redeliver_seconds(home, message.headers.get("timelimit")), task.deliveries_allowed(home))
    claim = uuid4().hex
    home.outbox.check(message)
    with home.session() as session:
        if not completion.resend(session, row, claim):
            row.may_exist = True
            home.outbox.write(session, [row], claim)
        session.commit()
    home.outbox.hand_over([row], claim)


def count_lost_start(task: Any) -> None:
    """Have the starts of a ``once`` task counted that came past the outbox and whose process died, in the parent process."""
    key = task.row_key()
    if key is None or getattr(task.request, completion.ROW_HEADER, None) == key:
        return

    def work(session: Session) -> None:
        if completion.look(session, key).kind == "new":
            completion.track(session, key, task.request, deliveries=1)

    in_session_of(task, work)


def give_up(task: Any, reason: str) -> None:
    """Set a ``once`` task aside that was revoked or has expired, so that it is not sent again."""
    key = task.row_key()
    if key is not None:
        in_session_of(task, lambda session: completion.die(session, key, f"the task was {reason}"))
