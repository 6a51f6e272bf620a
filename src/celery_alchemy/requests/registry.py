"""Which Alchemy serves a Celery app, or a task class that carries its own session factory.

Between ``alchemy.py``, which writes here, and ``task.py``, which reads here at each request.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Protocol

from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from ..errors import ConfigurationError
from ..events import SessionListener
from ..messages.celery_types import App
from ..outbox.outbox import Outbox
from ..outbox.place import DEFAULT_PLACE, Place
from ..sessions.callable_source import CallableSource
from ..sessions.isolation import ShownEngine, engines_shown_by
from ..sessions.scope import RequestRegistry, request_registry
from ..sessions.sources import OneMaker, SessionmakerSource, SessionSource
from ..sessions.takeover import refuse_unfit
from ..signatures.outcomes import SUCCESS, CommitOn

if TYPE_CHECKING:
    from ..sessions.async_engine import AsyncSource

__all__ = ["BoundFactory", "FactoryHome", "Home", "give_home", "home_of", "needs_task"]

_ATTRIBUTE = "celery_alchemy_home"

_factory_of: Callable[[object], object] = attrgetter("session_factory")


class Home(Protocol):
    """What tasks need of the Alchemy that serves them.

    Attributes:
        commit_on: The outcomes that commit, for tasks that do not say.
        publish_in_transaction: What a plain send in a transaction with uncommitted writes does.
        place: Where the library's table is.
        outbox: Where messages are kept; None where there is no table for them.
        is_broker: The table is the app's broker too.
        keeps_messages: Every send on commit goes through the outbox, not only those of ``once``
            tasks.
        remote_tasks: Patterns of task names that other services run.
        redeliver_after: Seconds after which an owed task is sent again.
        max_deliveries: Starts without an end after which a task is dead.
        idle_transaction_seconds: A transaction that is idle for longer is reported; None for never.
        session_listeners: Told of each closed session of a task.
        around: Returns what is around each run of a task's body; None for nothing.
        registry: The application's own, which hands out the sessions of requests while they run.
    """

    commit_on: CommitOn
    publish_in_transaction: str
    place: Place
    outbox: Outbox | None
    is_broker: bool
    keeps_messages: bool
    remote_tasks: tuple[str, ...]
    redeliver_after: float
    max_deliveries: int
    idle_transaction_seconds: float | None
    session_listeners: list[SessionListener]

    @property
    def around(self) -> Callable[[object, object], object] | None: ...

    @property
    def registry(self) -> RequestRegistry | None: ...

    def engines_shown(self) -> list[ShownEngine]: ...

    @property
    def source(self) -> SessionSource: ...

    @property
    def async_source(self) -> AsyncSource: ...

    @property
    def engine(self) -> Engine: ...

    def session(self) -> AbstractContextManager[Session]: ...

    def allows_entity(self, class_: type) -> bool: ...


class BoundFactory:
    """A ``session_factory`` that was written as a method or as a property of a task's class.

    Args:
        task: Whose it is.
    """

    def __init__(self, task: object) -> None:
        self._task = task

    def given(self) -> object:
        """Return the bound method, or what the property returns now."""
        return _factory_of(self._task)

    def __call__(self) -> object:
        """Return a new Session, if the factory gives one: itself, or by what it returns."""
        made = self.given()
        if isinstance(made, scoped_session):
            made = made.session_factory
        if callable(made) and not isinstance(made, Session):
            made = made()
        return made() if isinstance(made, sessionmaker) else made


def needs_task(cls: type) -> bool:
    """Tell whether the ``session_factory`` of a class is a method or a property."""
    static = inspect.getattr_static(cls, "session_factory", None)
    if isinstance(static, FunctionType):
        parameters = inspect.signature(static).parameters.values()
        required = [
            p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        return [p.name for p in required] == ["self"]
    return isinstance(static, (classmethod, property)) or hasattr(type(static), "__set_name__")


class FactoryHome:
    """Serves a task class that has ``session_factory`` and needs no Alchemy."""

    commit_on: CommitOn = SUCCESS
    publish_in_transaction = "warn"
    place: Place = DEFAULT_PLACE
    outbox: Outbox | None = None
    is_broker = False
    keeps_messages = False
    remote_tasks: tuple[str, ...] = ("*",)
    redeliver_after: float = 0.0
    max_deliveries = 0
    idle_transaction_seconds: float | None = None
    around = None

    def __init__(self, factory: object, task_name: str) -> None:
        self.session_listeners: list[SessionListener] = []
        self._factory = factory
        what = f"session_factory of task {task_name!r}"
        if isinstance(factory, scoped_session):
            factory = factory.session_factory
        if isinstance(factory, sessionmaker):
            self.source: SessionSource = SessionmakerSource(OneMaker(factory), factory.class_)
        elif callable(factory):
            refuse_unfit(factory, what)
            self.source = CallableSource(factory, what)
        else:
            raise ConfigurationError(
                f"{what} is a {type(factory).__name__!r}.",
                "Give it a sessionmaker, or a callable that takes no arguments and returns a new"
                " Session.",
            )

    @property
    def registry(self) -> RequestRegistry | None:
        """The registry that the class was given, or that its property returns."""
        given = self._factory.given() if isinstance(self._factory, BoundFactory) else self._factory
        return (
            request_registry(given, is_async=False) if isinstance(given, scoped_session) else None
        )

    def engines_shown(self) -> list[ShownEngine]:
        """Return the engines that the factory is known to use."""
        factory = self._factory
        return engines_shown_by(
            factory.session_factory if isinstance(factory, scoped_session) else factory, {}
        )

    @property
    def async_source(self) -> AsyncSource:
        """A class's session_factory gives sync sessions only.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "A session_factory gives no AsyncSession.",
            "Tie an Alchemy with a URL or an AsyncEngine to the app.",
        )

    @property
    def engine(self) -> Engine:
        """The engine of the factory's sessions.

        Raises:
            ConfigurationError: They are bound to none.
        """
        engine = self.source.engine()
        if engine is None:
            raise ConfigurationError(
                "The session_factory is bound to no engine.", "Bind it to one."
            )
        return engine

    def allows_entity(self, class_: type) -> bool:
        """Entities of every mapped class may travel."""
        return True

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Give a session to code that runs for the task but outside of its unit of work."""
        with self.source.session() as session:
            yield session


def give_home(app: App, home: Home) -> Home | None:
    """Have an Alchemy serve the tasks of an app; return the one that has served them so far."""
    # On the app itself: two apps in one process, each with its own Alchemy, share nothing.
    before = home_of(app)
    app.__dict__[_ATTRIBUTE] = home
    return before


def home_of(app: App) -> Home | None:
    """Return the app's Alchemy, None if it has none."""
    home: Home | None = app.__dict__.get(_ATTRIBUTE)
    return home
