"""Async engines and sessions.

There is one engine for each event loop; the sync half of each session keeps the same ledger.

Beside ``engine.py`` and ``sources.py``, which it mirrors; the rules live there once, because an
AsyncSession runs a Session.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import URL, Engine
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from ..databases import database_of
from ..errors import ConfigurationError
from .engine import Options, pool_defaults, worker_pool
from .ledger import NO_OPTIONS, SessionOptions, keep_ledger, observe
from .pinging import ping_when_idle
from .sources import joined_class, kept_class

__all__ = ["AsyncSource", "OwnAsyncEngines", "async_source_of", "sync_url_of"]

#: For each database its async drivers, and its sync ones, in the order in which an installed one is
#: taken.
_ASYNC_DRIVERS = {
    "postgresql": ("psycopg", "asyncpg"),
    "sqlite": ("aiosqlite",),
    "mysql": ("asyncmy", "aiomysql"),
    "mariadb": ("asyncmy", "aiomysql"),
}
_SYNC_DRIVERS = {
    "postgresql": ("psycopg", "psycopg2"),
    "sqlite": ("pysqlite",),
    "mysql": ("pymysql", "mysqldb"),
    "mariadb": ("pymysql", "mysqldb"),
}
_MODULES = {"pysqlite": "sqlite3", "mysqldb": "MySQLdb"}


def async_url_of(url: URL) -> URL:
    """Return the URL with an async driver: its own if it is one, else one that is installed.

    Raises:
        ConfigurationError: None is installed.
    """
    return _with_driver(url, _ASYNC_DRIVERS, "async")


def sync_url_of(url: URL) -> URL:
    """Return the URL with a sync driver: its own if it is one, else one that is installed.

    Raises:
        ConfigurationError: None is installed.
    """
    return _with_driver(url, _SYNC_DRIVERS, "sync")


def _with_driver(url: URL, drivers: Mapping[str, tuple[str, ...]], kind: str) -> URL:
    backend, driver = url.get_backend_name(), url.get_driver_name()
    candidates = drivers.get(backend, ())
    if driver in candidates or not candidates:
        return url
    for candidate in candidates:
        if find_spec(_MODULES.get(candidate, candidate)) is not None:
            return url.set(drivername=f"{backend}+{candidate}")
    raise ConfigurationError(
        f"No {kind} driver for {backend} is installed, which"
        f" {url.render_as_string(hide_password=True)} needs here.",
        f"Install one of {', '.join(candidates)}.",
    )


class _LoopEngines:
    """The engine of each event loop, disposed of when its loop ends."""

    def __init__(self) -> None:
        self._engines: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = (
            WeakKeyDictionary()
        )
        self._held: dict[AsyncEngine, AsyncGenerator[None, None]] = {}
        # Loops of several threads ask at once.
        self._lock = threading.RLock()
        _loop_engines.add(self)

    def get(self) -> AsyncEngine:
        """Return the running loop's engine, making it at the first call."""
        loop = asyncio.get_running_loop()
        engine = self._engines.get(loop)
        if engine is None:
            with self._lock:
                self._forget_closed()
                engine = self._make()
                self._engines[loop] = engine
                self._hold(loop, engine)
        return engine

    def _make(self) -> AsyncEngine:
        raise NotImplementedError

    def _hold(self, loop: asyncio.AbstractEventLoop, engine: AsyncEngine) -> None:
        """Have the engine disposed of when its loop ends.

        The loop may be that of the process or of an ``asyncio.run()``.

        A loop tells nobody but its async generators of its end, by ``shutdown_asyncgens()``; so one
        of them holds the engine.
        """

        async def hold() -> AsyncGenerator[None, None]:
            try:
                yield
            finally:
                with self._lock:
                    self._engines.pop(loop, None)
                    self._held.pop(engine, None)
                await engine.dispose()

        holder = self._held[engine] = hold()
        with suppress(StopIteration):
            holder.__anext__().send(None)

    def _forget_closed(self) -> None:
        """Drop the engines of loops that were closed without their generators being told."""
        for loop in [loop for loop in self._engines if loop.is_closed()]:
            engine = self._engines.pop(loop)
            self._held.pop(engine, None)
            engine.sync_engine.dispose(close=False)

    def after_fork_in_child(self) -> None:
        """Forget the parent's loops: theirs is the thread that ran them, and it is not here."""
        # What holds an engine is kept: it would speak to the loop, and so to its thread in the
        # parent, when it is collected.
        _of_parent.append((self._engines, self._held))
        self._engines, self._held = WeakKeyDictionary(), {}
        self._lock = threading.RLock()


_of_parent: list[object] = []
_loop_engines: WeakSet[_LoopEngines] = WeakSet()


def _after_fork_in_child() -> None:
    for engines in list(_loop_engines):
        engines.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class OwnAsyncEngines(_LoopEngines):
    """The async engines that Alchemy makes from a URL: one for each event loop.

    Args:
        url: The database.
        options: ``create_async_engine`` options of the user.
    """

    def __init__(self, url: URL, options: Mapping[str, object]) -> None:
        super().__init__()
        self._url = async_url_of(url)
        self._options = dict(options)

    def _make(self) -> AsyncEngine:
        # Looked up now, as the sync one's.
        engine = sqlalchemy_asyncio.create_async_engine(
            self._url, **{**pool_defaults(self._url, self._options, worker_pool()), **self._options}
        )
        database_of(engine.dialect.name).configure(engine.sync_engine)
        observe(engine.sync_engine)
        if "pool_pre_ping" not in self._options:
            ping_when_idle(engine.sync_engine)
        return engine


class ForeignAsyncEngines(_LoopEngines):
    """A user's own AsyncEngine: used in the first event loop that asks.

    Any other loop gets one with a pool of its own.

    Its connections belong to the loop that opened them. A process that serves a web framework and
    runs tasks eagerly has two loops.

    Args:
        engine: The user's.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__()
        self._engine = engine
        observe(engine.sync_engine)

    def _make(self) -> AsyncEngine:
        if self._engine not in self._held:
            return self._engine
        sync = self._engine.sync_engine
        engine = Engine(sync.pool.recreate(), sync.dialect, sync.url, echo=bool(sync.echo))
        # The pool takes its listeners along, the engine does not.
        engine.dispatch._update(sync.dispatch, only_propagate=False)
        engine._has_events = sync._has_events
        return AsyncEngine(engine.execution_options(**sync.get_execution_options()))


class AsyncSource:
    """Gives AsyncSessions for one database.

    Args:
        engine: Returns the running loop's engine; None where the sessionmaker has its own.
        maker: The user's async_sessionmaker, if there is one.
    """

    def __init__(
        self,
        engine: Callable[[], object] | None,
        maker: async_sessionmaker[AsyncSession] | None = None,
    ) -> None:
        self._engine = engine
        self._class: type[AsyncSession] = AsyncSession if maker is None else maker.class_
        self._keywords: Options = {"expire_on_commit": False} if maker is None else dict(maker.kw)
        sync_class: type[Session] = (
            self._keywords.pop("sync_session_class", None) or self._class.sync_session_class
        )
        self._sync_class = kept_class(sync_class)
        self._of_class: dict[type[AsyncSession], AsyncSource] = {}

    def of_class(self, class_: type[AsyncSession], asker: str) -> AsyncSource:
        """Return a source of the same sessions, but of the class that a parameter asks for.

        Raises:
            ConfigurationError: The class is not related to the source's own.
        """
        if issubclass(self._class, class_):
            return self
        if class_ not in self._of_class:
            source = AsyncSource(self._engine)
            source._class, source._keywords = (
                joined_class(class_, self._class, asker),
                self._keywords,
            )
            # A sync class that the sessionmaker was given stays; else each class has its own.
            inherited = self._sync_class is kept_class(self._class.sync_session_class)
            source._sync_class = (
                kept_class(class_.sync_session_class) if inherited else self._sync_class
            )
            self._of_class[class_] = source
        return self._of_class[class_]

    def bound_to(self, bind: object, **options: object) -> AsyncSource:
        """Return a source of the same sessions, bound to something else and with more options.

        Args:
            bind: Stands for an AsyncEngine in every event loop.
            **options: Of the sessions.
        """
        source = AsyncSource(lambda: bind)
        source._class, source._sync_class = self._class, self._sync_class
        source._keywords = {**self._keywords, **options}
        return source

    def opened(self, options: SessionOptions = NO_OPTIONS) -> AsyncSession:
        """Return a new AsyncSession; to be called in the event loop."""
        keywords = dict(self._keywords)
        if self._engine is not None:
            keywords["bind"] = self._engine()
        session = self._class(sync_session_class=self._sync_class, **keywords)
        keep_ledger(session.sync_session, options)
        return session


def async_source_of(bind: object, options: Mapping[str, object]) -> AsyncSource | None:
    """Return a source for a URL, an AsyncEngine or an async_sessionmaker.

    None for any other bind.
    """
    if isinstance(bind, URL):
        return AsyncSource(OwnAsyncEngines(bind, options).get)
    if isinstance(bind, AsyncEngine):
        return AsyncSource(ForeignAsyncEngines(bind).get)
    if isinstance(bind, async_sessionmaker):
        engine = bind.kw.get("bind")
        get = ForeignAsyncEngines(engine).get if isinstance(engine, AsyncEngine) else None
        return AsyncSource(get, bind)
    return None
