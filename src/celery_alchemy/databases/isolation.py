"""Whether a connection commits each statement by itself.

A setting is put back when the connection returns to its pool.

Underneath the databases' modules, whose SET statements need one or the other.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, SelectBase, Update, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

__all__ = [
    "LoneStatement",
    "as_it_is",
    "commits_each_statement",
    "is_put_back",
    "needs_commit",
    "put_back_at_checkin",
]

#: A statement that is a transaction by itself.
LoneStatement = SelectBase | Update

#: A key of the info of a connection in a pool: the statement that puts its setting back.
_PUT_BACK = "celery_alchemy.put_back"


def commits_each_statement(connection: Connection) -> bool:
    """Tell whether a connection is in AUTOCOMMIT: there is no transaction to set anything for.

    Asks neither the server nor, where SQLAlchemy has been told, the driver: this runs in the
    transactions of tasks.
    """
    # As Connection._is_autocommit_isolation, which is not public.
    of_engine = getattr(connection.dialect, "_on_connect_isolation_level", None)
    level = connection.get_execution_options().get("isolation_level", of_engine)
    if level is not None:
        return bool(level == "AUTOCOMMIT")
    # A listener of the user's may have told the driver: an attribute of psycopg's and psycopg2's.
    return getattr(connection.connection.dbapi_connection, "autocommit", None) is True


def needs_commit(connection: PoolProxiedConnection) -> Callable[[], object] | None:
    """Return None: a COMMIT has to be sent (as a database's ``commit_itself``)."""
    return None


def as_it_is(statement: LoneStatement) -> LoneStatement:
    """Return the statement: nothing in it can say what its COMMIT waits for (as ``hastened``)."""
    return statement


def is_put_back(connection: Connection) -> bool:
    """Tell whether a setting of the connection waits for being put back."""
    return _PUT_BACK in connection.info


def put_back_at_checkin(connection: Connection, statement: str) -> None:
    """Run a statement when the connection returns to its pool.

    Args:
        connection: Whose session variable is about to be changed, for the first time since it left
            the pool.
        statement: Gives the variable the value that it has now.
    """
    pool = connection.engine.pool
    if not event.contains(pool, "reset", _put_back):
        event.listen(pool, "reset", _put_back)
    connection.info[_PUT_BACK] = statement


def _put_back(
    dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry, reset_state: PoolResetState
) -> None:
    statement: object = record.info.pop(_PUT_BACK, None)
    if statement is None or reset_state.terminate_only:
        return
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()
