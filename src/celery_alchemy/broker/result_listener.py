"""Looks for the results that the threads of a process wait for.

One thread does it, on one connection, for all.

Beneath the backend's waiting. Where the database tells that results have come it looks then; else
it looks by itself, less often the longer nothing comes. It lives while somebody waits.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from weakref import WeakValueDictionary

from sqlalchemy import Connection, Engine, text
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from ..outbox.place import Place
from ..outbox.result_records import ended
from ..sessions.fork_lock import fork_guard
from .ears import Ear, ear_on
from .waking import (
    RESULTS,
    WAITS,
    WAITS_SECONDS,
    changes_of,
    channel_of,
    close_for_good,
)

__all__ = ["Listener", "Wait", "listener_of"]

logger: logging.Logger = logging.getLogger(__name__)

#: Seconds between two looks where nothing tells: the first, how they grow, and the longest.
FIRST_SECONDS = 0.02
SLOWING = 1.5
LONGEST_SECONDS = 0.5

#: Seconds in which one that has begun to wait is noticed.
SLICE_SECONDS = 0.05

#: Seconds between two looks at the number that SQLite changes with each commit.
CHANGES_SECONDS = 0.01

#: A look is followed by so many times its length without one.
LOOKS_SHARE = 4

#: Seconds without anybody who waits after which the thread ends and its connection is closed.
KEPT_SECONDS = 1.0


class Wait:
    """One that waits for results.

    Args:
        keys: The keys of their rows.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys: frozenset[str] = frozenset(keys)
        self._has_come = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait for a result, and tell whether one has come."""
        has_come = self._has_come.wait(seconds)
        self._has_come.clear()
        return has_come

    def tell(self, keys: frozenset[str]) -> None:
        """Wake it if a result is one of its."""
        if not self.keys.isdisjoint(keys):
            self._has_come.set()


class Listener:
    """Looks for results for all that wait for them in this process.

    Args:
        engine: Of the database; its pool is left to others.
        place: Where the tables are.
    """

    def __init__(self, engine: Engine, place: Place) -> None:
        self.engine = engine
        self._apart = Engine(engine.pool.recreate(), engine.dialect, engine.url)
        self._place = place
        self.begin_anew()

    def begin_anew(self) -> None:
        """Begin as in a child that was forked: the thread and those who wait are the parent's."""
        self._lock = threading.Lock()
        self._came = threading.Event()
        self._waits: set[Wait] = set()
        self._thread: threading.Thread | None = None
        self.connection: Connection | None = None
        self._ear: Ear | None = None
        self._changes: Callable[[], int] | None = None
        self._seen = 0
        self._pause = FIRST_SECONDS
        self._told_at = 0.0

    @contextmanager
    def awaiting(self, keys: Iterable[str]) -> Iterator[Wait]:
        """Look for results while the block waits for them."""
        wait = Wait(keys)
        with self._lock:
            if self._thread is None:
                name = "celery-alchemy-results"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                # It may raise, at the end of the interpreter or of the machine's room.
                thread.start()
                self._thread = thread
            self._waits.add(wait)
            self._came.set()
        try:
            yield wait
        finally:
            with self._lock:
                self._waits.discard(wait)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while self._goes_on():
            began = monotonic()
            try:
                with fork_guard:
                    self._look()
                threading.Event().wait(min(LOOKS_SHARE * (monotonic() - began), LONGEST_SECONDS))
                self._rest()
            except Exception:
                # Whoever waits looks too, now and then, and raises what it finds.
                logger.debug("Results cannot be looked for now", exc_info=True)
                self._close()
                threading.Event().wait(LONGEST_SECONDS)

    def _goes_on(self) -> bool:
        """Wait for somebody who waits; False after a while without, when the thread ends."""
        until = monotonic() + KEPT_SECONDS
        while not self._waits:
            if monotonic() >= until:
                # Before another thread may begin, which would take it for its own.
                self._close()
                with self._lock:
                    if not self._waits:
                        self._thread = None
                        return False
            self._came.wait(SLICE_SECONDS)
            self._came.clear()
            self._pause = FIRST_SECONDS
        return True

    def _look(self) -> None:
        connection = self.connection
        if connection is None:
            connection = self.connection = self._connect()
        if self._ear is not None and monotonic() - self._told_at > WAITS_SECONDS / 2:
            # So that workers tell when results come.
            with connection.begin():
                connection.execute(text(f"NOTIFY {channel_of(self._place, WAITS)}"))
            self._told_at = monotonic()
        # What is committed while it looks is looked for again.
        self._seen = self._changes() if self._changes is not None else 0
        with self._lock:
            waits = list(self._waits)
        keys = sorted(frozenset[str]().union(*(wait.keys for wait in waits)))
        found = frozenset(ended(self._place, connection, keys))
        for wait in waits:
            wait.tell(found)

    def _connect(self) -> Connection:
        connection = self._apart.connect()
        if connection.dialect.name != "sqlite":
            # No transaction is left open between two looks.
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        self._ear = ear_on(connection, channel_of(self._place, RESULTS))
        self._changes = changes_of(connection)
        self._told_at = 0.0
        return connection

    def _rest(self) -> None:
        """Wait until there is something to look for, or may be."""
        if self._came.is_set():
            self._came.clear()
            self._pause = FIRST_SECONDS
        until, self._pause = monotonic() + self._pause, min(self._pause * SLOWING, LONGEST_SECONDS)
        while self._waits and (left := until - monotonic()) > 0 and not self._came.is_set():
            if self._ear is not None:
                if self._ear.heard_within(min(left, SLICE_SECONDS)):
                    return
            elif self._changes is not None:
                self._came.wait(min(left, CHANGES_SECONDS))
                if self._changes() != self._seen:
                    return
            else:
                self._came.wait(left)

    def _close(self) -> None:
        connection, self.connection, self._ear, self._changes = self.connection, None, None, None
        close_for_good(connection)


_listeners: WeakValueDictionary[tuple[int, str | None], Listener] = WeakValueDictionary()
_lock = threading.Lock()


def listener_of(engine: Engine, place: Place) -> Listener | None:
    """Return the listener of a database.

    One for each process, None where each connection has its own data.
    """
    if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
        return None
    with _lock:
        # It keeps the engine, whose id is no other's meanwhile.
        key = (id(engine), place.schema)
        found = _listeners.get(key)
        if found is None:
            found = _listeners[key] = Listener(engine, place)
        return found


#: In a child, the connections of its parent: one that is collected here would be closed there.
_of_parent: list[Connection] = []


def _renew_listeners() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may have had it.
    _lock = threading.Lock()
    for listener in list(_listeners.values()):
        if listener.connection is not None:
            _of_parent.append(listener.connection)
        listener.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_listeners)
