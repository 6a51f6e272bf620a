"""The table of results, where the database is Celery's result backend.

Beside the outbox's table; ``outbox/result_records.py`` reads and writes it.
"""

from __future__ import annotations

from sqlalchemy import Column, Index, MetaData, Table

from .column_types import BLOB, ID, TEXT, TIME

__all__ = ["FINAL", "RESULTS", "build_results"]

RESULTS = "celery_results"

#: The state that no later one replaces, as in Celery's own backends.
FINAL = "SUCCESS"


def build_results(metadata: MetaData, schema: str | None = None) -> Table:
    """Return the table, made in a MetaData.

    Its columns:

    ========== ==========================================================================
    id         the task's, or ``group:`` and the id of a saved group
    status     Celery's state, or one of the user's
    task_name  for people
    result     what the task returned or raised, as the result serializer made it
    traceback  of a failure
    details    children, group and, with ``result_extended``, arguments and more
    done_at    when the task ended; NULL until then
    expires_at when the row may go; NULL for never
    ========== ==========================================================================
    """
    table = Table(
        RESULTS,
        metadata,
        Column("id", ID, primary_key=True),
        Column("status", ID, nullable=False),
        Column("task_name", ID),
        Column("result", BLOB),
        Column("traceback", TEXT),
        Column("details", BLOB),
        Column("done_at", TIME),
        Column("expires_at", TIME),
        schema=schema,
    )
    Index(f"{RESULTS}_expires_at", table.c.expires_at)
    return table
