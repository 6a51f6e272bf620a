"""A task class that carries its own session factory, and so needs no Alchemy.

Beside ``registry.py``, which finds the Alchemy of an app; ``planned_task.py`` asks for one or the
other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from ..errors import ConfigurationError
from ..events import SessionListener
from ..outbox.outbox import Outbox
from ..outbox.place import DEFAULT_PLACE, Place
from ..sessions.binds import bound_to, is_async_kind
from ..sessions.callable_source import CallableSource
from ..sessions.isolation import ShownEngine, engines_shown_by
from ..sessions.scope import HasRegistry, RequestRegistry, request_registry
from ..sessions.sources import (
    AsyncSessionSource,
    Makers,
    OneMaker,
    SessionmakerSource,
    SessionSource,
)
from ..sessions.takeover import refuse_unfit
from ..signatures.outcomes import SUCCESS, CommitOn

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["BoundFactory", "FactoryHome", "needs_task"]

_factory_of: Callable[[object], object] = attrgetter("session_factory")
_engine_of: Callable[[object], object] = attrgetter("bind")
_keywords_of: Callable[[object], Mapping[str, object]] = attrgetter("kw")


def _is_registry(factory: object) -> bool:
    return isinstance(factory, scoped_session) or is_async_kind(factory, "async_scoped_session")


def _without_registry(factory: object) -> object:
    """Return what makes the sessions of a registry; anything else as it is."""
    return _factory_of(factory) if _is_registry(factory) else factory


def _is_async_maker(factory: object) -> bool:
    return is_async_kind(factory, "async_sessionmaker")


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

    def made(self) -> object:
        """Return a new session, or an async_sessionmaker, if the factory gives one.

        It gives it itself, or by what it returns.
        """
        made = _without_registry(self.given())
        is_made = isinstance(made, Session) or _is_async_maker(made)
        if callable(made) and not is_made:
            made = _without_registry(made())
        return made() if isinstance(made, sessionmaker) else made


class _PlainSessions:
    """Makes the Sessions of plain code, by a factory that may make AsyncSessions.

    Args:
        make: The factory.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        # Where the registry is looked for that a session in use is from.
        self.__wrapped__ = make
        self._makers: WeakKeyDictionary[AsyncEngine, Makers] = WeakKeyDictionary()

    def __call__(self) -> object:
        """Return what the factory makes; for an AsyncSession a Session of the same database."""
        made = self.__wrapped__()
        engine: object = None
        if _is_async_maker(made):
            engine = _keywords_of(made).get("bind")
        elif is_async_kind(made, "AsyncSession"):
            engine = _engine_of(made)
        if not is_async_kind(engine, "AsyncEngine"):
            return made
        engine = cast("AsyncEngine", engine)
        makers = self._makers.get(engine) or bound_to(engine, {}).engine_home
        if makers is None:
            return made
        self._makers[engine] = makers
        return (makers.maker or makers.make())()


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
    """Serves a task class that has ``session_factory`` and needs no Alchemy.

    Args:
        factory: What the class has.
        task_name: For messages.

    Raises:
        ConfigurationError: It can be seen to give no sessions.
    """

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
        self._given = factory
        self._factory = _without_registry(factory)
        self._what = f"session_factory of task {task_name!r}"
        self._source: SessionSource | None = None
        self._async_source: AsyncSessionSource | None = None
        if _is_async_maker(self._factory):
            # For an `async def` task alone, no sync driver need be there.
            return
        self._source = self._sync_source()

    def _sync_source(self) -> SessionSource:
        factory = self._factory
        if isinstance(factory, sessionmaker):
            return SessionmakerSource(OneMaker(factory), factory.class_)
        if _is_async_maker(factory):
            return bound_to(factory, {}).source
        if isinstance(factory, BoundFactory):
            return CallableSource(_PlainSessions(factory.made), self._what)
        if callable(factory):
            refuse_unfit(factory, self._what)
            return CallableSource(_PlainSessions(factory), self._what)
        raise ConfigurationError(
            f"{self._what} is a {type(factory).__name__!r}.",
            "Give it a sessionmaker, or a callable that takes no arguments and returns a new"
            " Session.",
        )

    @property
    def source(self) -> SessionSource:
        """Where the sessions of plain tasks and of every plain ``record_failure`` come from.

        Raises:
            ConfigurationError: The factory makes AsyncSessions, and there is no driver for others.
        """
        if self._source is None:
            self._source = self._sync_source()
        return self._source

    @property
    def async_source(self) -> AsyncSessionSource:
        """Where the sessions of ``async def`` tasks come from.

        Raises:
            ConfigurationError: The factory is a sessionmaker of plain Sessions.
        """
        if self._async_source is None:
            self._async_source = self._make_async_source()
        return self._async_source

    def _make_async_source(self) -> AsyncSessionSource:
        # An optional extra: greenlet and an async driver are only there where it is used.
        from ..sessions.async_callable_source import AsyncCallableSource
        from ..sessions.async_engine import async_source_of

        factory = self._factory
        source = async_source_of(factory, {})
        if source is not None:
            return source
        make = factory.made if isinstance(factory, BoundFactory) else factory
        if isinstance(make, sessionmaker) or not callable(make):
            raise ConfigurationError(
                f"{self._what} is a {type(factory).__name__!r}, which gives no AsyncSession to an"
                " `async def` task.",
                "Give it an async_sessionmaker, or tie an Alchemy to the app.",
            )
        return AsyncCallableSource(make, self._what)

    @property
    def registry(self) -> RequestRegistry | None:
        """The registry that the class was given, or that its property returns."""
        given = self._given.given() if isinstance(self._given, BoundFactory) else self._given
        if not _is_registry(given):
            return None
        is_async = not isinstance(given, scoped_session)
        return request_registry(cast("HasRegistry", given), is_async=is_async)

    def engines_shown(self) -> list[ShownEngine]:
        """Return the engines that the factory is known to use."""
        return engines_shown_by(self._factory, {})

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
