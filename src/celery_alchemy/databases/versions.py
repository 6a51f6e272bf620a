"""The oldest version of each database that can be a broker.

Beside the databases' modules, whose ``take()`` has the statements that older ones do not know.
"""

from __future__ import annotations

from sqlalchemy import Connection

__all__ = ["OLDEST", "too_old"]

#: By the name that people know, with what an older version lacks. Sources:
#: https://www.postgresql.org/docs/release/9.5.0/ and
#: https://dev.mysql.com/doc/relnotes/mysql/8.0/en/news-8-0-1.html and
#: https://mariadb.com/kb/en/select/#skip-locked have SKIP LOCKED;
#: https://www.sqlite.org/lang_returning.html has RETURNING.
OLDEST: dict[str, tuple[tuple[int, ...], str]] = {
    "PostgreSQL": ((9, 5), "SKIP LOCKED"),
    "MySQL": ((8, 0, 1), "SKIP LOCKED"),
    "MariaDB": ((10, 6), "SKIP LOCKED"),
    "SQLite": ((3, 35), "RETURNING"),
}

_NAMES = {"postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB", "sqlite": "SQLite"}


def too_old(connection: Connection) -> str | None:
    """Say in a sentence which version a database has and which it needs; None if it is new enough.

    Args:
        connection: One that is open: its dialect knows the server.
    """
    dialect = connection.dialect
    name = _NAMES.get("mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name)
    version: tuple[object, ...] | None = getattr(dialect, "server_version_info", None)
    if name is None or not version:
        return None
    numbers = tuple(part for part in version if isinstance(part, int))
    oldest, lacks = OLDEST[name]
    if numbers >= oldest:
        return None
    return (
        f"This is {name} {_dotted(numbers)}, which does not know {lacks}:"
        f" {_dotted(oldest)} is needed."
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
