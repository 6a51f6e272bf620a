"""All that differs between the databases: one module each, the same functions in each.

Underneath everything; imports nothing of the package but its sibling modules and ``errors``. Each module has

``configure(engine)``
    what an engine made by Alchemy needs on this database;
``begin_statements(connection, timeout_seconds, read_only, application_name)``
    what a task's transaction sends first; only PostgreSQL has a name to show for it;
``claim(connection, table, claim, lease_seconds, limit)``
    how a relay takes due rows of the outbox for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from sqlalchemy import Connection, Engine, Executable, Row, Table

from . import generic, mysql, postgresql, sqlite

__all__ = ["Database", "database_of"]


class Database(Protocol):
    """What each module of this package offers."""

    def configure(self, engine: Engine) -> None: ...

    def begin_statements(
        self, connection: Connection, timeout_seconds: float | None, read_only: bool, application_name: str | None = None
    ) -> Sequence[str | Executable]: ...

    def claim(self, connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int) -> Sequence[Row[Any]]: ...


_BY_DIALECT: dict[str, Database] = {
    "postgresql": cast("Database", postgresql),
    "mysql": cast("Database", mysql),
    "mariadb": cast("Database", mysql),
    "sqlite": cast("Database", sqlite),
}
_GENERIC = cast("Database", generic)


def database_of(dialect_name: str) -> Database:
    """Return the module for a SQLAlchemy dialect name; databases without one get what the SQL standard gives."""
    return _BY_DIALECT.get(dialect_name, _GENERIC)
