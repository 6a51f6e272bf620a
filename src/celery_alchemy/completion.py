"""The records of ``once`` tasks: which row is a task's, and what it says: owed, completed or dead.

Between the outbox's table and ``once.py``, which decides when these statements run. Every function takes a session and leaves the
transaction to its caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from celery.app.task import Context
from kombu.utils import json
from sqlalchemy import CursorResult, bindparam, case, insert, select, update
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from .entities import key_arguments
from .errors import OnceKeyError
from .message import Message
from .outbox import Row, end_of_lease, missing_table
from .registry import Home
from .tables import ID_MAX_LENGTH, from_now, outbox

__all__ = ["Ending", "State", "complete", "die", "key_of", "look", "once_row", "resend", "start", "track"]

#: How a completed run ended: it returned a value, replaced itself, or raised Ignore.
Ending = Literal["returned", "replaced", "ignored"]

#: The message header that names the row of a task which was sent through the outbox.
ROW_HEADER = "celery_alchemy_row"

#: Where a request says that its start has been counted. A new delivery, or a new process, has a new request.
_COUNTED = "celery_alchemy_counted"

ERROR_MAX_LENGTH = 10_000


@dataclass(frozen=True, slots=True)
class State:
    """What the table says of a task.

    Attributes:
        kind: ``"new"`` (no row), ``"owed"``, ``"completed"`` or ``"dead"``.
        ending: How a completed run ended.
        value: What it returned.
        error: Why a dead task died.
        fresh: It has just been found to be; the table does not say so yet.
        by: The task id of the run that committed, where tasks with other ids have the same key.
        starts: How many starts of an owed task, or of a ``fresh`` dead one, have not ended.
    """

    kind: Literal["new", "owed", "completed", "dead"]
    ending: Ending = "returned"
    value: Any = None
    error: str = ""
    fresh: bool = False
    by: str | None = None
    starts: int = 0


# --- whose row -------------------------------------------------------------------------------------------------------------


def key_of(task: Any, task_id: str, nesting: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the id of a ``once`` task's row.

    A task that replaced another has its task id, so the depth of replacement is part of the key.

    Raises:
        EntityReferenceError: An entity among the arguments is not one that the task takes.
        OnceKeyError: The user's key is no str, is empty, has white space at an end (which MySQL ignores), or a NUL (which PostgreSQL
            refuses); or it, or the task id that the caller chose, is too long.
    """
    if task.once_key is None:
        return _fitting(task, f"{task_id}/{nesting}" if nesting else task_id)
    key_args, key_kwargs = _taken_by(task.once_key, task, *key_arguments(task.entity_parameters, args, kwargs))
    key = task.once_key(*key_args, **key_kwargs)
    if not isinstance(key, str):
        raise OnceKeyError(task.name, f"is a {type(key).__name__!r}")
    if not key or key != key.strip() or "\0" in key:
        raise OnceKeyError(task.name, f"is {key!r}")
    return _fitting(task, f"{task.name}:{key}")


def _fitting(task: Any, row_id: str) -> str:
    if len(row_id) > ID_MAX_LENGTH:
        raise OnceKeyError(task.name, f"makes a row id of {len(row_id)} characters")
    return row_id


def _taken_by(
    make_key: Callable[..., Any], task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a key function takes of a task's arguments: the same, by position or by name, with a default left out or given.

    One whose parameters have other names than the task's gets the arguments as they were passed.
    """
    try:
        taken = inspect.signature(make_key).parameters.values()
        signature = inspect.signature(task.run)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    bound.apply_defaults()
    given = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return args, kwargs
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name))
    chosen = {}
    for parameter in taken:
        if parameter.kind is parameter.VAR_KEYWORD:
            return (), given
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            return args, kwargs
        if parameter.name in given:
            chosen[parameter.name] = given[parameter.name]
        elif parameter.default is parameter.empty:
            return args, kwargs
    return (), chosen


def once_row(task: Any, home: Home, message: Message) -> Row | None:
    """Return the row of a message of a ``once`` task; None for any other task.

    Raises:
        OnceKeyError: The task's key cannot be used.
    """
    if not getattr(task, "is_once", False) or message.task_id is None:
        return None
    nesting = int(message.headers.get("replaced_task_nesting") or 0)
    key = key_of(task, message.task_id, nesting, *message.arguments)
    if task.once_key is None:
        message.headers[ROW_HEADER] = key
    return Row(
        key,
        message,
        redeliver_seconds=task.redeliver_seconds(home, message.headers.get("timelimit")),
        max_deliveries=task.deliveries_allowed(home),
        may_exist=task.once_key is not None,
    )


# --- the statements --------------------------------------------------------------------------------------------------------


def start(session: Session, key: str, wait_seconds: float, max_deliveries: int, request: Context) -> State:
    """Count a start and put the next delivery off, or say that there is nothing to run.

    One statement for a task that was sent through the outbox, or that has never been seen. A request that is run again in its own
    process is counted once.

    Returns:
        What the table says; a ``fresh`` death, of too many starts, is for the caller to record.

    Raises:
        MissingTableError: The table has not been made.
    """
    try:
        sent_through_outbox = getattr(request, ROW_HEADER, None) == key
        begin = {"row_id": key, "wait": wait_seconds, "most": max_deliveries, "starts": 0 if was_counted(request) else 1}
        if sent_through_outbox and _changed(session, _START, begin):
            return State("owed")
        state = look(session, key)
        if state.kind == "new" and (request.delivery_info or {}).get("redelivered"):
            # It was delivered before, by a worker that is gone. From now on its starts are counted.
            track(session, key, request, deliveries=2)
            return State("owed")
        if state.kind != "owed" or (not sent_through_outbox and _changed(session, _START, begin)):
            return state
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc
    # Counted on, for what records the death may kill its process too.
    session.execute(_COUNT, {"row_id": key})
    error = f"it was started {max_deliveries} times and its process died each time"
    return State("dead", error=error, fresh=True, starts=state.starts)


def was_counted(request: Context) -> bool:
    """Tell whether this request's start has been counted."""
    return getattr(request, _COUNTED, False)


def note_counted(request: Context) -> None:
    """Note that this request's start has been counted, and is committed."""
    setattr(request, _COUNTED, True)


def count_end(session: Session, key: str) -> None:
    """Take back the count of a start that has ended, though the task is still to be done."""
    session.execute(_END, {"row_id": key})


def _changed(session: Session, statement: Any, parameters: dict[str, Any]) -> bool:
    result = cast("CursorResult[Any]", session.execute(statement, parameters))
    return result.rowcount == 1


def look(session: Session, key: str) -> State:
    """Say what the table says of a task."""
    found = session.execute(_LOOK, {"row_id": key}).one_or_none()
    if found is None:
        return State("new")
    if found.completed_at is not None:
        stored = json.loads(found.result) if found.result else {}
        return State("completed", stored.get("ending", "returned"), stored.get("value"), by=stored.get("by"))
    if found.died_at is not None:
        return State("dead", error=found.error or "")
    return State("owed", starts=found.deliveries)


def track(session: Session, key: str, request: Context, deliveries: int) -> None:
    """Write a row for a task that came past the outbox and whose process died, so that its starts are counted."""
    session.execute(_TRACK, {"id": key, "task_id": request.id, "task_name": cast("Any", request).task, "deliveries": deliveries})


def encoded(ending: Ending, value: Any, by: str | None) -> str:
    """Return a result as it is kept.

    Args:
        ending: How the run ended.
        value: What it returned.
        by: The id of the task, if tasks with other ids may have the same key.

    Raises:
        TypeError: It is nothing that Celery's JSON can carry.
    """
    kept = {"ending": ending, "value": value}
    return str(json.dumps(kept if by is None else {**kept, "by": by}))


def complete(session: Session, key: str, task_id: str | None, task_name: str, result: str, *, owed: bool) -> bool:
    """Record in the task's own transaction that it is done; one statement.

    Args:
        session: The task's.
        key: The task's row.
        task_id: For people.
        task_name: For people.
        result: As ``encoded()`` returned it.
        owed: The row exists.

    Returns:
        False if another run has committed the completion in between. A concurrent one is waited for.

    Raises:
        IntegrityError: As False, for a row that did not exist at the start.
    """
    if owed:
        return _changed(session, _COMPLETE, {"row_id": key, "outcome": result})
    session.execute(_INSERT_COMPLETED, {"id": key, "task_id": task_id, "task_name": task_name, "result": result})
    return True


def die(session: Session, key: str, error: str) -> bool:
    """Set an owed task aside with its error; False if there is no owed row."""
    return _changed(session, _DIE, {"row_id": key, "reason": error[:ERROR_MAX_LENGTH]})


def insert_dead(session: Session, row: Row, error: str) -> None:
    """Keep a task that came past the outbox, with the message that revives it."""
    session.execute(_INSERT_DEAD, {**row.values(None), "error": error[:ERROR_MAX_LENGTH]})


def resend(session: Session, row: Row, claim: str) -> bool:
    """Put a retry's message in the place of the one that is owed; False if there is no row yet."""
    return _changed(
        session,
        _RESEND,
        {
            "row_id": row.id,
            "new_body": row.message.body,
            "new_envelope": row.message.envelope(),
            "token": claim,
        },
    )


_OPEN = (outbox.c.id == bindparam("row_id"), outbox.c.completed_at.is_(None))

_START = (
    update(outbox)
    .where(*_OPEN, outbox.c.died_at.is_(None), outbox.c.deliveries + bindparam("starts") <= bindparam("most"))
    # A row that only counts starts has no message: were it ever due, the relay would take it for a corrupt one.
    .values(
        deliveries=outbox.c.deliveries + bindparam("starts"),
        claim=None,
        due_at=case((outbox.c.body.is_not(None), from_now(bindparam("wait")))),
    )
)

_COUNT = update(outbox).where(*_OPEN, outbox.c.died_at.is_(None)).values(deliveries=outbox.c.deliveries + 1)

_END = update(outbox).where(*_OPEN, outbox.c.deliveries > 0).values(deliveries=outbox.c.deliveries - 1)

_LOOK = select(outbox.c.completed_at, outbox.c.result, outbox.c.died_at, outbox.c.error, outbox.c.deliveries).where(
    outbox.c.id == bindparam("row_id")
)

_COMPLETE = (
    update(outbox)
    .where(*_OPEN)
    .values(
        completed_at=from_now(0),
        result=bindparam("outcome"),
        due_at=None,
        died_at=None,
        claim=None,
        error=None,
        body=None,
        envelope=None,
        deliveries=0,
    )
)

_DIE = (
    update(outbox)
    .where(*_OPEN, outbox.c.died_at.is_(None))
    .values(died_at=from_now(0), error=bindparam("reason"), due_at=None, claim=None)
)

_COUNTERS = {"sends": 0, "failures": 0, "once": True, "created_at": from_now(0)}

_INSERT_COMPLETED = insert(outbox).values(
    id=bindparam("id"),
    task_id=bindparam("task_id"),
    task_name=bindparam("task_name"),
    completed_at=from_now(0),
    result=bindparam("result"),
    deliveries=0,
    **_COUNTERS,
)

_TRACK = insert(outbox).values(
    id=bindparam("id"),
    task_id=bindparam("task_id"),
    task_name=bindparam("task_name"),
    deliveries=bindparam("deliveries"),
    **_COUNTERS,
)

_INSERT_DEAD = insert(outbox).values(
    id=bindparam("id"),
    task_id=bindparam("task_id"),
    task_name=bindparam("task_name"),
    redeliver_seconds=bindparam("redeliver_seconds"),
    max_deliveries=bindparam("max_deliveries"),
    body=bindparam("body"),
    envelope=bindparam("envelope"),
    error=bindparam("error"),
    died_at=from_now(0),
    deliveries=0,
    sends=0,
    failures=0,
    once=bindparam("once"),
    created_at=from_now(0),
)

_RESEND = (
    update(outbox)
    .where(*_OPEN)
    .values(
        body=bindparam("new_body"),
        envelope=bindparam("new_envelope"),
        claim=bindparam("token"),
        due_at=end_of_lease(),
        died_at=None,
        deliveries=0,
    )
)
