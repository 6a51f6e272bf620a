"""MySQL and MariaDB: statement time-outs, which hold for the connection and are taken back at its check-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Row, Table, event, select, update
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from ..tables import from_now, publishable

_LIMITED = "celery_alchemy.statement_limited"


def configure(engine: Engine) -> None:
    """Nothing: the server's defaults are right for tasks."""


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool, application_name: str | None = None
) -> Sequence[str]:
    """Return the SET statements of a task's transaction.

    MySQL's ``max_execution_time`` (milliseconds) limits SELECT only; MariaDB's ``max_statement_time`` (seconds) limits every
    statement. Both are session variables. ``SET TRANSACTION`` without SESSION is for the next transaction only; the drivers have
    sent no BEGIN at this point, so that is this one.
    Sources: https://dev.mysql.com/doc/refman/8.0/en/server-system-variables.html#sysvar_max_execution_time
    https://mariadb.com/kb/en/server-system-variables/#max_statement_time
    """
    statements = []
    if timeout_seconds is not None:
        _take_back_at_checkin(connection)
        if getattr(connection.dialect, "is_mariadb", False):
            statements.append(f"SET SESSION max_statement_time = {max(0.001, timeout_seconds):.3f}")
        else:
            statements.append(f"SET SESSION max_execution_time = {max(1, int(timeout_seconds * 1000))}")
    if read_only:
        statements.append("SET TRANSACTION READ ONLY")
    return statements


def _take_back_at_checkin(connection: Connection) -> None:
    pool = connection.engine.pool
    if not event.contains(pool, "reset", _lift_limit):
        event.listen(pool, "reset", _lift_limit)
    variable = "max_statement_time" if getattr(connection.dialect, "is_mariadb", False) else "max_execution_time"
    connection.info[_LIMITED] = variable


def _lift_limit(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry, reset_state: PoolResetState) -> None:
    variable: Any = record.info.pop(_LIMITED, None)
    if variable is None or reset_state.terminate_only:
        return
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(f"SET SESSION {variable} = DEFAULT")
    finally:
        cursor.close()


def claim(connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int) -> Sequence[Row[Any]]:
    """Lease due rows: lock and read, then update by primary key.

    MySQL has no UPDATE ... RETURNING. SKIP LOCKED needs MySQL 8.0.1 or MariaDB 10.6. Leasing by UPDATE and not by DELETE keeps
    concurrent relays from deadlocks on the gaps of deleted rows.
    Source: https://dev.mysql.com/doc/refman/8.0/en/innodb-locking-reads.html
    """
    rows = connection.execute(
        select(*publishable(table))
        .where(table.c.due_at <= from_now(0))
        .order_by(table.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    if rows:
        connection.execute(
            update(table).where(table.c.id.in_([row.id for row in rows])).values(claim=claim, due_at=from_now(lease_seconds))
        )
    return rows
