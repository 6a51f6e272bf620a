"""A database that the package has no module for: sessions work, statement time-outs and read-only mode are not available."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine

from ..errors import ConfigurationError


def configure(engine: Engine) -> None:
    """Nothing is known of this database that would need setting."""


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool
) -> Sequence[str]:
    """Return nothing; a read-only transaction is refused rather than silently writable."""
    if read_only:
        raise ConfigurationError(
            f"read_only=True is not supported on {connection.dialect.name}.",
            "Remove it, or use a database user that may only read.",
        )
    return ()
