"""Results, chords and completions where an INSERT has ON CONFLICT: PostgreSQL and SQLite.

Between ``result_rows.py`` and ``chord_rows.py`` and the two modules, which hand over their own
``insert()``. Sources: https://www.postgresql.org/docs/current/sql-insert.html#SQL-ON-CONFLICT,
https://www.sqlite.org/lang_upsert.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import sqlalchemy
from sqlalchemy import ColumnElement, Connection, Executable, Table, func
from sqlalchemy.dialects import postgresql, sqlite

from .chord_rows import Tally, new_part, new_tally, told
from .result_rows import CHANGED, new_values
from .result_table import FINAL
from .tables import NOT_TRANSLATED

__all__ = [
    "Insert",
    "add_unless_there",
    "insert_or_change",
    "keep_result",
    "no_insert_or_change",
    "tally",
]

#: The ``insert()`` of one of the two.
Insert: TypeAlias = Callable[[Table], postgresql.Insert] | Callable[[Table], sqlite.Insert]


def keep_result(
    insert: Insert, connection: Connection, table: Table, values: dict[str, object]
) -> None:
    """Write the result of a task, or its next state; a success that is there stays."""
    statement = _result_statement(insert, table)
    connection.execute(statement, values, execution_options=NOT_TRANSLATED)


@lru_cache(maxsize=32)
def _result_statement(insert: Insert, table: Table) -> Executable:
    new = insert(table).values(new_values(table))
    changed = {name: new.excluded[name] for name in CHANGED}
    return new.on_conflict_do_update(
        index_elements=["id"], set_=changed, where=table.c.status != FINAL
    )


def insert_or_change(
    insert: Insert,
    table: Table,
    values: Mapping[str, object],
    changed: Mapping[str, object],
    where: ColumnElement[bool],
) -> sqlalchemy.Insert:
    """Return an INSERT that changes the row of its ``id`` instead, if that meets a condition."""
    new = insert(table).values(values)
    return new.on_conflict_do_update(index_elements=["id"], set_=changed, where=where)


def no_insert_or_change(
    table: Table,
    values: Mapping[str, object],
    changed: Mapping[str, object],
    where: ColumnElement[bool],
) -> None:
    """Return None: the database has no such statement (as a database's ``insert_or_change``)."""


def add_unless_there(
    insert: Insert, connection: Connection, table: Table, values: dict[str, object]
) -> bool:
    """Insert a part of a chord; False if it is there."""
    statement = _part_statement(insert, table)
    added = connection.execute(statement, values, execution_options=NOT_TRANSLATED)
    return added.first() is not None


@lru_cache(maxsize=32)
def _part_statement(insert: Insert, table: Table) -> Executable:
    new = insert(table).values(new_part(table))
    return new.on_conflict_do_nothing().returning(table.c.id)


def tally(insert: Insert, connection: Connection, table: Table, values: dict[str, object]) -> Tally:
    """Add to the numbers of a chord, whose row is the transaction's from then on."""
    statement = _tally_statement(insert, table)
    row = connection.execute(statement, values, execution_options=NOT_TRANSLATED).one()
    return Tally(*row)


@lru_cache(maxsize=32)
def _tally_statement(insert: Insert, table: Table) -> Executable:
    new, c = insert(table).values(new_tally(table)), table.c
    changed = {
        "size": func.coalesce(c.size, new.excluded.size),
        "added": c.added + new.excluded.added,
        "counted": c.counted + new.excluded.counted,
        "expires_at": new.excluded.expires_at,
    }
    upsert = new.on_conflict_do_update(index_elements=["id"], set_=changed)
    return upsert.returning(*told(table))
