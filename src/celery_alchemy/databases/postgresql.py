"""PostgreSQL: statement time-outs and read-only transactions, both ended by the transaction itself."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine


def configure(engine: Engine) -> None:
    """Nothing: the server's defaults are right for tasks."""


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool
) -> Sequence[str]:
    """Return the SET statements of a task's transaction.

    ``SET LOCAL`` and ``SET TRANSACTION`` end with the transaction, so a pooled connection carries nothing over, also behind
    PgBouncer in transaction mode. 0 would switch the time-out off, so it is at least 1 ms.
    Source: https://www.postgresql.org/docs/current/sql-set.html
    """
    statements = []
    if timeout_seconds is not None:
        statements.append(f"SET LOCAL statement_timeout = {max(1, int(timeout_seconds * 1000))}")
    if read_only:
        statements.append("SET TRANSACTION READ ONLY")
    return statements
