"""What a ``once`` task owes another one with the same key: its message, and its report.

Beneath ``once.py``. The row of a key is the message of the task that was sent first, its owner. A
guest that does the work completes that row, and the owner's callbacks, chain and chord still wait
for its report. So the message goes on as a plain one, in a row of its own under its task's id,
until a delivery of it has reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from celery.app.task import Context
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from ..outbox.outbox import shown, unique_id
from ..outbox.place import OutboxTable
from . import once_records as records
from . import once_statements as statements
from .continuation import drop_held, held_ids, hold_continuation
from .once_keys import row_of_guest
from .once_records import State, is_guest
from .own_result import OwnResult, own_result
from .plan import Plan

__all__ = [
    "end_guests_count",
    "end_unreported",
    "is_of_another",
    "keep_owners_message",
    "report_kept",
]

logger: logging.Logger = logging.getLogger("celery_alchemy.once")


def is_of_another(state: State, request: Context) -> bool:
    """Tell whether a row may hold the message of another task than the one that runs."""
    return state.of is not None and is_guest(state, request)


def keep_owners_message(table: OutboxTable, key: str, request: Context) -> None:
    """Keep the message of the task that a row stands for, as a guest is about to complete it.

    Whoever has the message at the moment has it still: a worker that is lost loses both. The row
    is the transaction's from here on.

    Args:
        table: In the guest's transaction.
        key: The row.
        request: The guest's.
    """
    found = table.execute(statements.OWNERS, {"row_id": key, "of": shown(request.id)}).one_or_none()
    if found is None:
        return
    values = dict(found._mapping)
    if values["queue"] is None:
        # The claim of a process that hands the row over, which does not know the new one.
        values["claim"] = None
    try:
        with table.connection.begin_nested():
            table.execute(statements.KEEP_OWNERS, {**values, "id": found.task_id})
    except IntegrityError:
        # Of an earlier attempt of it: that one is not acknowledged yet.
        table.execute(statements.KEEP_OWNERS, {**values, "id": unique_id()})


def report_kept(
    plan: Plan,
    request: Context,
    outer: object,
    key: str,
    state: State,
    in_own_session: Callable[[Callable[[Session], Collection[str]]], Collection[str]],
) -> None:
    """Report what a guest has done, for the owner, in one transaction with the end of its message.

    Its callbacks and chain are none of the tracer's any more, also where another delivery of it has
    reported meanwhile. Does nothing for a task whose message was not kept: that is the tracer's to
    report.

    Args:
        plan: The task's.
        request: The owner's.
        outer: What was at hand before it began.
        key: The row of the completion.
        state: The guest's completion.
        in_own_session: Does something in a session and transaction of its own and commits it.
    """
    own: OwnResult | None = None

    def report(session: Session) -> Collection[str]:
        nonlocal own
        own, table = None, plan.required_home.place.within(session)
        _end_count(table, request)
        message = {"row_id": shown(request.id), "of": shown(request.id)}
        if table.execute(statements.END_OWNERS, message).rowcount != 1:
            return records.look(table, key).held
        if state.ending == "returned":
            hold_continuation(plan, request, session, state.value)
            own = own_result(plan, request, outer, state.value)
        if own is not None:
            own.write_by(session)
        held = held_ids(plan, request)
        records.add_held(table, key, held)
        return held

    try:
        held = in_own_session(report)
    except DBAPIError:
        if plan.required_home.is_broker:
            # The delivery goes back to its queue, or fails with its database.
            raise
        logger.warning("%s[%s] reports twice", plan.name, request.id, exc_info=True)
        return
    if own is not None:
        own.is_committed()
    drop_held(request, held)


def end_guests_count(
    plan: Plan, request: Context, in_own_session: Callable[[Callable[[Session], None]], None]
) -> None:
    """Remove the row that counted a guest's starts: its key is dead, and it has nothing to run.

    Args:
        plan: The task's.
        request: The guest's.
        in_own_session: Does something in a session and transaction of its own and commits it.
    """

    def end(session: Session) -> None:
        _end_count(plan.required_home.place.within(session), request)

    _try_to(end, plan, request, in_own_session)


def _try_to(
    end: Callable[[Session], None],
    plan: Plan,
    request: Context,
    in_own_session: Callable[[Callable[[Session], None]], None],
) -> None:
    try:
        in_own_session(end)
    except DBAPIError:
        logger.warning("%s[%s] leaves its count behind", plan.name, request.id, exc_info=True)


def end_unreported(
    plan: Plan,
    request: Context,
    error: str,
    in_own_session: Callable[[Callable[[Session], None]], None],
) -> None:
    """End a task that has nothing to run, and nothing to report of who did its work.

    Its message, if it was kept, is not sent again: it is dead, with the error.
    """

    def end(session: Session) -> None:
        table = plan.required_home.place.within(session)
        _end_count(table, request)
        records.die(table, str(shown(request.id)), error, request.id)

    _try_to(end, plan, request, in_own_session)


def _end_count(table: OutboxTable, request: Context) -> None:
    own_id = row_of_guest(request)
    if own_id is not None:
        records.end_count(table, own_id)
