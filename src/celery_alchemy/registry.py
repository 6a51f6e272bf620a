"""Which Alchemy serves a Celery app, or a task class that carries its own session factory.

Between ``alchemy.py``, which writes here, and ``task.py``, which reads here at each request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .errors import ConfigurationError
from .events import SessionListener
from .outbox import Outbox
from .outcome import SUCCESS, CommitOn
from .sessions import CallableSource, OneMaker, SessionmakerSource, SessionSource, refuse_unfit

__all__ = ["FactoryHome", "Home", "home_of", "homes_of"]

_ATTRIBUTE = "celery_alchemy_homes"


class Home(Protocol):
    """What tasks need of the Alchemy that serves them.

    Attributes:
        commit_on: The outcomes that commit, for tasks that do not say.
        publish_in_transaction: What a plain send in a transaction with uncommitted writes does.
        outbox: Where messages are kept; None where there is no table for them.
        keeps_messages: Every send on commit goes through the outbox, not only those of ``once`` tasks.
        remote_tasks: Patterns of task names that other services run.
        redeliver_after: Seconds after which an owed task is sent again.
        max_deliveries: Starts without an end after which a task is dead.
        idle_transaction_seconds: A transaction that is idle for longer is reported; None for never.
        session_listeners: Told of each closed session of a task.
    """

    commit_on: CommitOn
    publish_in_transaction: str
    outbox: Outbox | None
    keeps_messages: bool
    remote_tasks: tuple[str, ...]
    redeliver_after: float
    max_deliveries: int
    idle_transaction_seconds: float | None
    session_listeners: list[SessionListener]

    @property
    def source(self) -> SessionSource: ...

    @property
    def async_source(self) -> Any: ...

    @property
    def engine(self) -> Engine: ...

    def session(self) -> AbstractContextManager[Session]: ...

    def allows_entity(self, class_: type) -> bool: ...


class FactoryHome:
    """Serves a task class that has ``session_factory`` and needs no Alchemy."""

    commit_on: CommitOn = SUCCESS
    publish_in_transaction = "warn"
    outbox: Outbox | None = None
    keeps_messages = False
    remote_tasks: tuple[str, ...] = ("*",)
    redeliver_after: float = 0.0
    max_deliveries = 0
    idle_transaction_seconds: float | None = None

    def __init__(self, factory: object, task_name: str) -> None:
        self.session_listeners: list[SessionListener] = []
        if isinstance(factory, scoped_session):
            factory = factory.session_factory
        if isinstance(factory, sessionmaker):
            self.source: SessionSource = SessionmakerSource(OneMaker(factory), factory.class_)
        elif callable(factory):
            refuse_unfit(factory, f"session_factory of task {task_name!r}")
            self.source = CallableSource(cast("Callable[[], Any]", factory))
        else:
            raise ConfigurationError(
                f"session_factory of task {task_name!r} is a {type(factory).__name__!r}.",
                "Give it a sessionmaker, or a callable that takes no arguments and returns a new Session.",
            )

    @property
    def async_source(self) -> Any:
        """A class's session_factory gives sync sessions only.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "A session_factory gives no AsyncSession.", "Tie an Alchemy with a URL or an AsyncEngine to the app."
        )

    @property
    def engine(self) -> Engine:
        """The engine of the factory's sessions.

        Raises:
            ConfigurationError: They are bound to none.
        """
        engine = self.source.engine()
        if engine is None:
            raise ConfigurationError("The session_factory is bound to no engine.", "Bind it to one.")
        return engine

    def allows_entity(self, class_: type) -> bool:
        """Entities of every mapped class may travel."""
        return True

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Give a session to code that runs for the task but outside of its unit of work."""
        with self.source.session() as session:
            yield session


def homes_of(app: Celery[Any]) -> dict[str | None, Home]:
    """Return the Alchemy objects of an app by name; the default one is under None. The dict is live."""
    # On the app itself: two apps in one process, each with its own Alchemy, share nothing.
    return cast("dict[str | None, Home]", app.__dict__.setdefault(_ATTRIBUTE, {}))


def home_of(app: Celery[Any], name: str | None = None) -> Home | None:
    """Return the app's Alchemy of that name, None if it has none."""
    homes = app.__dict__.get(_ATTRIBUTE)
    return None if homes is None else homes.get(name)
