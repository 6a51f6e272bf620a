"""Async engines and sessions: one engine for each event loop, sessions whose sync half keeps the same ledger.

Beside ``engine.py`` and ``sessions.py``, which it mirrors; the rules live there once, because an AsyncSession runs a Session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from .databases import database_of
from .engine import ForeignEngine, pool_defaults
from .errors import ConfigurationError
from .ledger import Ledger, keep_ledger, observe
from .loop import process_loop
from .sessions import Asks, kept_class

__all__ = ["AsyncSource", "OwnAsyncEngines", "async_source_of", "sync_url_of"]

#: For each database its async drivers, and its sync ones, in the order in which an installed one is taken.
_ASYNC_DRIVERS = {"postgresql": ("psycopg", "asyncpg"), "sqlite": ("aiosqlite",), "mysql": ("asyncmy", "aiomysql"), "mariadb": ("asyncmy", "aiomysql")}
_SYNC_DRIVERS = {"postgresql": ("psycopg", "psycopg2"), "sqlite": ("pysqlite",), "mysql": ("pymysql", "mysqldb"), "mariadb": ("pymysql", "mysqldb")}
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
        f"No {kind} driver for {backend} is installed, which {url.render_as_string(hide_password=True)} needs here.",
        f"Install one of {', '.join(candidates)}.",
    )


class OwnAsyncEngines:
    """The async engines that Alchemy makes from a URL: one for each event loop.

    Args:
        url: The database.
        options: ``create_async_engine`` options of the user.
    """

    def __init__(self, url: URL, options: Mapping[str, Any]) -> None:
        self._url = async_url_of(url)
        self._options = dict(options)
        self._engines: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = WeakKeyDictionary()
        process_loop.at_close(self._dispose)

    def get(self) -> AsyncEngine:
        """Return the running loop's engine, making it at the first call."""
        loop = asyncio.get_running_loop()
        engine = self._engines.get(loop)
        if engine is None:
            engine = create_async_engine(self._url, **{**pool_defaults(self._url, self._options), **self._options})
            database_of(engine.dialect.name).configure(engine.sync_engine)
            observe(engine.sync_engine)
            self._engines[loop] = engine
        return engine

    async def _dispose(self) -> None:
        engine = self._engines.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.dispose()


class ForeignAsyncEngines:
    """A user's own AsyncEngine: used in the first event loop that asks; any other loop gets one with a pool of its own.

    Its connections belong to the loop that opened them. A process that serves a web framework and runs tasks eagerly has two loops.

    Args:
        engine: The user's.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._engines: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = WeakKeyDictionary()
        ForeignEngine(engine.sync_engine)

    def get(self) -> AsyncEngine:
        """Return the running loop's engine."""
        loop = asyncio.get_running_loop()
        engine = self._engines.get(loop)
        if engine is None:
            if not self._engines:
                engine = self._engine
            else:
                sync = self._engine.sync_engine
                engine = AsyncEngine(Engine(sync.pool.recreate(), sync.dialect, sync.url))
            self._engines[loop] = engine
        return engine


class AsyncSource:
    """Gives AsyncSessions for one database.

    Args:
        engine: Returns the running loop's engine; None where the sessionmaker has its own.
        maker: The user's async_sessionmaker, if there is one.
    """

    def __init__(
        self, engine: Callable[[], AsyncEngine] | None, maker: async_sessionmaker[Any] | None = None
    ) -> None:
        self._engine = engine
        self._class: type[AsyncSession] = AsyncSession if maker is None else maker.class_
        self._keywords: dict[str, Any] = {"expire_on_commit": False} if maker is None else dict(maker.kw)
        sync_class: type[Session] = self._keywords.pop("sync_session_class", None) or self._class.sync_session_class
        self._sync_class = kept_class(sync_class)

    def session(self, asks: Asks) -> AsyncSession:
        """Return a new AsyncSession; to be called in the event loop."""
        options = asks.session_options()
        keywords = dict(self._keywords)
        if self._engine is not None:
            keywords["bind"] = self._engine()
        if options.isolation_level is not None:
            keywords["bind"] = keywords["bind"].execution_options(isolation_level=options.isolation_level)
        session = self._class(sync_session_class=self._sync_class, **keywords)
        keep_ledger(session.sync_session, Ledger(options.timeout_at, options.read_only))
        return session


def async_source_of(bind: object, options: Mapping[str, Any]) -> AsyncSource | None:
    """Return a source for a URL, an AsyncEngine or an async_sessionmaker; None for any other bind."""
    if isinstance(bind, URL):
        return AsyncSource(OwnAsyncEngines(bind, options).get)
    if isinstance(bind, AsyncEngine):
        return AsyncSource(ForeignAsyncEngines(bind).get)
    if isinstance(bind, async_sessionmaker):
        engine = bind.kw.get("bind")
        get = ForeignAsyncEngines(engine).get if isinstance(engine, AsyncEngine) else None
        return AsyncSource(get, bind)
    return None
