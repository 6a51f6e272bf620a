"""Which database a connection of kombu means: that of an Alchemy of this process, or of a URL.

Beneath the transport, which knows no more than a URL and options that can be pickled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import WeakValueDictionary

from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool, Pool, QueuePool, SingletonThreadPool, StaticPool

from ..databases import database_of
from ..errors import ConfigurationError
from ..messages.celery_types import App
from ..outbox.place import DEFAULT_PLACE, Place
from ..sessions.engine import checked_url
from . import SCHEME
from .hold import Hold

__all__ = [
    "HOME_OPTION",
    "MAX_DELIVERIES",
    "WORKER_LOST_AFTER",
    "BrokerHome",
    "free_key",
    "home_for",
]

#: The transport option that names the Alchemy.
HOME_OPTION = "alchemy"

#: Seconds without a heartbeat after which a worker counts as lost.
WORKER_LOST_AFTER = 30.0

#: How often a message may have been begun by a worker that is lost.
MAX_DELIVERIES = 5

#: The connections of a worker's parent beside the one that the engine of the tasks lends: one takes
#: messages, one keeps the heart beating.
TAKING_CONNECTIONS = 2

#: Of Celery, for an app of which only the URL is known.
_EVENT_EXCHANGE = "celeryev"

_homes: WeakValueDictionary[str, BrokerHome] = WeakValueDictionary()
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class BrokerHome:
    """A database that is a broker.

    Attributes:
        key: What the transport option names it by.
        engine: Returns this process's engine.
        place: Where in the database the tables are.
        worker_lost_after_seconds: Without a heartbeat for so long, a worker counts as lost.
        max_deliveries: Begun by so many workers that were lost, a message is set aside.
        once_window_seconds: How long completion records are kept.
        app: The app that it is the broker of; None where only its URL is known.
        hold: Says whether a worker of this process, or its parent, has what it has taken.
    """

    key: str
    engine: Callable[[], Engine]
    place: Place = DEFAULT_PLACE
    worker_lost_after_seconds: float = WORKER_LOST_AFTER
    max_deliveries: int = MAX_DELIVERIES
    once_window_seconds: float = 7 * 86400.0
    app: App | None = None
    hold: Hold = field(default_factory=Hold)

    def __post_init__(self) -> None:
        with _lock:
            _homes[self.key] = self

    @property
    def event_exchange(self) -> str:
        """The exchange that workers tell their events by."""
        return _EVENT_EXCHANGE if self.app is None else str(self.app.conf.event_exchange)

    def taking_engine(self) -> Engine:
        """Return a new engine like this process's one, for what holds its connections.

        A task must not wait for a connection that its worker's parent keeps. At READ COMMITTED,
        because the stricter levels refuse what other workers have got on with.
        """
        engine = self.engine()
        if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
            raise ConfigurationError(
                "An SQLite database in memory cannot be a broker: each connection has its own.",
                "Give Alchemy a file: sqlite:///shop.db.",
            )
        pool = engine.pool.recreate()
        if not isinstance(pool, NullPool):
            pool = _with_room(pool)
        made = Engine(pool, engine.dialect, engine.url)
        if engine.dialect.name == "sqlite":
            return made
        return made.execution_options(isolation_level="READ COMMITTED")


def _with_room(pool: Pool) -> Pool:
    """Have a pool lend what the threads of a worker's parent hold, whatever its size was."""
    if (
        isinstance(pool, QueuePool)
        and pool._max_overflow >= 0
        and pool.size() + pool._max_overflow < TAKING_CONNECTIONS
    ):
        pool._max_overflow = TAKING_CONNECTIONS
    return pool


def free_key(name: str) -> str:
    """Return the key of an app's database: its name, or with a number where another one has it.

    The same in each process that makes its apps in the same order, so that options which a process
    has pickled mean the same in another.
    """
    with _lock:
        number, key = 1, name
        while key in _homes:
            number += 1
            key = f"{name}#{number}"
        return key


def home_for(url: str, options: Mapping[str, object]) -> BrokerHome:
    """Return the database that a kombu connection means.

    Args:
        url: What kombu keeps of the broker's URL: of ``alchemy+<URL>`` what follows the plus sign.
        options: The transport options.

    Raises:
        ConfigurationError: The URL names no database, and no Alchemy of the process is meant.
    """
    key = options.get(HOME_OPTION)
    if key is not None:
        home = _homes.get(str(key))
        if home is None:
            raise ConfigurationError(
                f"No Alchemy of this process is the broker {key!r}.",
                "Import the module that makes Alchemy(app, url, broker=True) before the app"
                " connects,"
                " or give the app a URL: alchemy+postgresql+psycopg://...",
            )
        return home
    if not url or url.removeprefix(f"{SCHEME}://").strip("/") == "":
        raise ConfigurationError(
            f"The broker URL {SCHEME}:// names no database, and the app has no Alchemy that does.",
            f"Make Alchemy(app, url, broker=True), or use {SCHEME}+<SQLAlchemy URL>.",
        )
    return _home_of_url(url)


@lru_cache(maxsize=64)
def _home_of_url(url: str) -> BrokerHome:
    engine = create_engine(checked_url(url))
    database_of(engine.dialect.name).configure(engine)
    return BrokerHome(f"{SCHEME}+{engine.url.render_as_string(hide_password=True)}", lambda: engine)
