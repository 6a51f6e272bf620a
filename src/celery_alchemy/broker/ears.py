"""Connections that listen: what PostgreSQL tells by NOTIFY, heard with each driver.

Beneath the threads of a worker, and of who waits for results. Through a pooler in transaction mode
nothing is heard: it gives the connection that listens to others. Nobody listens there, for the
pooler would warn of each telling in its log, and others would collect them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from time import monotonic
from typing import Protocol
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, text

from ..sessions.sockets import is_readable

__all__ = ["Ear", "ear_on"]

logger: logging.Logger = logging.getLogger(__name__)

#: Seconds for which a connection through a pooler waits to be told something, before it is deaf.
TRIAL_SECONDS = 1.0

#: Seconds for which a process does not try it again.
DEAF_SECONDS = 600.0

#: Until when a process does not listen, by the URL of the database.
_deaf_until: dict[URL, float] = {}


class Ear(Protocol):
    """Hears what is told, on a connection."""

    def heard_within(self, seconds: float) -> AbstractSet[str]:
        """Wait for so long, and return the channels on which something was told meanwhile."""
        ...


class _Notification(Protocol):
    """What was told, as the drivers have it."""

    channel: str


class _Psycopg(Protocol):
    """A connection of psycopg."""

    def fileno(self) -> int: ...

    def notifies(self, *, timeout: float, stop_after: int) -> Iterable[_Notification]: ...


class _Psycopg2(Protocol):
    """A connection of psycopg2."""

    notifies: list[_Notification]

    def fileno(self) -> int: ...

    def poll(self) -> object: ...


class _PsycopgEar:
    def __init__(self, driver: _Psycopg) -> None:
        self._driver = driver

    def heard_within(self, seconds: float) -> AbstractSet[str]:
        """Wait until the socket can be read, and take what has come.

        psycopg would wait by itself, and with it all tasks of an eventlet pool.
        """
        heard = self._taken()  # What came with the answer to a statement is not in the socket.
        if not heard and is_readable(self._driver.fileno(), seconds):
            heard = self._taken()
        return heard

    def _taken(self) -> AbstractSet[str]:
        return {notify.channel for notify in self._driver.notifies(timeout=0, stop_after=1)}


class _Psycopg2Ear:
    def __init__(self, driver: _Psycopg2) -> None:
        self._driver = driver

    def heard_within(self, seconds: float) -> AbstractSet[str]:
        """Wait until the socket can be read, and take what has come."""
        if not self._driver.notifies:
            is_readable(self._driver.fileno(), seconds)
            self._driver.poll()
        heard = {notify.channel for notify in self._driver.notifies}
        del self._driver.notifies[:]
        return heard


_EARS: dict[str, Callable[..., Ear]] = {
    "psycopg": _PsycopgEar,
    "psycopg2": _Psycopg2Ear,
}


def ear_on(connection: Connection, *channels: str) -> Ear | None:
    """Have a connection listen; None where the database, the driver or a pooler cannot."""
    if connection.dialect.name != "postgresql":
        return None
    make = _EARS.get(connection.dialect.driver)
    if make is None:
        return None
    driver = connection.connection.driver_connection
    assert driver is not None
    ear = make(driver)
    with connection.begin():
        server = connection.execute(text("SELECT pg_catalog.pg_backend_pid()")).scalar_one()
        # As whoever answered when it was opened has it.
        is_direct = server == driver.info.backend_pid
        if is_direct:
            _listen(connection, channels)
    if not is_direct:
        # A pooler: it answers with a number of its own.
        if not _is_told(connection, ear):
            return None
        with connection.begin():
            _listen(connection, channels)
    return ear


def _listen(connection: Connection, channels: Iterable[str]) -> None:
    for channel in channels:
        connection.execute(text(f"LISTEN {channel}"))


def _is_told(connection: Connection, ear: Ear) -> bool:
    """Try whether a connection hears what another one tells.

    On a channel of its own: where the pooler leaves it to others, nobody ever tells anything there.
    """
    url = connection.engine.url
    if _deaf_until.get(url, 0.0) > monotonic():
        return False
    channel = f"celery_alchemy_trial_{uuid4().hex}"
    with connection.begin():
        _listen(connection, [channel])
    # In a thread: a pooler whose connections are all in use lets it wait.
    threading.Thread(target=_tell, args=(connection.engine, channel), daemon=True).start()
    until = monotonic() + TRIAL_SECONDS
    while (left := until - monotonic()) > 0:
        if channel in ear.heard_within(left):
            with connection.begin():
                connection.execute(text(f"UNLISTEN {channel}"))
            return True
    shown = url.render_as_string(hide_password=True)
    logger.info("A pooler is before %s and does not tell what is sent: workers look", shown)
    _deaf_until[url] = monotonic() + DEAF_SECONDS
    return False


def _tell(engine: Engine, channel: str) -> None:
    apart = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    try:
        with apart.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"NOTIFY {channel}"))
    except Exception:
        logger.debug("The trial of a pooler could not be told", exc_info=True)
    finally:
        apart.dispose()
