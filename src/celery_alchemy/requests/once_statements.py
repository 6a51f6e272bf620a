"""The statements by which the records of ``once`` tasks are read and changed.

Beneath ``once_records.py`` and ``once_start.py``, which execute them.
"""

from __future__ import annotations

from functools import lru_cache

from sqlalchemy import (
    ColumnElement,
    Insert,
    Integer,
    Table,
    and_,
    bindparam,
    case,
    delete,
    insert,
    select,
    update,
)

from ..databases import database_of
from ..databases.tables import from_now, outbox

_OPEN = (outbox.c.id == bindparam("row_id"), outbox.c.completed_at.is_(None))

#: Only the task that a row stands for may end it or change its message: another one with the same
#: key may come by. A direct call has no id.
_STANDS_FOR = outbox.c.task_id.is_not_distinct_from(bindparam("of", type_=outbox.c.task_id.type))

#: As many starts as a row counts at least: where the database is the broker, its first one leaves
#: no trace.
_STARTS = case(
    (
        outbox.c.deliveries < bindparam("uncounted", type_=Integer()),
        bindparam("uncounted", type_=Integer()),
    ),
    else_=outbox.c.deliveries,
) + bindparam("starts", type_=Integer())

START = (
    update(outbox)
    .where(
        *_OPEN,
        _STANDS_FOR,
        outbox.c.died_at.is_(None),
        bindparam("most", type_=Integer()) >= _STARTS,
    )
    # A row that only counts starts has no message: were it ever due, the relay would take it for a
    # corrupt one. One in a queue belongs to its worker for as long as that lives.
    .values(
        deliveries=_STARTS,
        claim=case((outbox.c.queue.is_not(None), outbox.c.claim)),
        due_at=case(
            (outbox.c.queue.is_not(None), outbox.c.due_at),
            (outbox.c.body.is_not(None), from_now(bindparam("wait"))),
        ),
    )
)

COUNT = (
    update(outbox)
    .where(*_OPEN, outbox.c.died_at.is_(None))
    .values(deliveries=outbox.c.deliveries + 1)
)

END = (
    update(outbox).where(*_OPEN, outbox.c.deliveries > 0).values(deliveries=outbox.c.deliveries - 1)
)

END_COUNT = delete(outbox).where(*_OPEN, outbox.c.body.is_(None), outbox.c.died_at.is_(None))

LOOK = select(
    outbox.c.completed_at,
    outbox.c.result,
    outbox.c.died_at,
    outbox.c.error,
    outbox.c.deliveries,
    outbox.c.task_id,
).where(outbox.c.id == bindparam("row_id"))

LOOK_AND_WAIT = LOOK.with_for_update()

_COMPLETED: dict[str, object] = {
    "completed_at": from_now(0),
    "result": bindparam("outcome"),
    "due_at": None,
    "died_at": None,
    "error": None,
    "deliveries": 0,
}

COMPLETE = update(outbox).where(*_OPEN).values(**_COMPLETED, claim=None, body=None, envelope=None)

#: Of a run that is completed.
CHANGE_RESULT = (
    update(outbox)
    .where(outbox.c.id == bindparam("row_id"), outbox.c.completed_at.is_not(None))
    .values(result=bindparam("outcome"))
)

#: Where the database is the broker, a message that its delivery still has something to do with is
#: there until its acknowledgement: were its worker lost before, it is delivered again.
_IS_IN_QUEUE = outbox.c.queue.is_not(None)
_CLAIM = case((_IS_IN_QUEUE, outbox.c.claim))

COMPLETE_AND_KEEP = (
    update(outbox)
    .where(*_OPEN)
    .values(
        **_COMPLETED,
        failures=0,
        claim=_CLAIM,
        body=case((_IS_IN_QUEUE, outbox.c.body)),
        envelope=case((_IS_IN_QUEUE, outbox.c.envelope)),
    )
)

#: Of a task that began without a look: one that has died meanwhile is left as it is.
COMPLETE_UNSEEN, COMPLETE_UNSEEN_AND_KEEP = (
    statement.where(outbox.c.died_at.is_(None)) for statement in (COMPLETE, COMPLETE_AND_KEEP)
)

#: What is left of a task whose work a guest has done: its message, whoever has it at the moment.
_MESSAGE = (
    "task_id",
    "task_name",
    "body",
    "envelope",
    "created_at",
    "due_at",
    "claim",
    "sends",
    "failures",
    "queue",
    "priority",
)

OWNERS = (
    select(*(outbox.c[name] for name in _MESSAGE))
    .where(
        *_OPEN,
        outbox.c.task_id.is_distinct_from(bindparam("of", type_=outbox.c.task_id.type)),
        outbox.c.body.is_not(None),
        outbox.c.died_at.is_(None),
    )
    .with_for_update()
)

KEEP_OWNERS = insert(outbox).values(
    id=bindparam("id"),
    once=False,
    deliveries=0,
    **{name: bindparam(name) for name in _MESSAGE},
)

END_OWNERS = delete(outbox).where(
    *_OPEN, _STANDS_FOR, outbox.c.once.is_(False), outbox.c.died_at.is_(None)
)

DIE = (
    update(outbox)
    .where(*_OPEN, _STANDS_FOR, outbox.c.died_at.is_(None))
    .values(died_at=from_now(0), error=bindparam("reason"), due_at=None, claim=_CLAIM, failures=0)
)

_COUNTERS = {"sends": 0, "failures": 0, "once": True, "created_at": from_now(0)}

_NEW_COMPLETED: dict[str, object] = {
    "id": bindparam("id"),
    "task_id": bindparam("task_id"),
    "task_name": bindparam("task_name"),
    "completed_at": from_now(0),
    "result": bindparam("outcome"),
    "deliveries": 0,
    **_COUNTERS,
}

INSERT_COMPLETED = insert(outbox).values(**_NEW_COMPLETED)


def _only_counts(table: Table) -> ColumnElement[bool]:
    """Tell whether a row counts the starts of this task, and has no message."""
    c = table.c
    return and_(
        c.task_id.is_not_distinct_from(bindparam("of", type_=c.task_id.type)),
        c.completed_at.is_(None),
        c.died_at.is_(None),
        c.body.is_(None),
    )


#: Of a task that another delivery of it has begun to count meanwhile.
COMPLETE_COUNTED = (
    update(outbox).where(outbox.c.id == bindparam("row_id"), _only_counts(outbox))
).values(**_COMPLETED, claim=None)


@lru_cache(maxsize=32)
def insert_completed_or_complete_counted(table: Table, dialect_name: str) -> Insert | None:
    """Return INSERT_COMPLETED and COMPLETE_COUNTED in one; None where the database cannot.

    Args:
        table: In its schema.
        dialect_name: SQLAlchemy's name of the database.
    """
    changed = {**_COMPLETED, "claim": None}
    database = database_of(dialect_name)
    return database.insert_or_change(table, _NEW_COMPLETED, changed, _only_counts(table))


TRACK = insert(outbox).values(
    id=bindparam("id"),
    task_id=bindparam("task_id"),
    task_name=bindparam("task_name"),
    deliveries=bindparam("deliveries"),
    **_COUNTERS,
)

INSERT_DEAD = insert(outbox).values(
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
    queue=bindparam("queue"),
    priority=bindparam("priority"),
)

RESEND = (
    update(outbox)
    .where(*_OPEN, _STANDS_FOR)
    .values(
        body=bindparam("new_body"),
        envelope=bindparam("new_envelope"),
        # A row that only counted starts has none.
        redeliver_seconds=bindparam("new_redeliver"),
        max_deliveries=bindparam("new_most"),
        claim=bindparam("token"),
        due_at=from_now(bindparam("due_in")),
        queue=bindparam("new_queue"),
        priority=bindparam("new_priority"),
        died_at=None,
        error=None,
        deliveries=0,
        failures=0,
    )
)

KEEP_MESSAGE = (
    update(outbox)
    .where(*_OPEN, _STANDS_FOR, outbox.c.body.is_(None))
    .values(
        task_id=bindparam("new_id"),
        body=bindparam("new_body"),
        envelope=bindparam("new_envelope"),
        redeliver_seconds=bindparam("new_redeliver"),
        max_deliveries=bindparam("new_most"),
        once=bindparam("is_once"),
        queue=bindparam("new_queue"),
        priority=bindparam("new_priority"),
    )
)
