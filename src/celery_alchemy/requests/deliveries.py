"""An owed ``once`` task outside of its run.

That is its retry, the starts of processes that died, and its death.

Underneath ``once.py`` and ``failure.py``; the worker's parent process comes here too, when no child
is left to do it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from celery.app.task import Context
from sqlalchemy.exc import IntegrityError

from ..databases.transient import is_away, is_transient
from ..databases.trying_again import again, at_once
from ..messages.recording import recording
from ..outbox.outbox import ROW_HEADER, Outbox, Row
from ..outbox.place import OutboxTable
from ..sessions.ledger import NO_OPTIONS
from ..sessions.sources import SessionOptions
from . import once_records as completion
from .once_keys import owed_row, row_key, row_of_guest
from .once_records import State
from .plan import Plan
from .put_back import (
    insist_on,
    is_delivered_by_database,
    is_recording_end,
    may_pass,
    put_back,
)

__all__ = [
    "ATTEMPTS",
    "InOwnSession",
    "Overtaken",
    "count_lost_start",
    "give_up",
    "in_session_of",
    "insist",
    "record_death",
    "resend_owed",
    "set_aside",
    "waits_for_database",
]

logger: logging.Logger = logging.getLogger("celery_alchemy.once")

_T = TypeVar("_T")

#: How often a change of a record is tried. On the stricter isolation levels all but one of several
#: deliveries that start at once are refused by the database, which is no failure of the task; each
#: refusal means that another one has got on.
ATTEMPTS = 10


class InOwnSession(Protocol):
    """Does something with the records in a session and transaction of its own and commits it."""

    def __call__(self, work: Callable[[OutboxTable], _T]) -> _T: ...


class Overtaken(Exception):  # noqa: N818 - a signal to begin again, not an error.
    """Another delivery changed the task's record meanwhile, and left it open.

    Begin again, in a new transaction.
    """


def insist(act: Callable[[], _T]) -> _T:
    """Do something that ends its own transaction.

    It is done again if the database has refused it in favour of another delivery.

    InnoDB chooses the victim of a deadlock among statements that write neighbours in an index,
    though no delivery waits for another.
    """
    return again(act, at_once(ATTEMPTS, _is_in_favour_of_another))


def _is_in_favour_of_another(exc: Exception) -> bool:
    return isinstance(exc, Overtaken) or (is_transient(exc) and not is_away(exc))


def in_session_of(
    plan: Plan, work: Callable[[OutboxTable], _T], seconds: float | None = None
) -> _T:
    """Do something with the records in a session of its own, and commit it.

    The session comes from what serves the task, outside of its unit of work.

    Args:
        plan: What is known of the task.
        work: What is done.
        seconds: After these the database ends its statements, where it can; None for never.
    """
    options = NO_OPTIONS if seconds is None else SessionOptions(timeout_at=monotonic() + seconds)
    home = plan.required_home
    with home.source.opened(options) as session:
        result = work(home.place.within(session))
        session.commit()
    return result


def record_death(
    plan: Plan,
    request: Context,
    key: str,
    error: str,
    in_own_session: InOwnSession,
    rest: Callable[[float], object] | None = None,
) -> State | None:
    """Set a task aside that has failed for good; an error is logged: the task's own error stands.

    Where the database is the broker, one that is away is waited for.

    Args:
        plan: What is known of the task.
        request: Its request.
        key: Its row.
        error: Why it failed, for people.
        in_own_session: Does something with the records in a session and transaction of its own and
            commits it.
        rest: Waits for seconds; None for a thread that may sleep.

    Returns:
        The completed state if the task's work turns out to have been committed; else None.

    Raises:
        PutBack: The database stays away: the delivery is to go back.
    """

    def work() -> State:
        return insist(
            lambda: in_own_session(lambda table: set_aside(table, plan, request, key, error))
        )

    waits = waits_for_database(plan, request)
    what = f"The death of {plan.name}[{request.id}]"
    try:
        state = insist_on(work, what, rest=rest) if waits else work()
    except Exception as exc:
        if waits and may_pass(exc):
            raise put_back(exc) from exc
        logger.exception(
            "Task %s[%s] failed for good and could not be recorded as dead", plan.name, request.id
        )
        return None
    return state if state.kind == "completed" else None


def waits_for_database(plan: Plan, request: Context) -> bool:
    """Tell whether the end of a request waits for a database that is away.

    Its message is a row of that database: nothing else could be done meanwhile.
    """
    is_broker = plan.home is not None and plan.home.is_broker
    return is_broker and (is_recording_end.get() or is_delivered_by_database(plan, request))


def set_aside(table: OutboxTable, plan: Plan, request: Context, key: str, error: str) -> State:
    """Make a task dead in the table's transaction.

    A guest, whose key is owed by another task, dies in a row of its own: the key's work is still
    that other one's to do.

    Returns:
        A ``fresh`` death, or what another delivery has written before: its death or its completion.

    Raises:
        Overtaken: Another delivery has written the record since we looked.
    """
    state = State("owed")
    came_past = getattr(request, ROW_HEADER, None) != key
    if came_past:
        # An UPDATE that finds no row may lock where others insert.
        state = completion.look(table, key)
        if completion.is_guest(state, request):
            return _set_guest_aside(table, plan, request, error)
    if state.kind == "owed":
        if completion.die(table, key, error, request.id):
            if came_past and not plan.app.conf.task_always_eager:
                completion.keep_message(
                    table, _row_of_request(table, plan, request, key), request.id
                )
            return State("dead", error=error, fresh=True)
        state = completion.look(table, key)
        if completion.is_guest(state, request):
            # Its message named the row of the key, which another task has by now.
            return _set_guest_aside(table, plan, request, error)
        if state.kind == "owed":
            raise Overtaken(key)
    # Under task_always_eager there was no message, and to make one would run the task.
    if state.kind == "new" and not plan.app.conf.task_always_eager:
        row = _row_of_request(table, plan, request, key)
        try:
            completion.insert_dead(table, row, error)
        except IntegrityError as exc:
            raise Overtaken(key) from exc
    return State("dead", error=error, fresh=True) if state.kind == "new" else state


def _set_guest_aside(table: OutboxTable, plan: Plan, request: Context, error: str) -> State:
    own_id = row_of_guest(request)
    state = State("dead", error=error, fresh=True)
    if own_id is None or plan.app.conf.task_always_eager:
        return state
    row = _row_of_request(table, plan, request, own_id)
    # Revived, it is sent as a plain message: it asks for its key then, as it did before.
    row.redeliver_seconds = None
    if completion.die(table, own_id, error, request.id):
        completion.keep_message(table, row, request.id)
        return state
    try:
        completion.insert_dead(table, row, error)
    except IntegrityError as exc:
        raise Overtaken(own_id) from exc
    return state


def _row_of_request(table: OutboxTable, plan: Plan, request: Context, key: str) -> Row:
    """Make the row of a task that came past the outbox from its request.

    It is as it was before the first attempt.
    """
    # Celery's stubs leave a part of it out.
    task: Any = plan.task
    signature = plan.sign_again(request, retries=0)
    # As apply_async() sends, which would refuse arguments that do not fit: they may be the failure.
    options = {**task._get_exec_options(), **signature.options}
    with recording(plan.app) as messages:
        plan.app.send_task(task.name, signature.args, signature.kwargs, task_type=task, **options)
    row = owed_row(plan, key, messages[0], request.timelimit)
    return _outbox_of(plan).routed(table, [row])[0]


def _outbox_of(plan: Plan) -> Outbox:
    outbox = plan.required_home.outbox
    if outbox is None:
        raise RuntimeError(f"{plan.name} is owed, and nothing keeps it.")
    return outbox


def resend_owed(plan: Plan, key: str, send: Callable[[], object]) -> None:
    """Send a retry of a ``once`` task so that it stays owed.

    Its message replaces the one in the record, then goes out.

    Args:
        plan: What is known of the task.
        key: Its row.
        send: Sends the retry's message.
    """
    with recording(plan.app) as messages:
        send()
    home, outbox, message = plan.required_home, _outbox_of(plan), messages[0]
    message.headers[ROW_HEADER] = key
    row = owed_row(plan, key, message, message.headers.get("timelimit"))
    claim = uuid4().hex
    outbox.check(message)
    with home.session() as session:
        table = home.place.within(session)
        [row, *_] = outbox.routed(table, [row])
        if not completion.resend(table, row, claim):
            # There is no row yet; or it is another task's with the same key, and this message goes
            # out as a plain one, which names no row.
            row.may_exist = True
            outbox.write(session, [row], claim)
        session.commit()
    outbox.hand_over([row], claim)


def count_lost_start(plan: Plan, request: Context, seconds: float) -> None:
    """Have the starts of a ``once`` task counted whose process died, in the parent process.

    It came past the outbox, and has no row so far.
    """
    key = row_key(plan, request)
    if key is None or getattr(request, ROW_HEADER, None) == key:
        return

    def work(table: OutboxTable) -> None:
        row_id, state = key, completion.look(table, key)
        if completion.is_guest(state, request):
            row_id = str(row_of_guest(request))
            state = completion.look(table, row_id)
        if state.kind == "new":
            completion.track(table, row_id, request.id, plan.name, deliveries=1)

    in_session_of(plan, work, seconds)


def give_up(plan: Plan, request: Context, reason: str, seconds: float) -> None:
    """Set a ``once`` task aside that was revoked or has expired, so that it is not sent again.

    A row that stands for another task with the same key is left as it is.
    """
    key = row_key(plan, request)
    if key is not None:
        error = f"the task was {reason}"
        in_session_of(plan, lambda table: completion.die(table, key, error, request.id), seconds)
