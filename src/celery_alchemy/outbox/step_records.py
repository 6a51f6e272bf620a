"""The records of steps: what the steps of a ``once`` task have returned, until it has completed.

Beneath ``once.py`` and ``steps.py``, which decide when these statements run. Every function takes
the tables as a transaction reaches them, and leaves the transaction to its caller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kombu.utils import json
from sqlalchemy import bindparam, delete, insert, literal, select, update
from sqlalchemy.exc import OperationalError, ProgrammingError

from ..databases.tables import from_now, outbox, steps
from ..error_texts import error_text
from ..errors import StepValueError
from .outbox import missing_table
from .place import OutboxTable

__all__ = [
    "MAX_VALUE_BYTES",
    "Record",
    "StepLog",
    "forget",
    "insert_step",
    "kept_value",
    "last_step",
    "load",
    "note_progress",
    "read_value",
]

logger: logging.Logger = logging.getLogger("celery_alchemy.step_records")

#: Bytes of a step's value as JSON. All values of a task are read at once when it goes on.
MAX_VALUE_BYTES = 1024 * 1024

_UNCHANGED_BY_JSON = frozenset({type(None), bool, int, str})


@dataclass(frozen=True, slots=True)
class Record:
    """A committed step.

    Attributes:
        name: Its name.
        position: Later ones have higher ones.
        value: What it returned, as JSON.
    """

    name: str
    position: int
    value: str


@dataclass(slots=True)
class StepLog:
    """The steps of one run of a task.

    Attributes:
        recorded: The values that earlier runs have left, as JSON, by the names of their steps.
        next_position: The position of the step that is committed next.
        done: The names that this run has asked for and got a value of, in order.
        running: The step that is under way; None if none is.
        is_loaded: What earlier runs have left is known.
        has_committed: This run has committed a step.
        committing: The step whose COMMIT has begun, and of which no end is known.
        was_overtaken: Another delivery has got on meanwhile, and this run's work is rolled back.
        broken_off: The step that was under way when something other than an Exception ended it.
        lock: Of an ``async def`` task: lets one step run at a time.
    """

    recorded: dict[str, str] = field(default_factory=dict)
    next_position: int = 1
    done: dict[str, None] = field(default_factory=dict)
    running: str | None = None
    is_loaded: bool = False
    has_committed: bool = False
    committing: str | None = None
    was_overtaken: bool = False
    broken_off: str | None = None
    lock: asyncio.Lock | None = None

    def add(self, records: Sequence[Record]) -> None:
        """Take note of records."""
        for record in records:
            self.recorded[record.name] = record.value
            self.next_position = max(self.next_position, record.position + 1)

    def report_unasked(self, owner: Callable[[], str]) -> None:
        """Say in the log which recorded steps the task has not asked for: its code has changed."""
        unasked = [name for name in self.recorded if name not in self.done]
        if unasked:
            logger.warning(
                "%s has completed without asking for %d of its recorded steps: %s",
                owner(),
                len(unasked),
                ", ".join(map(repr, unasked)),
            )


def kept_value(name: str, value: object, owner: str) -> tuple[str, object]:
    """Return a value as it is kept, and as every run gets it: what comes back from JSON.

    Raises:
        StepValueError: It is nothing that Celery's JSON can carry, or is too large.
    """
    try:
        text = str(json.dumps(value))
        returned = value if type(value) in _UNCHANGED_BY_JSON else json.loads(text)
    except Exception as exc:
        raise StepValueError(name, owner, f"is not JSON: {error_text(exc)}") from exc
    size = len(text.encode())
    if size > MAX_VALUE_BYTES:
        raise StepValueError(name, owner, f"has {size} bytes, over the limit of {MAX_VALUE_BYTES}")
    return text, returned


def read_value(text: str) -> object:
    """Return a value that was kept."""
    return json.loads(text)


def load(table: OutboxTable, key: str) -> list[Record]:
    """Return the recorded steps of a task in the order of their commits; one statement.

    Raises:
        MissingTableError: The table has not been made.
    """
    try:
        found = table.execute(_LOAD, {"row_id": key}).all()
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc
    return [Record(row.name, row.position, row.value) for row in found]


def insert_step(table: OutboxTable, key: str, name: str, position: int, text: str) -> bool:
    """Record a step in the transaction of its work; one statement.

    It also holds the task's own row as it is until the commit: a run that completes the task
    deletes its steps, and a slower one would find no record in the way of doing a step again.

    Returns:
        False if the task is completed or dead, or has no row.

    Raises:
        IntegrityError: Another run has committed this step. One that has not yet is waited for.
        MissingTableError: The table has not been made.
    """
    values = {"row_id": key, "step_name": name, "step_position": position, "step_value": text}
    try:
        return table.change(_INSERT, values) == 1
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc


def note_progress(table: OutboxTable, row_id: str) -> None:
    """Count the starts of a task anew: it gets on, so it is not what has ended its earlier runs."""
    table.execute(_PROGRESS, {"row_id": row_id})


def forget(table: OutboxTable, keys: Sequence[str]) -> None:
    """Delete all steps of some tasks."""
    # SQLite before 3.32 takes 999 parameters: https://www.sqlite.org/limits.html
    for start in range(0, len(keys), 500):
        table.execute(_FORGET, {"row_ids": list(keys[start : start + 500])})


def last_step(table: OutboxTable, key: str) -> str | None:
    """Return the name of the step of a task that was committed last; None if none was."""
    name: str | None = table.execute(_LAST, {"row_id": key}).scalar()
    return name


# --- the statements ------------------------------------------------------------------------------

_OF_TASK = steps.c.id == bindparam("row_id")

_COLUMNS = (steps.c.name, steps.c.position, steps.c.value)

_LOAD = select(*_COLUMNS).where(_OF_TASK).order_by(steps.c.position)

_LAST = select(steps.c.name).where(_OF_TASK).order_by(steps.c.position.desc()).limit(1)

# FOR SHARE, which SQLAlchemy leaves out for SQLite with its one writer: a snapshot would not show a
# completion that is about to be committed.
_INSERT = insert(steps).from_select(
    ["id", "name", "position", "value", "created_at"],
    select(
        outbox.c.id,
        bindparam("step_name", type_=steps.c.name.type),
        bindparam("step_position", type_=steps.c.position.type),
        bindparam("step_value", type_=steps.c.value.type),
        from_now(0),
    )
    .where(
        outbox.c.id == bindparam("row_id"),
        outbox.c.completed_at.is_(None),
        outbox.c.died_at.is_(None),
    )
    .with_for_update(read=True),
)

_PROGRESS = (
    update(outbox)
    .where(
        outbox.c.id == bindparam("row_id"),
        outbox.c.completed_at.is_(None),
        outbox.c.deliveries > literal(1),
    )
    .values(deliveries=1)
)

_FORGET = delete(steps).where(steps.c.id.in_(bindparam("row_ids", expanding=True)))
