"""One engine for each process, made after the fork, with a pool that fits the worker's.

Underneath the sessions: ``sessions.py`` binds to the engine from here. ``worker.py`` says what pool the worker runs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import sqlalchemy
from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool

from .databases import database_of
from .errors import ConfigurationError
from .ledger import observe

__all__ = [
    "ForeignEngine",
    "OwnEngine",
    "WorkerPool",
    "checked_url",
    "most_connections",
    "pool_findings",
    "set_worker_pool",
    "small_pool",
    "worker_pool",
]

logger: logging.Logger = logging.getLogger(__name__)

# A task's own session takes one connection. A task called inside a task, alchemy.session() in a body and record_failure take
# one more each for a short time; they must not wait for the task that waits for them.
OVERFLOW = 4


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """The Celery worker pool that this process belongs to.

    Attributes:
        name: ``"prefork"``, ``"threads"``, ``"solo"``, ``"gevent"``, ``"eventlet"``, or the class path of another.
        concurrency: How many tasks run at once in the whole worker.
        time_limit: The hard time limit, in seconds, of tasks that have none of their own (``worker --time-limit``).
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


_worker_pool: WorkerPool | None = None


def set_worker_pool(pool: WorkerPool | None) -> None:
    """Say which worker pool this process, and every process forked from it, belongs to."""
    global _worker_pool  # noqa: PLW0603 - a fact about the process, inherited by its children.
    _worker_pool = pool


def worker_pool() -> WorkerPool | None:
    """Return the worker pool of this process; None outside a worker."""
    return _worker_pool


def checked_url(url: str | URL) -> URL:
    """Parse a URL and import its driver.

    Raises:
        ConfigurationError: The URL cannot be parsed, its database is unknown to SQLAlchemy, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The text is not repeated: a URL that cannot be parsed may hold a password that cannot be masked.
        raise ConfigurationError(
            "The database URL given to Alchemy cannot be parsed.",
            "It has the form dialect+driver://user:password@host/database, or sqlite:///path/to/file.",
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
            f"Install the package of {parsed.get_driver_name()!r}, or name another driver in the URL.",
        ) from exc
    return parsed


def pool_defaults(url: URL, options: Mapping[str, Any], pool: WorkerPool | None) -> dict[str, Any]:
    """Return the pool options of an engine that Alchemy makes: sized for the worker's pool, and pinged where a server can drop it."""
    if url.get_backend_name() == "sqlite":
        defaults: dict[str, Any] = {}
        if url.database in (None, "", ":memory:"):
            return defaults
    else:
        defaults = {"pool_pre_ping": True}
    if pool is not None and "poolclass" not in options and "pool" not in options:
        defaults |= {"pool_size": pool.tasks_per_process, "max_overflow": OVERFLOW}
    return defaults


def _maker_on(engine: Engine) -> sessionmaker[Session]:
    # Objects stay usable after a commit and after ``released()``: an attribute does not begin a transaction that nobody ends.
    return sessionmaker(engine, expire_on_commit=False)


class OwnEngine:
    """The engine that Alchemy makes from a URL: made at first use in each process, never shared across a fork.

    Args:
        url: The database.
        options: ``create_engine`` options of the user; they win over those chosen here.
    """

    def __init__(self, url: URL, options: Mapping[str, Any]) -> None:
        self._url = url
        self._options = dict(options)
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self.maker: sessionmaker[Session] | None = None
        _engines.add(self)

    def get(self) -> Engine:
        """Return this process's engine, making it at the first call."""
        if self._engine is None:
            with self._lock:
                if self._engine is None:
                    self._engine = self._make()
        return self._engine

    def make(self) -> sessionmaker[Session]:
        """Make and return the sessionmaker of this process, for ``sessions.py``."""
        self.maker = _maker_on(self.get())
        return self.maker

    def in_worker(self, pool: WorkerPool) -> Engine:
        """Return an engine as it is made in a worker of this shape, for a look at its options and its pool."""
        return sqlalchemy.create_engine(self._url, **{**pool_defaults(self._url, self._options, pool), **self._options})

    def _make(self) -> Engine:
        # Looked up now: tracers put their own in its place, in a worker after the fork.
        engine = sqlalchemy.create_engine(self._url, **{**pool_defaults(self._url, self._options, worker_pool()), **self._options})
        database_of(engine.dialect.name).configure(engine)
        observe(engine)
        return engine

    def current(self) -> Engine | None:
        """Return this process's engine if it has been made."""
        return self._engine

    def after_fork_in_child(self) -> None:
        """Forget the parent's engine without touching its sockets; the next ``get()`` makes the child's."""
        engine, self._engine = self._engine, None
        self.maker = None
        self._lock = threading.Lock()
        if engine is not None:
            engine.dispose(close=False)


class ForeignEngine:
    """A user's own engine: used as it is, and given a fresh pool in each child process.

    ``dispose(close=False)`` leaves the parent's connections alone; a plain ``dispose()`` in a child would close the sockets that
    the parent still uses.
    Source: https://docs.sqlalchemy.org/en/20/core/pooling.html#using-connection-pools-with-multiprocessing-or-os-fork
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.maker: sessionmaker[Session] | None = None
        observe(engine)
        _engines.add(self)

    def get(self) -> Engine:
        """Return the user's engine."""
        return self._engine

    def make(self) -> sessionmaker[Session]:
        """Make and return the sessionmaker, for ``sessions.py``."""
        self.maker = _maker_on(self._engine)
        return self.maker

    def current(self) -> Engine | None:
        """Return the user's engine."""
        return self._engine

    def in_worker(self, pool: WorkerPool) -> Engine:
        """Return the user's engine, which is the same in every worker."""
        return self._engine

    def after_fork_in_child(self) -> None:
        """Give the child a pool of its own."""
        self._engine.dispose(close=False)


_engines: WeakSet[OwnEngine | ForeignEngine] = WeakSet()


def _after_fork_in_child() -> None:
    for held in list(_engines):
        try:
            held.after_fork_in_child()
        except Exception:
            # One engine that cannot be renewed must not keep the others on the parent's sockets.
            logger.exception("An engine could not be renewed after the fork of process %s", os.getpid())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def open_connections(engine: Engine) -> int:
    """Return how many connections an engine's pool holds or has lent out; 0 for a pool that keeps none."""
    pool = engine.pool
    if not isinstance(pool, QueuePool):
        return 0
    return pool.checkedin() + pool.checkedout()


def most_connections(engine: Engine) -> int | None:
    """Return how many connections an engine lends in one process at most; None if nothing limits it."""
    pooled = engine.pool
    if not isinstance(pooled, QueuePool):
        return None
    overflow: int = getattr(pooled, "_max_overflow", 0)
    return pooled.size() + overflow if pooled.size() > 0 and overflow >= 0 else None


def small_pool(engine: Engine, pool: WorkerPool) -> tuple[str, str] | None:
    """Return what is wrong with an engine that lends less than a worker of this shape takes, and the fix; None when it is enough."""
    most = most_connections(engine)
    if most is None or most >= pool.tasks_per_process:
        return None
    reason = (
        f"The engine for {engine.url.render_as_string(hide_password=True)} lends at most {most} connections, but the {pool.name} pool"
        f" runs {pool.tasks_per_process} tasks at once in one process: tasks will wait for a connection and fail after pool_timeout."
    )
    return reason, f"Make it with pool_size={pool.tasks_per_process}."


def pool_findings(engine: Engine, pool: WorkerPool) -> list[str]:
    """Return what is wrong with a user's engine in a worker of this shape, each with its fix; empty when it is well."""
    small = small_pool(engine, pool)
    findings = [] if small is None else [" ".join(small)]
    shown = engine.url.render_as_string(hide_password=True)
    if pool.name == "prefork" and not isinstance(engine.pool, NullPool) and open_connections(engine):
        findings.append(
            f"{open_connections(engine)} connection(s) of the engine for {shown} were opened before the worker forked."
            " Each child gets a pool of its own, so they are not shared, but they stay open and unused in the parent."
            " Open no connection at import time, or call engine.dispose() after it."
        )
    return findings
