"""A database that the package has no module for: sessions work, statement time-outs and read-only mode are not available."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Row, Table, select, update

from ..errors import ConfigurationError
from ..tables import from_now, publishable


def configure(engine: Engine) -> None:
    """Nothing is known of this database that would need setting."""


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool, application_name: str | None = None
) -> Sequence[str]:
    """Return nothing; a read-only transaction is refused rather than silently writable."""
    if read_only:
        raise ConfigurationError(
            f"read_only=True is not supported on {connection.dialect.name}.",
            "Remove it, or use a database user that may only read.",
        )
    return ()


def claim(connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int) -> Sequence[Row[Any]]:
    """Lease due rows one relay at a time, with what standard SQL has."""
    rows = connection.execute(
        select(*publishable(table)).where(table.c.due_at <= from_now(0)).order_by(table.c.due_at).limit(limit).with_for_update()
    ).all()
    if rows:
        connection.execute(
            update(table).where(table.c.id.in_([row.id for row in rows])).values(claim=claim, due_at=from_now(lease_seconds))
        )
    return rows
