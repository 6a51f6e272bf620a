"""The statement that keeps a result, but for what each database has of its own.

Between the tables and the databases' modules, whose ``keep_result()`` completes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sqlalchemy import Connection, Float, Table, bindparam

from .tables import NOT_TRANSLATED, Query, Values, from_now

__all__ = ["CHANGED", "new_values", "read_in_transaction"]

_GIVEN = ("status", "task_name", "result", "traceback", "details")

#: The columns that a later state of the same task changes; the one that is asked for comes last,
#: for MySQL changes a row column by column.
CHANGED: Sequence[str] = (*_GIVEN[1:], "done_at", "expires_at", _GIVEN[0])


@lru_cache(maxsize=32)
def new_values(table: Table) -> dict[str, object]:
    """Return the values of a row, of parameters that are named ``new_`` and the column.

    ``new_done_at`` and ``new_expires_at`` are seconds from now on the database's clock, or None.
    """
    values: dict[str, object] = {}
    for name in ("id", *_GIVEN):
        values[name] = bindparam(f"new_{name}", type_=table.c[name].type)
    for name in ("done_at", "expires_at"):
        values[name] = from_now(bindparam(f"new_{name}", type_=Float()))
    return values


def read_in_transaction(connection: Connection, statement: Query) -> Values:
    """Read a few rows, with values as the statement's types make them."""
    with connection.begin():
        return connection.execute(statement, execution_options=NOT_TRANSLATED).all()
