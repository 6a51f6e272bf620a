"""One engine for each Alchemy, with a pool that fits the worker's.

Underneath the sessions: ``sources.py`` binds to the engine from here. ``worker/boot_steps.py`` says
what pool the worker runs. ``forks.py``, which is imported here for what it does, keeps connections
from crossing a fork.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import sqlalchemy
from sqlalchemy import URL, Engine, make_url
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import AssertionPool, NullPool, QueuePool, SingletonThreadPool, StaticPool

from ..databases import database_of
from ..errors import ConfigurationError
from . import forks as _forks  # noqa: F401 - for what it does.
from .ledger import observe
from .pinging import ping_when_idle

__all__ = [
    "ForeignEngine",
    "Options",
    "OwnEngine",
    "WorkerPool",
    "checked_url",
    "dispose_own_engines",
    "is_own",
    "lends_two",
    "most_connections",
    "pool_findings",
    "set_worker_pool",
    "small_pool",
    "worker_pool",
]

#: Options by their names: of ``create_engine``, or of an async_sessionmaker.
Options = dict[str, Any]

#: Where an engine that an Alchemy has made has its OwnEngine.
_OWNER = "celery_alchemy.owner"

# A task's own session takes one connection. A task called inside a task, alchemy.session() in a
# body and record_failure take one more each for a short time; they must not wait for the task that
# waits for them.
OVERFLOW = 4


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """The Celery worker pool that this process belongs to.

    Attributes:
        name: ``"prefork"``, ``"threads"``, ``"solo"``, ``"gevent"``, ``"eventlet"``, or the class
            path of another.
        concurrency: How many tasks run at once in the whole worker.
        time_limit: The hard time limit, in seconds, of tasks that have none of their own (``worker
            --time-limit``).
    """

    name: str
    concurrency: int
    time_limit: float | None = None

    @property
    def tasks_per_process(self) -> int:
        """How many tasks share one process, and so one connection pool."""
        return 1 if self.name in ("prefork", "solo") else self.concurrency

    @property
    def processes(self) -> int:
        """How many processes run tasks, each with a connection pool of its own."""
        return self.concurrency if self.name == "prefork" else 1

    @property
    def enforces_limits(self) -> bool:
        """Tell whether a task is ended at its time limit, soft or hard, wherever it is."""
        return self.name == "prefork"


_worker_pool: WorkerPool | None = None


def set_worker_pool(pool: WorkerPool | None) -> None:
    """Say which worker pool this process, and every process forked from it, belongs to.

    Engines that were made before, at the import of a module for example, get a pool of its size.
    """
    global _worker_pool  # noqa: PLW0603 - a fact about the process, inherited by its children.
    _worker_pool = pool
    if pool is not None:
        for own in list(_own_engines):
            own.fit(pool)


def worker_pool() -> WorkerPool | None:
    """Return the worker pool of this process; None outside a worker."""
    return _worker_pool


def checked_url(url: str | URL) -> URL:
    """Parse a URL and import its driver.

    Raises:
        ConfigurationError: The URL cannot be parsed, its database is unknown to SQLAlchemy, or its
            driver is not installed.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The text is not repeated: a URL that cannot be parsed may hold a password that cannot be
        # masked.
        raise ConfigurationError(
            "The database URL given to Alchemy cannot be parsed.",
            "It has the form dialect+driver://user:password@host/database, or"
            " sqlite:///path/to/file.",
        ) from None
    shown = parsed.render_as_string(hide_password=True)
    try:
        parsed.get_dialect().import_dbapi()
    except NoSuchModuleError:
        raise ConfigurationError(
            f"SQLAlchemy knows no dialect {parsed.drivername!r}, as in {shown}.",
            "Use postgresql+psycopg, mysql+pymysql, sqlite or another dialect that is installed.",
        ) from None
    except ImportError as exc:
        raise ConfigurationError(
            f"The driver for {shown} is not installed: {exc}.",
            f"Install the package of {parsed.get_driver_name()!r}, or name another driver in the"
            " URL.",
        ) from exc
    return parsed


def pool_defaults(url: URL, options: Mapping[str, object], pool: WorkerPool | None) -> Options:
    """Return the pool options of an engine that Alchemy makes.

    The pool is sized for the worker's pool, and pinged where a server can drop a connection.
    """
    if url.get_backend_name() == "sqlite":
        defaults: Options = {}
        if url.database in (None, "", ":memory:"):
            return defaults
    else:
        defaults = {"pool_pre_ping": True}
    is_given = "poolclass" in options or "pool" in options
    if pool is not None and not is_given and _has_sized_pool(url):
        defaults |= {"pool_size": pool.tasks_per_process, "max_overflow": OVERFLOW}
    return defaults


def _has_sized_pool(url: URL) -> bool:
    """Tell whether its pool has a size; that of aiosqlite has none before SQLAlchemy 2.0.38."""
    dialect = url.get_dialect()
    return issubclass(dialect, DefaultDialect) and issubclass(
        dialect.get_pool_class(url), QueuePool
    )


def _maker_on(engine: Engine) -> sessionmaker[Session]:
    # Objects stay usable after a commit and after ``released()``: an attribute does not begin a
    # transaction that nobody ends.
    return sessionmaker(engine, expire_on_commit=False)


class OwnEngine:
    """The engine that Alchemy makes from a URL.

    It is one object for the life of the Alchemy, also across a fork.

    So what listens to it, to pgvector's types or a token for each connection, listens in every
    child. Its connections do not cross the fork (``forks.py``), and its pool follows what the
    worker runs.

    Args:
        url: The database.
        options: ``create_engine`` options of the user; they win over those chosen here.
    """

    def __init__(self, url: URL, options: Mapping[str, object]) -> None:
        self._url = url
        self._options = dict(options)
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self.maker: sessionmaker[Session] | None = None
        _own_engines.add(self)

    def get(self) -> Engine:
        """Return the engine, making it at the first call."""
        if self._engine is None:
            with self._lock:
                if self._engine is None:
                    self._engine = self._make()
        return self._engine

    def make(self) -> sessionmaker[Session]:
        """Make and return the sessionmaker of this process, for ``sources.py``."""
        self.maker = _maker_on(self.get())
        return self.maker

    def in_worker(self, pool: WorkerPool) -> Engine:
        """Return the engine as it is in a worker of this shape.

        It is made for a look at its options and its pool.
        """
        if self._engine is not None and pool == _worker_pool:
            return self._engine
        return sqlalchemy.create_engine(self._url, **self._options_in(pool))

    def _options_in(self, pool: WorkerPool | None) -> Options:
        return {**pool_defaults(self._url, self._options, pool), **self._options}

    def _make(self) -> Engine:
        # Looked up now: tracers put their own in its place, in a worker after the fork.
        engine = sqlalchemy.create_engine(self._url, **self._options_in(worker_pool()))
        database_of(engine.dialect.name).configure(engine)
        observe(engine)
        if "pool_pre_ping" not in self._options:
            ping_when_idle(engine)
        # Each keeps the other: whoever keeps the engine may use it, and both end together.
        vars(engine)[_OWNER] = self
        return engine

    def __del__(self) -> None:
        self.dispose()

    def fit(self, pool: WorkerPool) -> None:
        """Size the pool for a worker, if the engine has been made."""
        if self._engine is not None and type(self._engine.pool) is QueuePool:
            options = self._options_in(pool)
            if "pool_size" in options:
                _resize(self._engine, options["pool_size"], options.get("max_overflow", OVERFLOW))

    def dispose(self) -> None:
        """Close the connections that are not in use."""
        if self._engine is not None:
            self._engine.dispose()

    def after_fork_in_child(self) -> None:
        """Forget a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()


def _resize(engine: Engine, size: int, overflow: int) -> None:
    """Give an engine's pool another size; in its place, unless it holds more connections than that.

    A new one has the same listeners. No public way leads to the size of one that is there.
    """
    pool: Any = engine.pool
    if (size, overflow) == (pool.size(), pool._max_overflow):
        return
    if pool.checkedin() > size:
        engine.dispose()
        pool = engine.pool
    with pool._overflow_lock:
        # Below zero it says how many the pool may still open before one counts as overflow.
        pool._overflow -= size - pool.size()
        pool._pool.maxsize = size
        pool._max_overflow = overflow if size else -1


class ForeignEngine:
    """A user's own engine, used as it is."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.maker: sessionmaker[Session] | None = None
        observe(engine)

    def get(self) -> Engine:
        """Return the user's engine."""
        return self._engine

    def make(self) -> sessionmaker[Session]:
        """Make and return the sessionmaker, for ``sources.py``."""
        self.maker = _maker_on(self._engine)
        return self.maker

    def in_worker(self, pool: WorkerPool) -> Engine:
        """Return the user's engine, which is the same in every worker."""
        return self._engine


_own_engines: WeakSet[OwnEngine] = WeakSet()


def dispose_own_engines() -> None:
    """Close the connections of every engine that an Alchemy has made in this process.

    It is called at the end of the process.
    """
    for own in list(_own_engines):
        own.dispose()


atexit.register(dispose_own_engines)


def _after_fork_in_child() -> None:
    for own in list(_own_engines):
        own.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def open_connections(engine: Engine) -> int:
    """Return how many connections an engine's pool holds or has lent out.

    0 for a pool that keeps none.
    """
    pool = engine.pool
    if not isinstance(pool, QueuePool):
        return 0
    return pool.checkedin() + pool.checkedout()


def most_connections(engine: Engine) -> int | None:
    """Return how many connections an engine lends in one process at most.

    None if nothing limits it.
    """
    pooled = engine.pool
    if not isinstance(pooled, QueuePool):
        return None
    overflow: int = getattr(pooled, "_max_overflow", 0)
    return pooled.size() + overflow if pooled.size() > 0 and overflow >= 0 else None


def is_own(engine: Engine) -> bool:
    """Tell whether an Alchemy has made an engine."""
    return _OWNER in vars(engine)


def lends_two(engine: Engine) -> bool:
    """Tell whether an engine lends a second connection to the same database beside the first.

    An SQLite database in memory is another one for each thread, or one connection for all of them.
    """
    if isinstance(engine.pool, (SingletonThreadPool, StaticPool, AssertionPool)):
        return False
    most = most_connections(engine)
    return most is None or most > 1


def small_pool(engine: Engine, pool: WorkerPool) -> tuple[str, str] | None:
    """Return what is wrong with an engine that lends too little, and the fix.

    None when it lends what a worker of this shape takes.
    """
    most = most_connections(engine)
    if most is None or most >= pool.tasks_per_process:
        return None
    reason = (
        f"The engine for {engine.url.render_as_string(hide_password=True)} lends at most {most}"
        f" connections, but the {pool.name} pool runs {pool.tasks_per_process} tasks at once in one"
        " process: tasks will wait for a connection and fail after pool_timeout."
    )
    return reason, f"Make it with pool_size={pool.tasks_per_process}."


def pool_findings(engine: Engine, pool: WorkerPool) -> list[str]:
    """Return what is wrong with a user's engine in a worker of this shape, each with its fix.

    Empty when it is well.
    """
    small = small_pool(engine, pool)
    findings = [] if small is None else [" ".join(small)]
    shown = engine.url.render_as_string(hide_password=True)
    if (
        pool.name == "prefork"
        and not isinstance(engine.pool, NullPool)
        and open_connections(engine)
    ):
        findings.append(
            f"{open_connections(engine)} connection(s) of the engine for {shown} were opened before"
            " the worker forked. Each child gets a pool of its own, so they are not shared, but"
            " they stay open and unused in the parent. Open no connection at import time, or call"
            " engine.dispose() after it."
        )
    return findings
