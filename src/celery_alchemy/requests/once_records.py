"""The records of ``once`` tasks: which row is a task's, and what it says: owed, completed or dead.

Between the outbox's table and ``once.py``, which decides when these statements run. Every function
takes the table as a transaction reaches it, and leaves the transaction to its caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from celery.app.task import Context
from kombu.utils import json
from sqlalchemy import Insert, Update
from sqlalchemy.exc import IntegrityError

from ..databases.tables import Raw
from ..error_texts import error_text, storable
from ..errors import OnceResultError
from ..messages.celery_types import Fields
from ..outbox.outbox import Row, shown
from ..outbox.place import OutboxTable
from . import once_statements as statements

__all__ = [
    "Ending",
    "State",
    "add_held",
    "complete",
    "die",
    "is_guest",
    "keep_message",
    "keep_replacements_value",
    "kept",
    "look",
    "resend",
    "said_by",
    "track",
]

#: How a completed run ended: it returned a value, replaced itself, or raised Ignore.
Ending = Literal["returned", "replaced", "ignored"]

#: Where a request says that its start has been counted. A new delivery, or a new process, has a new
#: request.
_COUNTED = "celery_alchemy_counted"

_UNCHANGED_BY_JSON = frozenset({type(None), bool, int, str})


@dataclass(frozen=True, slots=True)
class State:
    """What the table says of a task.

    Attributes:
        kind: ``"new"`` (no row), ``"owed"``, ``"completed"`` or ``"dead"``.
        ending: How a completed run ended.
        value: What it returned.
        error: Why a dead task died, or by what an owed one was cut off.
        fresh: It has just been found to be; the table does not say so yet.
        by: The task id of the run that committed, where tasks with other ids have the same key.
        nesting: Of a run that replaced itself, how many with its id had done so before.
        starts: How many starts of an owed task, or of a ``fresh`` dead one, have not ended.
        of: The id of the task that an owed or dead row stands for: of several tasks with one key,
            the one that is sent again.
        counted_in: The row that counts this delivery's starts; None if none does.
        held: What tells the callbacks and the chain that a completed run has sent by its commit.
        is_unseen: Nobody has asked the table: it said so when the message was taken.
    """

    kind: Literal["new", "owed", "completed", "dead"]
    ending: Ending = "returned"
    value: object = None
    error: str = ""
    fresh: bool = False
    by: str | None = None
    nesting: int = 0
    starts: int = 0
    of: str | None = None
    counted_in: str | None = None
    held: tuple[str, ...] = ()
    is_unseen: bool = False


def is_guest(state: State, request: Context) -> bool:
    """Tell whether an owed row stands for another task than the one that runs."""
    return state.kind == "owed" and state.of != shown(request.id)


# --- the statements -------------------------------------------------------------------------------


def was_delivered_before(request: Context) -> bool:
    """Tell whether the broker says that a worker had this message before."""
    return bool((request.delivery_info or {}).get("redelivered"))


def was_counted(request: Context) -> bool:
    """Tell whether this request's start has been counted."""
    return getattr(request, _COUNTED, False)


def note_counted(request: Context) -> None:
    """Note that this request's start has been counted, and is committed."""
    setattr(request, _COUNTED, True)


def count_start(table: OutboxTable, begin: Mapping[str, object]) -> bool:
    """Count a start and put the next delivery off.

    False if there is no owed row, or the last one was allowed.
    """
    return _changed(table, statements.START, begin)


def count_on(table: OutboxTable, row_id: str) -> None:
    """Count a start beyond those that are allowed."""
    table.execute(statements.COUNT, {"row_id": row_id})


def count_end(table: OutboxTable, key: str) -> None:
    """Take back the count of a start that has ended, though the task is still to be done."""
    table.execute(statements.END, {"row_id": key})


def end_count(table: OutboxTable, row_id: str) -> None:
    """Remove the row that counted a guest's starts, as the guest's work is completed."""
    table.execute(statements.END_COUNT, {"row_id": row_id})


def _changed(
    table: OutboxTable, statement: Insert | Update, parameters: Mapping[str, object]
) -> bool:
    return table.execute(statement, parameters).rowcount == 1


def look(table: OutboxTable, key: str, *, waits: bool = False) -> State:
    """Say what the table says of a task.

    Args:
        table: In a transaction.
        key: The task's.
        waits: Until those have ended that change the row, or keep it as it is.
    """
    statement = statements.LOOK_AND_WAIT if waits else statements.LOOK
    return said_by(table.execute(statement, {"row_id": key}).one_or_none())


def said_by(found: Raw | None) -> State:
    """Say what a row says of its task, as ``statements.LOOK`` reads it; None is no row."""
    if found is None:
        return State("new")
    completed_at, result, died_at, error, starts, task_id = found
    if completed_at is not None:
        stored = json.loads(result) if result else {}
        ending = stored.get("ending", "returned")
        held = tuple(stored.get("held", ()))
        by, nesting = stored.get("by"), stored.get("nesting", 0)
        return State("completed", ending, stored.get("value"), by=by, nesting=nesting, held=held)
    if died_at is not None:
        return State("dead", error=error or "", of=task_id)
    return State("owed", starts=starts, of=task_id, error=error or "")


def track(
    table: OutboxTable, key: str, task_id: str | None, task_name: str, deliveries: int
) -> None:
    """Write a row for a task that came past the outbox, without its message.

    Its starts are counted in it, and its steps recorded.
    """
    names = {"task_id": shown(task_id), "task_name": shown(task_name)}
    table.execute(statements.TRACK, {"id": key, "deliveries": deliveries, **names})


def kept(
    ending: Ending,
    value: object,
    by: str | None,
    held: Sequence[str],
    owner: str,
    nesting: int = 0,
) -> tuple[str, object]:
    """Return a result as it is kept, and as every delivery reports it.

    It is what comes back from JSON, the first time too.

    Args:
        ending: How the run ended.
        value: What it returned.
        by: The id of the task, if tasks with other ids may have the same key.
        held: What tells the callbacks and the chain that are sent with it.
        owner: The task's name and the request's id, for the error.
        nesting: Of a run that replaces itself, how many with its id have done so before.

    Raises:
        OnceResultError: It is nothing that Celery's JSON can carry, both ways.
    """
    record = {"ending": ending, "value": value}
    if by is not None:
        record["by"] = by
    if nesting:
        record["nesting"] = nesting
    if held:
        record["held"] = list(held)
    try:
        text = str(json.dumps(record))
        return text, value if type(value) in _UNCHANGED_BY_JSON else json.loads(text)["value"]
    except Exception as exc:
        raise OnceResultError(owner, error_text(exc)) from exc


def complete(
    table: OutboxTable,
    key: str,
    task_id: str | None,
    task_name: str,
    result: str,
    *,
    owed: bool,
    keeps: bool = False,
    unseen: bool = False,
) -> bool:
    """Record in the task's own transaction that it is done; one statement.

    Args:
        table: In the task's transaction.
        key: The task's row.
        task_id: For people.
        task_name: For people.
        result: As ``kept()`` returned it.
        owed: The row exists.
        keeps: A message that was taken out of the table stays until its delivery is acknowledged,
            which has something to do after the COMMIT.
        unseen: It began without a look: that it is not dead is asked here.

    Returns:
        False if another run has committed the completion in between. A concurrent one is waited
        for.

    Raises:
        IntegrityError: As False, for a row that did not exist at the start.

    Guarantees: A row that another delivery of the same task has written meanwhile, only to count
        its starts in, is no obstacle: it is completed.
    """
    if owed:
        kinds = (statements.COMPLETE, statements.COMPLETE_AND_KEEP)
        if unseen:
            kinds = (statements.COMPLETE_UNSEEN, statements.COMPLETE_UNSEEN_AND_KEEP)
        statement = kinds[keeps]
        return table.change(statement, {"row_id": key, "outcome": result}) == 1
    return _complete_new(table, key, shown(task_id), shown(task_name), result)


def _complete_new(
    table: OutboxTable, key: str, task_id: str | None, task_name: str | None, result: str
) -> bool:
    values = {"id": key, "task_id": task_id, "task_name": task_name, "outcome": result}
    counted = {"row_id": key, "of": task_id, "outcome": result}
    dialect_name = table.connection.dialect.name
    both = statements.insert_completed_or_complete_counted(table.table, dialect_name)
    if both is not None:
        return table.change_here(both, {**values, "of": task_id}) == 1
    try:
        table.change(statements.INSERT_COMPLETED, values)
    except IntegrityError:
        return table.change(statements.COMPLETE_COUNTED, counted) == 1
    return True


def add_held(table: OutboxTable, key: str, held: Sequence[str]) -> None:
    """Note what was sent for another task with the key of a completed one, after that one's end."""
    record = _record_of(table, key)
    if record and held:
        _change_record(table, key, {**record, "held": [*record.get("held", ()), *held]})


def keep_replacements_value(table: OutboxTable, key: str, value: object) -> None:
    """Have the record of a run that replaced itself say what its replacement has returned."""
    record = _record_of(table, key)
    if record.get("ending") == "replaced":
        _change_record(table, key, {**record, "ending": "returned", "value": value})


def _record_of(table: OutboxTable, key: str) -> Fields:
    found = table.execute(statements.LOOK, {"row_id": key}).one_or_none()
    record: Fields = json.loads(found.result) if found is not None and found.result else {}
    return record


def _change_record(table: OutboxTable, key: str, record: Fields) -> None:
    outcome = str(json.dumps(record))
    table.execute(statements.CHANGE_RESULT, {"row_id": key, "outcome": outcome})


def die(table: OutboxTable, key: str, error: str, task_id: str | None) -> bool:
    """Set an owed task aside with its error.

    False if there is no owed row that stands for the task of this id.
    """
    return _changed(
        table, statements.DIE, {"row_id": key, "of": shown(task_id), "reason": storable(error)}
    )


def insert_dead(table: OutboxTable, row: Row, error: str) -> None:
    """Keep a task that came past the outbox, with the message that revives it."""
    table.execute(statements.INSERT_DEAD, {**row.values(None), "error": storable(error)})


def resend(table: OutboxTable, row: Row, claim: str) -> bool:
    """Put a retry's message in the place of the one that is owed.

    False if there is no row that stands for its task.
    """
    return _changed(
        table,
        statements.RESEND,
        {
            "row_id": row.id,
            "of": shown(row.message.task_id),
            "new_body": row.message.body,
            "new_envelope": row.message.envelope(),
            "token": None if row.queue else claim,
            "due_in": row.due_in_seconds,
            "new_queue": row.queue,
            "new_priority": row.values(None)["priority"],
            "new_redeliver": row.redeliver_seconds,
            "new_most": row.max_deliveries,
        },
    )


def keep_message(table: OutboxTable, row: Row, task_id: str | None) -> None:
    """Keep the message with which a task can be revived, in a row that had none.

    Such a row only counted starts, or holds steps.

    Args:
        table: In a transaction.
        row: The row with its message.
        task_id: The id that the row has so far; None for a direct call, whose message brings one.
    """
    table.execute(
        statements.KEEP_MESSAGE,
        {
            "row_id": row.id,
            "of": shown(task_id),
            "new_id": shown(row.message.task_id),
            "new_body": row.message.body,
            "new_envelope": row.message.envelope(),
            "new_redeliver": row.redeliver_seconds,
            "new_most": row.max_deliveries,
            "is_once": row.once,
            "new_queue": row.queue,
            "new_priority": row.values(None)["priority"],
        },
    )
