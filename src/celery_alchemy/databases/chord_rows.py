"""The statements that count the parts of chords, but for what each database has of its own.

Between the tables and the databases' modules, whose ``tally()`` and ``add_unless_there()`` complete
them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sqlalchemy import (
    Connection,
    Float,
    Integer,
    Table,
    bindparam,
    type_coerce,
)
from sqlalchemy.types import NullType

from .tables import NOT_TRANSLATED, AnyColumn, Query, Rows, from_now

__all__ = ["READS_COMMITTED", "Tally", "new_part", "new_tally", "read_within", "told"]

#: The level at which a statement sees what others have committed before it began.
READS_COMMITTED = "READ COMMITTED"


class Tally(NamedTuple):
    """What a chord's row says, once its transaction has the row's lock.

    Attributes:
        size: How many parts the chord was sent with; None if nobody has said so.
        added: How many parts came to it later.
        counted: How many parts have ended.
        ended_at: When it ended, as the driver gives it; None until then.
    """

    size: int | None
    added: int
    counted: int
    ended_at: object


@lru_cache(maxsize=32)
def new_part(table: Table) -> dict[str, object]:
    """Return the values of a part's row, of parameters that are named ``new_`` and the column."""
    return {column.name: bindparam(f"new_{column.name}", type_=column.type) for column in table.c}


@lru_cache(maxsize=32)
def new_tally(table: Table) -> dict[str, object]:
    """Return the values of a chord's row, of parameters named as those of ``new_part()``.

    ``new_expires_at`` is seconds from now on the database's clock, or None.
    """
    values: dict[str, object] = {"id": bindparam("new_id", type_=table.c.id.type)}
    for name in ("size", "added", "counted"):
        values[name] = bindparam(f"new_{name}", type_=Integer())
    values["expires_at"] = from_now(bindparam("new_expires_at", type_=Float()))
    return values


def told(table: Table) -> tuple[AnyColumn, ...]:
    """Return the columns of a Tally."""
    c = table.c
    return c.size, c.added, c.counted, type_coerce(c.ended_at, NullType())


def read_within(connection: Connection, statement: Query) -> Rows:
    """Read in the open transaction."""
    return connection.execute(statement, execution_options=NOT_TRANSLATED).all()
