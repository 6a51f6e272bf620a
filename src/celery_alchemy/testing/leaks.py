"""A check that code gave back what it took.

Sessions, transactions and connections are shown with the place where each was taken.

Beside the code under test; it looks at every Session and connection pool of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from ..errors import CeleryAlchemyError
from ..outbox.hand_over import wait_for_all
from ..requests.event_loop import LOOP_THREAD
from ..requests.insight import place

__all__ = ["LeakError", "no_leaks"]


#: Seconds that messages have which were committed inside of the block.
DRAIN_SECONDS = 5.0


class LeakError(CeleryAlchemyError, AssertionError):
    """Something was not given back."""

    def __init__(self, leaks: tuple[str, ...]) -> None:
        super().__init__(leaks)
        self.leaks = leaks

    def __str__(self) -> str:
        listed = "\n".join(f"  {leak}" for leak in self.leaks)
        return f"What was opened is still open:\n{listed}\nClose it in a `with` block."


@contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if what was opened inside of the block is open at its end.

    That is a session with a transaction, or a connection.

    What a session holds is told once, as the session's. Connections of async engines count like
    others. Those do not count that threads of the library keep for themselves, such as the one that
    waits for results.

    Raises:
        LeakError: It names what was left open, and the place that opened it.
    """
    watch = _Watch()
    listened: tuple[tuple[object, str, Callable[..., object]], ...] = (
        (Session, "after_begin", watch.begins),
        (Session, "after_transaction_end", watch.ends),
        (Pool, "checkout", watch.checked_out),
        (Pool, "checkin", watch.checked_in),
        (Pool, "detach", watch.checked_in),
    )
    for target, name, listener in listened:
        event.listen(target, name, listener)
    try:
        yield
        # What is handed over behind a commit has a connection of its own for a moment.
        wait_for_all(DRAIN_SECONDS)
    finally:
        for target, name, listener in listened:
            event.remove(target, name, listener)
    leaks = watch.leaks()
    if leaks:
        raise LeakError(leaks)


class _Watch:
    """What is open now, of what was opened while this watched, and where."""

    def __init__(self) -> None:
        self._sessions: WeakKeyDictionary[Session, str] = WeakKeyDictionary()
        self._connections: dict[ConnectionPoolEntry, str] = {}
        self._holders: dict[int, ref[Session]] = {}

    def begins(
        self, session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        self._sessions.setdefault(session, place())
        self._holders[id(connection.connection.dbapi_connection)] = ref(session)

    def ends(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self._sessions.pop(session, None)

    def checked_out(
        self, dbapi_connection: object, entry: ConnectionPoolEntry, proxy: object
    ) -> None:
        if not _is_the_librarys(threading.current_thread()):
            self._connections[entry] = place()

    def checked_in(self, dbapi_connection: object, entry: ConnectionPoolEntry) -> None:
        self._connections.pop(entry, None)

    def leaks(self) -> tuple[str, ...]:
        """Say what is open."""
        # A listener that raised may have kept the end of a transaction from this one.
        held = {
            session: where for session, where in self._sessions.items() if session.in_transaction()
        }
        leaks = [f"a session with an open transaction, begun at {where}" for where in held.values()]
        for entry, where in self._connections.items():
            holder = self._holders.get(id(entry.dbapi_connection))
            if holder is None or holder() not in held:
                leaks.append(f"a connection, taken at {where}")
        return tuple(leaks)


def _is_the_librarys(thread: threading.Thread) -> bool:
    """Tell whether a thread does the library's work alone; that of the event loop runs tasks."""
    return thread.name.startswith("celery-alchemy-") and thread.name != LOOP_THREAD
