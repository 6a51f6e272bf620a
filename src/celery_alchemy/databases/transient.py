"""Which database errors may pass: the one table of their codes, with the source of each.

Underneath the running of bodies (``requests/sync_body.py``); public as ``is_transient``, for
``autoretry_for`` predicates and web code.
"""

from __future__ import annotations

import re
import sqlite3

from sqlalchemy.exc import DBAPIError

__all__ = ["is_away", "is_busy", "is_lost_connection", "is_read_only", "is_transient"]

#: SQLSTATEs of PostgreSQL. https://www.postgresql.org/docs/current/errcodes-appendix.html
POSTGRESQL = {
    "40001": (
        "serialization_failure; https://www.postgresql.org/docs/current/transaction-iso.html says"
        " to run it again"
    ),
    "40P01": (
        "deadlock_detected;"
        " https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-DEADLOCKS"
    ),
    "55P03": "lock_not_available: NOWAIT or lock_timeout",
    "25006": "read_only_sql_transaction: after a failover, a server that is a standby now",
    "25P03": "idle_in_transaction_session_timeout: the server ended the session and rolled back",
    "53300": "too_many_connections",
    "57P01": "admin_shutdown: restart, failover, pg_terminate_backend",
    "57P02": "crash_shutdown",
    "57P03": "cannot_connect_now: the server starts up or recovers",
    "57P05": "idle_session_timeout",
    "08000": "connection_exception",
    "08001": "sqlclient_unable_to_establish_sqlconnection",
    "08003": "connection_does_not_exist",
    "08004": "sqlserver_rejected_establishment_of_sqlconnection",
    "08006": "connection_failure",
}
#: What the server says of 57P03 and 53300 where libpq passes the text on without the code.
#: https://github.com/postgres/postgres/tree/master/src/backend, tcop/backend_startup.c and
#: utils/init/postinit.c
_NOT_READY = (
    "starting up",
    "shutting down",
    "not yet accepting",
    "not accepting",
    "recovery mode",
    "too many",
    "reserved for",
)
#: A connection is gone, or could not be made: of 57P03 and 53300 asyncpg gives the code.
_POSTGRESQL_LOST = frozenset(POSTGRESQL) - {"40001", "40P01", "55P03", "25006"}

#: Error numbers of MySQL and MariaDB.
#: https://dev.mysql.com/doc/mysql-errors/8.0/en/server-error-reference.html, from 2000 on
#: https://dev.mysql.com/doc/mysql-errors/8.0/en/client-error-reference.html,
#: https://mariadb.com/kb/en/mariadb-error-code-reference/
MYSQL = {
    1213: "ER_LOCK_DEADLOCK: InnoDB has rolled the whole transaction back",
    1205: "ER_LOCK_WAIT_TIMEOUT: the statement is rolled back, the transaction by us",
    1020: (
        "ER_CHECKREAD: MariaDB from 11.6, innodb_snapshot_isolation: the row changed since the"
        " snapshot"
    ),
    3572: "ER_LOCK_NOWAIT",
    1792: "ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION: after a failover, as 1836",
    1836: "ER_READ_ONLY_MODE",
    1040: "ER_CON_COUNT_ERROR: too many connections",
    1053: "ER_SERVER_SHUTDOWN",
    1927: "ER_CONNECTION_KILLED of MariaDB",
    4031: "ER_CLIENT_INTERACTION_TIMEOUT",
    2002: "CR_CONNECTION_ERROR",
    2003: "CR_CONN_HOST_ERROR",
    2006: "CR_SERVER_GONE_ERROR",
    2013: "CR_SERVER_LOST",
    2055: "CR_SERVER_LOST_EXTENDED",
}
#: ER_OPTION_PREVENTS_STATEMENT, of several options of a server: of --read-only it is 1836's
#: brother.
_MYSQL_OPTION_PREVENTS = 1290
_READ_ONLY_OPTIONS = re.compile(r"--(super-)?read[-_]only")
_READ_ONLY = frozenset({"25006", 1792, 1836})
#: ER_SP_DOES_NOT_EXIST: what going back to a SAVEPOINT raises after a deadlock has taken the whole
#: transaction.
_MYSQL_NO_SAVEPOINT = 1305
_MYSQL_LOST = frozenset({1040, 1053, 1927, 4031, 2002, 2003, 2006, 2013, 2055})

#: Primary result codes of SQLite (the low byte). https://www.sqlite.org/rescode.html
SQLITE = {
    5: "SQLITE_BUSY: another connection writes; also SQLITE_BUSY_SNAPSHOT and SQLITE_BUSY_RECOVERY",
    6: "SQLITE_LOCKED: a conflict within the same connection or a shared cache",
}


def is_transient(exc: BaseException) -> bool:
    """Tell whether a database error has rolled the transaction back and may pass.

    Run the whole of the transaction again and it may work.

    True for serialization failures, deadlocks, lock time-outs, lost and refused connections, a
    server that only reads since a failover, and a busy SQLite file, of psycopg, psycopg2, asyncpg,
    pymysql, mysqlclient, asyncmy, aiomysql, sqlite3 and aiosqlite. False for everything else, also
    for a statement time-out, which would run out again. When a connection is lost while COMMIT is
    under way the transaction may have been committed: that answer is True as well, and the caller
    must know what it was doing.

    Args:
        exc: What SQLAlchemy raised; anything else is not transient.
    """
    if is_lost_connection(exc):
        return True
    original = _driver_error(exc)
    if original is None:
        return False
    number = _number(original)
    if number == _MYSQL_NO_SAVEPOINT:
        return _came_of_transient(exc)
    if number is not None:
        return number in MYSQL or is_read_only(exc)
    if isinstance(original, sqlite3.Error):
        return is_busy(original)
    return _sqlstate(original) in POSTGRESQL


def is_read_only(exc: BaseException) -> bool:
    """Tell whether the database has refused a write because it, or the transaction, only reads."""
    original = _driver_error(exc)
    if original is None:
        return False
    if _number(original) == _MYSQL_OPTION_PREVENTS:
        return _READ_ONLY_OPTIONS.search(str(original)) is not None
    return (_number(original) or _sqlstate(original)) in _READ_ONLY


def is_away(exc: BaseException) -> bool:
    """Tell whether nothing can be written: the connection is lost, or the database only reads."""
    return is_lost_connection(exc) or is_read_only(exc)


def is_lost_connection(exc: BaseException) -> bool:
    """Tell whether an error means that the connection was lost, or could not be made."""
    if isinstance(exc, OSError):
        return _is_asyncpg_connecting(exc)
    original = _driver_error(exc)
    if original is None:
        return False
    if isinstance(exc, DBAPIError) and exc.connection_invalidated:
        return True
    # Before the SQLSTATE: pymysql gives one as well, a generic HY000 for most numbers.
    number = _number(original)
    if number is not None:
        return number in _MYSQL_LOST
    state = _sqlstate(original)
    if state is not None:
        return state in _POSTGRESQL_LOST
    return _is_refused_by_nobody(original)


def _came_of_transient(exc: BaseException) -> bool:
    """Tell whether an error was raised while a transient one was being handled."""
    earlier = exc.__context__
    while earlier is not None:
        if isinstance(earlier, DBAPIError):
            return is_transient(earlier)
        earlier = earlier.__context__
    return False


def _driver_error(exc: BaseException) -> object:
    """Return the driver's error inside of SQLAlchemy's.

    Those of asyncpg's connect come through as they are.
    """
    if isinstance(exc, DBAPIError):
        return exc.orig
    return exc if type(exc).__module__.startswith("asyncpg.") else None


def _is_asyncpg_connecting(exc: OSError) -> bool:
    """Tell whether an error of the operating system came from asyncpg's connect.

    That lets it through as it is.

    Any other lost connection, of an HTTP client say, has rolled nothing back. Only the traceback
    tells them apart.
    """
    trace = exc.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "asyncpg.connect_utils":
            return True
        trace = trace.tb_next
    return False


def _is_refused_by_nobody(original: object) -> bool:
    """Tell whether libpq found no server to talk to, or one that is not ready.

    At connect it gives no SQLSTATE.

    FATAL is the server's own word, not translated: it was there, and said that the password, the
    user or the database is wrong. Source:
    https://www.postgresql.org/docs/current/protocol-error-fields.html
    """
    if type(original).__name__ != "OperationalError" or not type(original).__module__.startswith(
        "psycopg"
    ):
        return False
    message = str(original)
    if "another command is already in progress" in message:
        return False  # Something broke into the statement before; the server is there.
    return "FATAL" not in message or any(words in message for words in _NOT_READY)


def _sqlstate(original: object) -> str | None:
    state = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return state if isinstance(state, str) else None


def _number(original: object) -> int | None:
    arguments = getattr(original, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else None


def is_busy(original: sqlite3.Error) -> bool:
    """Tell whether an error of SQLite's driver says that another connection has the lock."""
    code = getattr(original, "sqlite_errorcode", None)  # Python 3.11
    if code is not None:
        return code & 0xFF in SQLITE
    return "is locked" in str(original)
