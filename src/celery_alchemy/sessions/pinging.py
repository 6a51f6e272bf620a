"""Asks a connection whether it is alive only when it has been idle, and looks at its socket before.

Beneath the engines that an Alchemy makes. SQLAlchemy's ``pool_pre_ping`` asks at each checkout,
which is one more round trip for each task. A connection that was in use a moment ago is as likely
to break within the next statement as before it; that the server has ended it shows at the socket.
"""

from __future__ import annotations

from time import monotonic

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from .sockets import is_readable

__all__ = ["IDLE_SECONDS", "has_news", "ping_when_idle"]

#: A connection that was given back less than this ago is not asked. HikariCP does so within 0.5 s.
#: Source: ``HikariPool.java`` of https://github.com/brettwooldridge/HikariCP
IDLE_SECONDS = 1.0


def has_news(connection: object) -> bool:
    """Tell whether a connection that waits in a pool has something to read, its end for example.

    One system call, 2 us, where asking the server takes a round trip. Go's driver for MySQL does
    so. False where the socket is not known, as asyncpg's. Source:
    https://github.com/go-sql-driver/mysql/blob/master/conncheck.go
    """
    driver = getattr(connection, "driver_connection", connection)
    fileno = getattr(driver, "fileno", None) or getattr(
        getattr(driver, "_sock", None), "fileno", None
    )
    if fileno is None:
        return False
    try:
        return is_readable(fileno(), 0)
    except Exception:  # noqa: BLE001 - a driver says so in its own way: it is closed.
        return True


def ping_when_idle(engine: Engine) -> None:
    """Have the pre-pings of an engine left out for connections that were in use a moment ago.

    The pool goes on asking its dialect, whose answer is ready then: what follows a failed ping is
    SQLAlchemy's own.

    Args:
        engine: Made with ``pool_pre_ping``; the sync engine of an AsyncEngine.
    """
    dialect = engine.dialect
    ping = dialect.do_ping
    # By their identity: a driver's connection may take neither attributes nor weak references.
    given_back: dict[int, float] = {}

    def note(connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        if connection is not None:
            given_back[id(connection)] = monotonic()

    def forget(connection: DBAPIConnection, *more: object) -> None:
        given_back.pop(id(connection), None)

    def do_ping(connection: DBAPIConnection) -> bool:
        since = given_back.get(id(connection))
        is_fresh = since is not None and monotonic() - since < IDLE_SECONDS
        if is_fresh and not has_news(connection):
            return True
        return ping(connection)

    event.listen(engine, "checkin", note)
    # Another connection may have its identity later.
    for name in ("close", "detach", "invalidate", "soft_invalidate"):
        event.listen(engine, name, forget)
    vars(dialect)["do_ping"] = do_ping
