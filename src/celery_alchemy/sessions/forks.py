"""No connection crosses a fork: in a child every connection pool of the process begins anew.

Underneath the engines. It works on pools, not on engines: whoever made an engine, and however a
session finds it, the connection comes from a pool. Nothing is added to a checkout. SQLAlchemy's
recipe compares process ids there, and so would miss the connections that are in use at the moment
of the fork. Source: https://docs.sqlalchemy.org/en/20/core/pooling.html, "Using Connection Pools
with Multiprocessing"
"""

from __future__ import annotations

import gc
import logging
import os
import sqlite3
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from ..errors import ForkedConnectionError

__all__ = ["renew_pools"]

logger: logging.Logger = logging.getLogger("celery_alchemy.forks")


class _InUse(Protocol):
    """What has taken a connection out of a pool."""

    dbapi_connection: object
    _connection_record: object


class _Entry(Protocol):
    """What holds a connection of a pool, and knows who has taken it out."""

    dbapi_connection: DBAPIConnection | None
    fairy_ref: Callable[[], _InUse | None] | None


#: What holds a connection of a pool, for every connection of the process.
_entries: WeakSet[_Entry] = WeakSet()

#: The parent's connections, kept for as long as the child lives: a driver may say goodbye to the
#: server when a connection is collected, and the socket is the parent's too.
_of_parent: list[DBAPIConnection] = []


#: Their pools.
_pools: WeakSet[Pool] = WeakSet()


@event.listens_for(Pool, "connect")
def _note(dbapi_connection: DBAPIConnection, entry: _Entry) -> None:
    _entries.add(entry)
    pool = _pool_of(entry)
    if pool is not None:
        _pools.add(pool)


def _pool_of(entry: _Entry) -> Pool | None:
    # It has no public name.
    pool: Pool | None = getattr(entry, "_ConnectionRecord__pool", None)
    return pool


def _note_earlier() -> None:
    """Note what was opened before this module was imported, by a query at another one's import."""
    for found in gc.get_objects():
        # By type() and not by isinstance(), which asks proxies such as Flask's current_app what
        # they are.
        if issubclass(type(found), ConnectionPoolEntry) and found.dbapi_connection is not None:
            _note(found.dbapi_connection, found)


class _InUseByParent:
    """Takes the place of a connection that was in use when the process forked.

    It can be given back.
    """

    def __init__(self, parent_pid: int) -> None:
        self._parent_pid = parent_pid

    def cursor(self, *args: object, **kwargs: object) -> object:
        raise ForkedConnectionError(self._parent_pid)

    def commit(self) -> None:
        raise ForkedConnectionError(self._parent_pid)

    def rollback(self) -> None:
        """Do nothing: the transaction is the parent's."""

    def close(self) -> None:
        """Do nothing: the socket is the parent's."""

    def terminate(self) -> None:
        """Do nothing: the socket is the parent's."""


def renew_pools(parent_pid: int) -> None:
    """Take every connection of the parent out of the pools, and leave the connection itself alone.

    Engines, their pools and all listeners stay the same objects. An SQLite database in memory stays
    too: the fork has copied it.

    Args:
        parent_pid: The process that opened the connections, for messages.
    """
    kept: set[object] = set()
    for entry in list(_entries):
        connection = entry.dbapi_connection
        if connection is None:
            continue
        if _is_in_memory(connection):
            kept.add(_pool_of(entry))
        else:
            _take_out(entry, connection, parent_pid)
    for pool in set(_pools) - kept:
        try:
            _begin_anew(pool)
        except Exception:
            # One that cannot be renewed must not keep the others from it.
            logger.exception(
                "A connection pool could not be renewed after a fork of %s", parent_pid
            )


def _is_in_memory(connection: DBAPIConnection) -> bool:
    if not isinstance(connection, sqlite3.Connection):
        return False
    try:
        return not any(file for _, _, file in connection.execute("PRAGMA database_list"))
    except sqlite3.Error:
        return False


def _take_out(entry: _Entry, connection: DBAPIConnection, parent_pid: int) -> None:
    _of_parent.append(connection)
    # An entry without a connection connects at its next checkout.
    entry.dbapi_connection = None
    in_use = None if entry.fairy_ref is None else entry.fairy_ref()
    entry.fairy_ref = None
    if in_use is not None:
        in_use.dbapi_connection = _InUseByParent(parent_pid)
        in_use._connection_record = None


def _begin_anew(pool: Pool) -> None:
    """Give a pool the state of a new one.

    A thread of the parent may have had its lock, or a place.
    """
    dispatch = pool.dispatch
    fresh: dict[str, object] = dict(vars(pool.recreate()))
    vars(pool).clear()
    # Its own dispatcher, which event.remove() and event.contains() know.
    vars(pool).update(fresh, dispatch=dispatch)


_note_earlier()

if hasattr(os, "register_at_fork"):
    _parent_pid = os.getpid()

    def _before() -> None:
        global _parent_pid  # noqa: PLW0603 - a fact about the process, told to its children.
        _parent_pid = os.getpid()

    os.register_at_fork(before=_before, after_in_child=lambda: renew_pools(_parent_pid))
