"""The records of results, where the database is Celery's result backend.

Beside the outbox, beneath the backend and the requests that write them. Functions that take a
``OutboxTable`` leave its transaction to their caller.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import ClassVar

from celery.app.task import Context
from sqlalchemy import Connection, Engine, Table, delete, or_, select, type_coerce
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm import Session
from sqlalchemy.types import NullType

from ..databases import database_of
from ..databases.result_table import RESULTS
from ..databases.tables import ID_MAX_LENGTH, Query, from_now
from ..error_texts import storable
from .chord_records import Chord, Part
from .outbox import missing_table
from .place import OutboxTable, Place

__all__ = [
    "RESULT_ROWS",
    "Record",
    "ResultKeeper",
    "ended",
    "forget",
    "keep",
    "key_of",
    "prune_results",
    "read",
]

#: Rows that are deleted, or read, at once. SQLite before 3.32 takes 999 parameters.
RESULT_ROWS = 400


@dataclass(frozen=True, slots=True)
class Record:
    """One state of a task, as it is kept.

    Attributes:
        status: Celery's state.
        result: What the task returned or raised, as the serializer made it.
        traceback: Of a failure.
        details: What else Celery keeps, as the serializer made it; None for nothing.
        task_name: For people.
        is_done: The state is one that a task ends in.
        expires_in_seconds: After how long the row may go; None for never.
        done_at: When the task ended, once it was written.
    """

    status: str
    result: bytes | None
    traceback: str | None = None
    details: bytes | None = None
    task_name: str | None = None
    is_done: bool = True
    expires_in_seconds: float | None = None
    done_at: datetime | None = None


class ResultKeeper(ABC):
    """A result backend whose rows a task's own transaction may write.

    Attributes:
        is_in_use: This process has made one. A worker makes its backend before the first body runs.
    """

    # Requests of other backends pay nothing for the question: it takes 2.6 us.
    is_in_use: ClassVar[bool] = False

    @abstractmethod
    def is_database_of(self, home: object) -> bool:
        """Tell whether the results are in the database whose sessions an Alchemy gives."""

    @abstractmethod
    def record_of_success(self, value: object, request: Context) -> Record:
        """Return what is to be kept of a task that has returned a value."""

    @abstractmethod
    def tell(self) -> None:
        """Tell whoever waits that a result is committed."""

    @abstractmethod
    def part_of(self, request: Context, value: object, status: str = "SUCCESS") -> Part | None:
        """Return what is to be noted of a task that has ended.

        None for one that is no part of a chord.
        """

    @abstractmethod
    def note_within(self, session: Session, request: Context, part: Part) -> Chord:
        """Note a part in a session's transaction.

        After the last one, send the chord's body there.
        """


def key_of(task_id: object) -> str:
    """Return the id of a task's row: its own, or a digest of one that no column could hold."""
    text = str(task_id)
    if len(text) <= ID_MAX_LENGTH and storable(text, ID_MAX_LENGTH) == text:
        return text
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def keep(there: OutboxTable, key: str, record: Record) -> None:
    """Write a state of a task; a success that is there stays as it is.

    Raises:
        MissingTableError: The table has not been made.
    """
    values: dict[str, object] = {
        "new_id": key,
        "new_status": storable(record.status, ID_MAX_LENGTH),
        "new_task_name": record.task_name,
        "new_result": record.result,
        "new_traceback": record.traceback,
        "new_details": record.details,
        "new_done_at": 0.0 if record.is_done else None,
        "new_expires_at": record.expires_in_seconds,
    }
    try:
        database = database_of(there.connection.dialect.name)
        database.keep_result(there.connection, _beside(there), values)
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc


def forget(there: OutboxTable, keys: Iterable[str]) -> None:
    """Delete rows."""
    table = _beside(there)
    try:
        for batch in _in_batches(sorted(keys)):
            there.run(delete(table).where(table.c.id.in_(batch)))
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc


def read(place: Place, engine: Engine, keys: Iterable[str]) -> Mapping[str, Record]:
    """Return the records that are there and have not expired, by their keys.

    Raises:
        MissingTableError: The table has not been made.
    """
    found: dict[str, Record] = {}
    with engine.connect() as connection:
        table = _beside(place.on(connection))
        c, lookup = table.c, database_of(connection.dialect.name).read
        columns = (c.id, c.status, c.result, c.traceback, c.details, c.task_name)
        for batch in _in_batches(list(keys)):
            chosen: Query = select(*columns, type_coerce(c.done_at, NullType())).where(
                c.id.in_(batch), or_(c.expires_at.is_(None), c.expires_at > from_now(0))
            )
            try:
                rows = lookup(connection, chosen)
            except (OperationalError, ProgrammingError) as exc:
                raise missing_table(exc) or exc from exc
            for key, status, result, traceback, details, name, done_at in rows:
                found[key] = Record(
                    status,
                    None if result is None else bytes(result),
                    traceback,
                    None if details is None else bytes(details),
                    name,
                    is_done=done_at is not None,
                    done_at=_moment(done_at),
                )
    return found


def ended(place: Place, connection: Connection, keys: Sequence[str]) -> Iterator[str]:
    """Yield the keys of those tasks that have ended."""
    c, lookup = _beside(place.on(connection)).c, database_of(connection.dialect.name).read
    for batch in _in_batches(keys):
        found = lookup(connection, select(c.id).where(c.id.in_(batch), c.done_at.is_not(None)))
        yield from (row[0] for row in found)


def prune_results(place: Place, engine: Engine) -> int:
    """Delete one batch of rows that have expired, and return how many."""
    with place.begin(engine) as there:
        table = _beside(there)
        c = table.c
        # The time in a subquery: the clock is asked once, and the index read.
        old = c.expires_at < select(from_now(0)).scalar_subquery()
        ids = sorted(there.run(select(c.id).where(old).limit(RESULT_ROWS)).scalars())
        if not ids:
            return 0
        # A row that was written anew meanwhile stays.
        return there.run(delete(table).where(c.id.in_(ids), c.expires_at < from_now(0))).rowcount


def _beside(there: OutboxTable) -> Table:
    table = there.table
    name = RESULTS if table.schema is None else f"{table.schema}.{RESULTS}"
    return table.metadata.tables[name]


def _in_batches(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), RESULT_ROWS):
        yield keys[start : start + RESULT_ROWS]


def _moment(value: object) -> datetime | None:
    """Return a time of the database as one of UTC."""
    if value is None:
        return None
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
