"""PostgreSQL: statement time-outs and read-only transactions, both ended by the transaction itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Executable, Row, Table, select, text, update

from ..tables import from_now, publishable

#: Of application_name. https://www.postgresql.org/docs/current/runtime-config-logging.html#GUC-APPLICATION-NAME
NAME_MAX_LENGTH = 63

_SET_NAME = text("SELECT set_config('application_name', :name, true)")


def configure(engine: Engine) -> None:
    """Nothing: the server's defaults are right for tasks."""


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool, application_name: str | None = None
) -> Sequence[str | Executable]:
    """Return the SET statements of a task's transaction.

    ``SET LOCAL`` and ``SET TRANSACTION`` end with the transaction, so a pooled connection carries nothing over, also behind
    PgBouncer in transaction mode. A statement time-out of 0 would switch the time-out off, so it is at least 1 ms.
    ``set_config(..., true)`` is SET LOCAL with a parameter: its text is the same for each task, so that drivers prepare it once.
    Sources: https://www.postgresql.org/docs/current/sql-set.html,
    https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-SET
    """
    statements: list[str | Executable] = []
    if timeout_seconds is not None:
        statements.append(f"SET LOCAL statement_timeout = {max(1, int(timeout_seconds * 1000))}")
    if read_only:
        statements.append("SET TRANSACTION READ ONLY")
    if application_name is not None:
        # The end of it, where the id is: the server would keep the beginning, and refuses zero bytes.
        shown = application_name.replace("\0", "?").encode("ascii", "replace").decode()[-NAME_MAX_LENGTH:]
        statements.append(_SET_NAME.bindparams(name=shown))
    return statements


def claim(connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int) -> Sequence[Row[Any]]:
    """Lease due rows in one statement.

    SKIP LOCKED lets relays pass each other. The CTE is MATERIALIZED because the planner may otherwise run the LIMIT again for each
    row and lease more than it. The time is asked for in a subquery, once: a volatile function is no condition of an index scan but a
    filter behind it, which would read every owed task at each look.
    Sources: https://www.postgresql.org/docs/current/sql-select.html#SQL-FOR-UPDATE-SHARE,
    https://www.postgresql.org/docs/current/xfunc-volatility.html
    """
    due = (
        select(table.c.id)
        .where(table.c.due_at <= select(from_now(0)).scalar_subquery())
        .order_by(table.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    statement = (
        update(table).where(table.c.id == due.c.id).values(claim=claim, due_at=from_now(lease_seconds)).returning(*publishable(table))
    )
    return connection.execute(statement).all()
