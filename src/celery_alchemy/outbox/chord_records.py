"""The records of chords, where the database is Celery's result backend: which parts have ended.

Beside the records of results, beneath the backend. Functions that take an ``OutboxTable`` leave its
transaction to their caller. A part is noted as the last thing that its transaction does: from then
on the other parts of its chord wait for the COMMIT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine, Table, delete, or_, select, update
from sqlalchemy.exc import OperationalError, ProgrammingError

from ..databases import database_of
from ..databases.chord_tables import CHORD_PARTS, CHORDS
from ..databases.tables import ID_MAX_LENGTH, Found, Query, from_now
from ..error_texts import storable
from .outbox import missing_table
from .place import OutboxTable, Place

__all__ = [
    "CHORD_ROWS",
    "LAST",
    "RUN_SEPARATOR",
    "Chord",
    "Ended",
    "Part",
    "add",
    "end",
    "forget_chord",
    "forget_runs",
    "may_note",
    "note",
    "parts_of",
    "prune_chords",
    "set_size",
    "state_of",
]

#: The position of a part that has none.
LAST = 2**31 - 1

#: Chords that are deleted at once, with their parts.
CHORD_ROWS = 100

#: Between the id of a chord and which run of it is meant, in a key.
RUN_SEPARATOR = ":"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a chord that has ended.

    Attributes:
        chord: The key of the chord's row.
        position: The part's place in what the body gets.
        task: The id of the part's task.
        status: Celery's state.
        value: What it returned or raised, as the serializer made it.
        size: How many parts the chord has, as the part's message says; None if it does not.
        expires_in_seconds: After how long the notes may go; None for never.
    """

    chord: str
    position: int
    task: str
    status: str
    value: bytes | None
    size: int | None = None
    expires_in_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Chord:
    """How far a chord has got.

    Attributes:
        is_complete: All of its parts have ended.
        has_ended: Its body was sent, or has failed.
    """

    is_complete: bool
    has_ended: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """A part of a chord as it was noted.

    Attributes:
        task: The id of its task.
        status: Celery's state.
        value: What it returned or raised, as the serializer made it.
    """

    task: str
    status: str
    value: bytes | None


def may_note(there: OutboxTable) -> bool:
    """Tell whether the open transaction can note a part; else one at READ COMMITTED must."""
    return database_of(there.connection.dialect.name).sees_counted(there.connection)


def note(there: OutboxTable, part: Part) -> Chord:
    """Note that a part has ended, once, and say how far its chord has got.

    Raises:
        MissingTableError: The tables have not been made.
    """
    values: dict[str, object] = {
        "new_id": part.chord,
        "new_position": part.position,
        "new_part": part.task,
        "new_status": storable(part.status, ID_MAX_LENGTH),
        "new_value": part.value,
    }

    def work() -> Chord:
        database = database_of(there.connection.dialect.name)
        # Before the chord's row, which is locked for as short as can be.
        is_new = database.add_unless_there(there.connection, _table(there, CHORD_PARTS), values)
        counted = 1 if is_new else 0
        chord = _tally(there, part.chord, part.expires_in_seconds, size=part.size, counted=counted)
        if is_new and chord.has_ended:
            # It was noted before, and the notes are gone.
            _delete_parts(there, [part.chord])
        return chord

    return _named(work)


def set_size(there: OutboxTable, chord: str, size: int, expires_in_seconds: float | None) -> None:
    """Write how many parts a chord has."""

    def work() -> None:
        _tally(there, chord, expires_in_seconds, size=size)
        chords = _table(there, CHORDS)
        # What the messages of its parts say may have come before.
        there.run(
            update(chords).where(chords.c.id == chord, chords.c.size != size).values(size=size)
        )

    _named(work)


def add(there: OutboxTable, chord: str, expires_in_seconds: float | None) -> None:
    """Have a chord wait for one more part."""
    _named(lambda: _tally(there, chord, expires_in_seconds, added=1))


def state_of(there: OutboxTable, chord: str, expires_in_seconds: float | None) -> Chord:
    """Say how far a chord has got; its row is the transaction's from then on."""
    return _named(lambda: _tally(there, chord, expires_in_seconds))


def parts_of(there: OutboxTable, chord: str) -> Sequence[Ended]:
    """Return the parts that have ended, by their positions; for who has the chord's lock."""
    c = _table(there, CHORD_PARTS).c
    chosen: Query = (
        select(c.part, c.status, c.value).where(c.id == chord).order_by(c.position, c.part)
    )
    rows = database_of(there.connection.dialect.name).read_counted(there.connection, chosen)
    return [_ended(row) for row in rows]


def _ended(row: Found) -> Ended:
    return Ended(row.part, row.status, None if row.value is None else bytes(row.value))


def end(there: OutboxTable, chord: str) -> None:
    """Write that a chord has ended; its row stays, for parts that are delivered again."""
    chords = _table(there, CHORDS)
    there.run(update(chords).where(chords.c.id == chord).values(ended_at=from_now(0)))
    _delete_parts(there, [chord])


def forget_chord(there: OutboxTable, chords: Sequence[str]) -> None:
    """Delete all notes of chords."""
    rows = _table(there, CHORDS)

    def work() -> None:
        _delete_parts(there, chords)
        there.run(delete(rows).where(rows.c.id.in_(chords)))

    _named(work)


def forget_runs(there: OutboxTable, chord_id: str) -> None:
    """Delete all notes of a chord, of each time that it was sent."""
    c = _table(there, CHORDS).c
    is_of_it = or_(c.id == chord_id, c.id.startswith(chord_id + RUN_SEPARATOR, autoescape=True))
    chosen = select(c.id).where(is_of_it)
    found = _named(lambda: there.run(chosen).scalars().all())
    if found:
        forget_chord(there, found)


def prune_chords(place: Place, engine: Engine) -> int:
    """Delete a batch of chords that have expired, with their parts, and return how many."""
    with place.begin(engine) as there:
        c = _table(there, CHORDS).c
        old = c.expires_at < select(from_now(0)).scalar_subquery()
        chords = sorted(there.run(select(c.id).where(old).limit(CHORD_ROWS)).scalars())
        if chords:
            forget_chord(there, chords)
        return len(chords)


def _delete_parts(there: OutboxTable, chords: Sequence[str]) -> None:
    parts = _table(there, CHORD_PARTS)
    there.run(delete(parts).where(parts.c.id.in_(chords)))


def _tally(
    there: OutboxTable,
    chord: str,
    expires_in_seconds: float | None,
    *,
    size: int | None = None,
    added: int = 0,
    counted: int = 0,
) -> Chord:
    values: dict[str, object] = {
        "new_id": chord,
        "new_size": size,
        "new_added": added,
        "new_counted": counted,
        "new_expires_at": expires_in_seconds,
    }
    database = database_of(there.connection.dialect.name)
    now = database.tally(there.connection, _table(there, CHORDS), values)
    is_complete = now.size is not None and now.counted >= now.size + now.added
    return Chord(is_complete, now.ended_at is not None)


def _table(there: OutboxTable, name: str) -> Table:
    schema = there.table.schema
    return there.table.metadata.tables[name if schema is None else f"{schema}.{name}"]


def _named(work: Callable[[], _T]) -> _T:
    """Do something, and name the table that is missing.

    Raises:
        MissingTableError: It has not been made.
    """
    try:
        return work()
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc
