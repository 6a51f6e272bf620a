"""How a worker learns that something was sent: PostgreSQL tells it, elsewhere it looks.

Beneath the threads of a worker, and of who waits for results. Whoever sends tells it here, after
its commit and never in its transaction: NOTIFY takes a lock at COMMIT that all other senders wait
for. Source:
https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic
from weakref import WeakValueDictionary

from sqlalchemy import Connection

from ..outbox.lone_statement import send_alone
from ..outbox.place import Place
from ..sessions.fork_lock import fork_guard
from .homes import BrokerHome

__all__ = [
    "MESSAGES",
    "RESULTS",
    "WAITS",
    "WAITS_SECONDS",
    "Bell",
    "aside",
    "bell_of",
    "changes_of",
    "channel_of",
    "close_for_good",
    "somebody_waits",
]

logger: logging.Logger = logging.getLogger(__name__)

#: Seconds after something was told in which what follows is told together.
JOIN_SECONDS = 0.005

#: Seconds after the last message for which the thread is kept that tells.
KEPT_SECONDS = 5.0

_aside = threading.Lock()

#: What is told: messages to workers, results to who waits for them, and that somebody waits.
MESSAGES, RESULTS, WAITS = "", "_results", "_waits"

#: Seconds for which workers tell of results after somebody has said that he waits.
WAITS_SECONDS = 10.0


def aside() -> AbstractContextManager[object]:
    """Return what keeps apart who writes beside the main loop of a worker, and who tells of it.

    The two share one connection, of the three that a worker's parent may have.
    """
    return _aside


def channel_of(place: Place, kind: str = MESSAGES) -> str:
    """Return the name of a channel of the library's tables in their database."""
    schema = place.schema or ""
    own = f"_{hashlib.sha256(schema.encode()).hexdigest()[:12]}" if schema else ""
    return f"celery_alchemy{own}{kind}"


def changes_of(connection: Connection) -> Callable[[], int] | None:
    """Return what tells of the commits of others on SQLite, a number; None elsewhere.

    Reading it takes some microseconds, for it is in shared memory.
    Source: https://www.sqlite.org/pragma.html#pragma_data_version
    """
    driver = connection.connection.driver_connection
    if connection.dialect.name != "sqlite" or driver is None or not hasattr(driver, "execute"):
        return None

    def changes() -> int:
        return int(driver.execute("PRAGMA data_version").fetchone()[0])

    return changes


class Bell:
    """Tells that something was sent, or has ended.

    The first is told at once, what comes within some milliseconds of it together.

    Args:
        home: The broker's database.
        kind: What is told.
    """

    def __init__(self, home: BrokerHome, kind: str = MESSAGES) -> None:
        self._home = home
        self._channel = channel_of(home.place, kind)
        self._rung = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def after_fork_in_child(self) -> None:
        """Begin anew: the thread does not exist here."""
        self._rung, self._lock, self._thread = threading.Event(), threading.Lock(), None

    def ring(self) -> None:
        """Tell soon, without waiting for the database; nothing where nobody could hear it."""
        if self._home.engine().dialect.name != "postgresql":
            return
        with self._lock:
            self._rung.set()
            if self._thread is None or not self._thread.is_alive():
                name = "celery-alchemy-bell"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    # The interpreter ends, or the machine has no room for another thread. What was
                    # committed stays so, and workers look by themselves every second.
                    logger.debug("No thread %s can be started", name, exc_info=True)
                    return
                self._thread = thread

    def _run(self) -> None:
        told_at = float("-inf")
        while self._is_rung():
            pause = told_at + JOIN_SECONDS - monotonic()
            if pause > 0:
                threading.Event().wait(pause)
            self._rung.clear()
            try:
                with fork_guard, aside():
                    self._tell()
                told_at = monotonic()
            except Exception:
                # Workers look by themselves every second, who waits for results more often.
                logger.debug("What was sent could not be told", exc_info=True)

    def _is_rung(self) -> bool:
        """Wait for the next ring; False after a while without one, when the thread ends."""
        if self._rung.wait(KEPT_SECONDS):
            return True
        with self._lock:
            if self._rung.is_set():
                return True
            self._thread = None
            return False

    def _tell(self) -> None:
        """Tell it on a connection that the pool lends for this moment."""
        send_alone(self._home.engine(), f"NOTIFY {self._channel}")


def close_for_good(connection: Connection | None) -> None:
    """Close a connection that listens, which the next user of the pool must not get."""
    if connection is None:
        return
    try:
        connection.invalidate()
        connection.close()
    except Exception:
        logger.debug("A connection could not be closed", exc_info=True)


_bells: WeakValueDictionary[tuple[str, str], Bell] = WeakValueDictionary()


def bell_of(home: BrokerHome, kind: str = MESSAGES) -> Bell:
    """Return the bell of a broker; one for each process."""
    return _bells.setdefault((home.key, kind), Bell(home, kind))


class _SomebodyWaits:
    """Until when somebody waits for results: in memory that a worker shares with its children.

    The parent hears it; the children, which end the tasks, must not ask the database for it.
    """

    def __init__(self) -> None:
        self._until = mmap.mmap(-1, 8)

    def note(self) -> None:
        """Note that somebody has just said so."""
        # In one piece: ``pack_into`` clears shared memory first, which others would read.
        self._until[:] = struct.pack("d", monotonic() + WAITS_SECONDS)

    def __bool__(self) -> bool:
        # The clock is the same in all processes of a machine.
        return float(struct.unpack_from("d", self._until)[0]) > monotonic()


#: Whether who waits for results is to be told of them.
somebody_waits: _SomebodyWaits = _SomebodyWaits()


def _renew_bells() -> None:
    # A thread of the parent may have had one of the locks.
    global _aside  # noqa: PLW0603 - the lock of this process.
    _aside = threading.Lock()
    for bell in list(_bells.values()):
        bell.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_bells)
