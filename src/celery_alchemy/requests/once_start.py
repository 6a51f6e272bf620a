"""The start of a ``once`` task's run: what the table says of it, and the count of its starts.

Above ``once_records.py``, whose statements these are, and beneath ``once.py``. A start is one
statement that is a transaction by itself: were it in the body's own, a body that begins with slow
work would hold a connection, on SQLite the one lock for writing, and on MariaDB it would see the
database as it was before that work. A start needs no statement where the database holds the message
for this worker. What takes more than one statement is done in a transaction of the task's session.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from celery.app.task import Context
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError, ProgrammingError

from ..outbox.lone_statement import execute_alone
from ..outbox.outbox import ROW_HEADER, TAKEN_HEADER, missing_table, shown
from ..outbox.place import OutboxTable, Place
from . import once_records as records
from .once_keys import row_of_guest
from .once_records import State, is_guest, was_counted, was_delivered_before
from .once_statements import LOOK, START
from .plan import Plan

__all__ = ["Start", "begin", "begin_alone", "is_held"]


@dataclass(frozen=True, slots=True)
class Start:
    """A run that is about to begin.

    Attributes:
        key: The task's row.
        request: Celery's request.
        wait_seconds: After these an owed task is sent again.
        most: How many starts without an end make it dead.
        is_taken: Its message was taken out of the library's own table: that it is in a worker's
            hands is written there already, and whether another worker was lost with it.
        is_held: No other worker can have got its message, and no other message starts it: what it
            was when the message was taken, it is.
    """

    key: str
    request: Context
    wait_seconds: float
    most: int
    is_taken: bool = False
    is_held: bool = False

    @property
    def names_row(self) -> bool:
        """It was sent through the outbox, under the id of its row."""
        return getattr(self.request, ROW_HEADER, None) == self.key

    @property
    def counts(self) -> bool:
        """Its start has to be counted, where there is a row to count it in.

        A request that is run again in its own process is counted once. A message that was taken
        out of the table for the first time needs no count: nothing has died with it.
        """
        return not self.is_taken or was_delivered_before(self.request)

    def parameters(self, row_id: str | None = None) -> dict[str, object]:
        """Return those of START, for the task's row or another one."""
        is_new = not was_counted(self.request)
        # One that may be started once only is not dead before it has been started at all: a lost
        # worker may have had its message without having begun.
        uncounted = min(1, self.most - 1) if self.is_taken and is_new else 0
        return {
            "row_id": row_id or self.key,
            "of": shown(self.request.id),
            "wait": self.wait_seconds,
            "most": self.most,
            "starts": int(is_new),
            "uncounted": uncounted,
        }


def is_held(plan: Plan, request: Context) -> bool:
    """Tell whether the message of a request is this worker's alone; only once, to its first run."""
    taken = vars(request).pop(TAKEN_HEADER, None)
    outbox = plan.required_home.outbox
    if taken is None or outbox is None or outbox.queues is None:
        return False
    return outbox.queues.still_has(taken)


def begin_alone(place: Place, engine: Engine, start: Start) -> State | None:
    """Count a start or look, with statements that are transactions by themselves: one, or none.

    Returns:
        What the table says; None where ``begin()`` has to find out.

    Raises:
        DBAPIError: The pool has no connection to lend.
        Exception: The driver's own error.
    """
    if start.is_held and start.names_row and not start.counts:
        return State("owed", of=shown(start.request.id), is_unseen=True)
    execute = partial(execute_alone, place, engine)
    if not (start.names_row and start.counts):
        state = records.said_by(execute(LOOK, {"row_id": start.key}).row)
        if state.kind == "new":
            return None if was_delivered_before(start.request) else state
        if state.kind != "owed":
            return state
        if is_guest(state, start.request):
            return None
        if not start.counts:
            return state
    has_begun = execute(START, start.parameters()).changed == 1
    return State("owed", counted_in=start.key) if has_begun else None


def begin(table: OutboxTable, start: Start) -> State:
    """Count a start and put the next delivery off, or say that there is nothing to run.

    Returns:
        What the table says; a ``fresh`` death, of too many starts, is for the caller to record.

    Raises:
        MissingTableError: The table has not been made.
    """
    try:
        return _begin(table, start)
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc


def _begin(table: OutboxTable, start: Start) -> State:
    key, request = start.key, start.request
    was_tried = start.names_row and start.counts
    if was_tried and records.count_start(table, start.parameters()):
        return State("owed", counted_in=key)
    state = records.look(table, key)
    if is_guest(state, request):
        return _begin_guest(table, state, start)
    if state.kind == "new" and was_delivered_before(request):
        # By a worker that is gone. From now on its starts are counted.
        records.track(table, key, request.id, getattr(request, "task", ""), deliveries=2)
        return State("owed", counted_in=key)
    if state.kind != "owed" or not start.counts:
        return state
    if not was_tried and records.count_start(table, start.parameters()):
        return replace(state, counted_in=key)
    return _started_too_often(table, key, state.starts, start.most, state.error)


def _started_too_often(
    table: OutboxTable,
    row_id: str,
    starts: int,
    most: int,
    cut_by: str = "",
) -> State:
    # Counted on, for what records the death may kill its process too.
    records.count_on(table, row_id)
    error = f"it was started {most} times and its process died each time"
    if cut_by:
        error = (
            f"it was started {most} times, and each time its process died or its database was cut:"
            f" {cut_by}"
        )
    return State("dead", error=error, fresh=True, starts=starts)


def _begin_guest(table: OutboxTable, state: State, start: Start) -> State:
    """Begin a task whose key is owed by another one: its starts are counted in its own row."""
    request, own_id = start.request, row_of_guest(start.request)
    own = State("new") if own_id is None else records.look(table, own_id)
    if own.kind == "dead":
        return own
    if own_id is None or (own.kind == "new" and not was_delivered_before(request)):
        return state
    if own.kind == "new":
        records.track(table, own_id, request.id, getattr(request, "task", ""), deliveries=2)
    elif own.kind == "owed" and not records.count_start(table, start.parameters(own_id)):
        return _started_too_often(table, own_id, own.starts, start.most)
    return replace(state, counted_in=own_id)
