"""Alchemy: ties one database to one Celery app.

At the edge: it checks what the user gives, makes the source of sessions and registers it for the app's tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args

from celery import Celery, Task
from sqlalchemy import URL, Engine, MetaData
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from . import tables
from .engine import ForeignEngine, OwnEngine, WorkerPool, checked_url
from .entities import belongs_to, models_from
from .errors import ConfigurationError, TasksAlreadyBoundError
from .events import SessionListener
from .insight import switch_on
from .labels import LabelledSource, Labels, comment_keys_from
from .message import install
from .outbox import MAX_MESSAGE_BYTES, Outbox
from .outcome import CommitOn, commit_on_from
from .publisher import Publisher
from .registry import Home, homes_of
from .request import AtHand, abandon, at_hand
from .sending import intercept
from .sessions import NOTHING, CallableSource, OneMaker, SessionmakerSource, SessionSource, is_open, refuse_unfit
from .task import SessionTask

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    from .async_engine import AsyncSource

__all__ = ["Alchemy", "Bind", "PublishInTransaction"]

Bind = Union[str, URL, Engine, "AsyncEngine", "sessionmaker[Any]", "async_sessionmaker[Any]", Callable[[], Session]]
PublishInTransaction = Literal["warn", "raise", "defer", "allow"]

_REPLACED = (
    "The app {app!r} had an Alchemy{named} already, and its tasks use this one from now on."
    " For a second database give each further Alchemy a name: Alchemy(app, url, name='analytics')."
)

_DEFAULT_TASK_CLASS = "celery.app.task:Task"


class Alchemy:
    """One database for one Celery app.

    Args:
        app: The Celery app; left out, ``init_app(app)`` gives it later.
        bind: The database: a URL, an Engine or AsyncEngine, a sessionmaker or async_sessionmaker, or a callable that takes no
            arguments and returns a new Session. Left
            out, the URL is read from the app's setting ``sqlalchemy_url`` at first use, and ``create_engine`` options from
            ``sqlalchemy_engine_options``.
        name: For a second database of the app: tasks ask for its session by ``Annotated[Session, "name"]``. The Alchemy without
            a name serves everything else: ``self.session``, the outbox, ``once``.
        commit_on: The outcomes that commit, for tasks that do not say: any of ``"success"``, ``"retry"``, ``"ignore"``,
            ``"reject"``; every other outcome, and every exception, rolls back.
        engine_options: ``create_engine`` options for a URL; they win over Alchemy's own choice.
        publish_in_transaction: What a plain ``.delay()`` does inside a task's transaction that has uncommitted writes: ``"warn"``,
            ``"raise"``, ``"defer"`` (sends after the commit) or ``"allow"``.
        outbox: Keep every message that is sent on commit in the table ``celery_outbox``, in the sender's own transaction.
        relay: Run a relay in every worker that sends what the outbox still holds.
        relay_interval_seconds: How often a relay looks when there was nothing to do.
        idle_transaction_seconds: A task's transaction that is idle for longer is reported in the log; None for never.
        on_session_closed: Called with a SessionReport when a task's session is closed; see ``on_session_closed()``.
        application_name: Show the running task's name and id as ``application_name`` in PostgreSQL's ``pg_stat_activity``, for one
            more statement in each transaction.
        statement_comments: What stands in a comment behind each statement of a task: ``"task"``, its name, and ``"id"``, which
            makes each request's statements new texts to a driver that keeps prepared statements.
        once_window: How long completion records are kept: seconds, or a timedelta. Default 7 days.
        redeliver_after: Seconds after which an owed ``once`` task is sent again.
        max_deliveries: Starts without an end after which a ``once`` task is dead.
        max_message_bytes: The largest message body that the outbox accepts.
        models: The declarative bases, registries or MetaData whose entities may be arguments of tasks; left out, every mapped
            class may.
        remote_tasks: Names, or patterns such as ``"billing.*"``, of tasks that other services run and this app does not know.

    Raises:
        ConfigurationError: The URL, the bind or an option cannot work.
        TasksAlreadyBoundError: Tasks of the app are in use already, with a class that knows no sessions.
    """

    def __init__(
        self,
        app: Celery[Any] | None = None,
        bind: Bind | None = None,
        *,
        name: str | None = None,
        commit_on: Iterable[str] = ("success",),
        engine_options: Mapping[str, Any] | None = None,
        publish_in_transaction: PublishInTransaction = "warn",
        outbox: bool = False,
        relay: bool = True,
        relay_interval_seconds: float = 1.0,
        idle_transaction_seconds: float | None = 5.0,
        on_session_closed: SessionListener | None = None,
        application_name: bool = False,
        statement_comments: Iterable[str] = (),
        once_window: float | timedelta = timedelta(days=7),
        redeliver_after: float = 900,
        max_deliveries: int = 5,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        models: object = None,
        remote_tasks: Iterable[str] = (),
    ) -> None:
        if isinstance(app, (str, URL, Engine, sessionmaker)):
            raise ConfigurationError(
                f"The first argument of Alchemy is a {type(app).__name__!r}, not the Celery app.",
                "Write Alchemy(app, url), or Alchemy(bind=url) and init_app(app) later.",
            )
        if publish_in_transaction not in get_args(PublishInTransaction):
            raise ConfigurationError(
                f"publish_in_transaction={publish_in_transaction!r} is unknown.",
                f"Use one of {', '.join(map(repr, get_args(PublishInTransaction)))}.",
            )
        self.commit_on: CommitOn = commit_on_from(commit_on, "Alchemy")
        self.publish_in_transaction: str = publish_in_transaction
        self.name = name
        self.app: Celery[Any] | None = None
        self.keeps_messages = outbox
        self.outbox: Outbox | None = None
        self.runs_relay = relay
        self.idle_transaction_seconds: float | None = (
            None if idle_transaction_seconds is None else _positive("idle_transaction_seconds", idle_transaction_seconds)
        )
        self.session_listeners: list[SessionListener] = [] if on_session_closed is None else [on_session_closed]
        switch_on()
        comment_with = comment_keys_from(statement_comments)
        self._labels = Labels(comment_with, application_name=application_name) if application_name or comment_with else None
        self.relay_interval_seconds: float = _positive("relay_interval_seconds", relay_interval_seconds)
        window = once_window.total_seconds() if isinstance(once_window, timedelta) else once_window
        self.once_window_seconds: float = _positive("once_window", window)
        self.redeliver_after: float = _positive("redeliver_after", redeliver_after)
        self.max_deliveries: int = int(_positive("max_deliveries", max_deliveries))
        self._max_message_bytes = int(_positive("max_message_bytes", max_message_bytes))
        self.remote_tasks: tuple[str, ...] = tuple(remote_tasks)
        self._models = None if models is None else models_from(models)
        self._engine_options = dict(engine_options or {})
        self._engine_home: OwnEngine | ForeignEngine | None = None
        self._source: SessionSource | None = None
        self._async_source: AsyncSource | None = None
        self._bind: object = None
        if bind is not None:
            self._source = self._source_of(bind)
        elif engine_options:
            raise ConfigurationError(
                "engine_options were given without a URL.",
                "Give the URL as bind, or set sqlalchemy_engine_options in the app's configuration.",
            )
        if app is not None:
            self._tie(app)

    def init_app(self, app: Celery[Any]) -> None:
        """Serve the tasks of a Celery app; its default task class becomes SessionTask unless it was given one.

        Raises:
            TasksAlreadyBoundError: Tasks of the app are in use already, with a class that knows no sessions.
            ConfigurationError: This Alchemy serves another app, or this is no app.
        """
        self._tie(app)

    def _tie(self, app: Celery[Any]) -> None:
        if not isinstance(cast("object", app), Celery):
            raise ConfigurationError(
                f"An Alchemy was given {type(app).__name__!r} for its app, which is no Celery app.",
                "Write Alchemy(celery_app, url), or alchemy.init_app(celery_app).",
            )
        if self.app is not None and self.app is not app:
            raise ConfigurationError(
                f"This Alchemy serves the app {self.app.main!r} already.", "Make another Alchemy for another app."
            )
        if not _has_task_class(app):
            _set_task_class(app)
        self.app = app
        self.outbox = Outbox(Publisher(app), lambda: self.engine, self._max_message_bytes)
        install(app, intercept)
        if homes_of(app).get(self.name, self) is not self:
            # Not refused: a test may give an app another database.
            warnings.warn(_REPLACED.format(app=app.main, named=f" named {self.name!r}" if self.name else ""), stacklevel=3)
        homes_of(app)[self.name] = cast("Home", self)
        for task in cast("Any", app)._tasks.values():
            if isinstance(task, SessionTask):
                task.forget_home()
                task.refuse_spanning()
        app.steps["worker"].add("celery_alchemy.worker:SessionStep")
        app.steps["worker"].add("celery_alchemy.worker:RelayStep")

    # --- the source of sessions ------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> SessionSource:
        """Where this Alchemy's sessions come from.

        Raises:
            ConfigurationError: No bind was given and the app has no ``sqlalchemy_url``.
        """
        if self._source is None:
            self._source = self._source_from_settings()
        return self._source if self._labels is None else LabelledSource(self._source, self._labels)

    @property
    def engine(self) -> Engine:
        """This process's engine.

        Raises:
            ConfigurationError: The bind is a callable whose sessions are bound to no engine.
        """
        engine = self.source.engine()
        if engine is None:
            raise ConfigurationError(
                "This Alchemy knows no engine: its sessions are not bound to one.",
                "Give it a URL, an Engine, or a sessionmaker with bind=engine.",
            )
        return engine

    def engine_in(self, pool: WorkerPool) -> Engine:
        """Return the engine as it is in a worker of this shape, with the pool that it has there; for ``alchemy check``.

        Raises:
            ConfigurationError: As for ``engine``.
        """
        engine = self.engine
        return engine if self._engine_home is None else self._engine_home.in_worker(pool)

    def on_session_closed(self, listener: SessionListener) -> SessionListener:
        """Have a callable told of each closed session of a task; returns it, so it serves as a decorator.

        It runs in the task's process, right after the session was closed; what it raises is logged.
        """
        self.session_listeners.append(listener)
        return listener

    def allows_entity(self, class_: type) -> bool:
        """Tell whether entities of a mapped class may be arguments of tasks."""
        return self._models is None or belongs_to(class_, self._models)

    @property
    def metadata(self) -> MetaData:
        """The library's own tables; for Alembic ``target_metadata = [Base.metadata, alchemy.metadata]``."""
        return tables.metadata

    def create_tables(self) -> None:
        """Make the library's own tables where they do not exist."""
        tables.metadata.create_all(self.engine)

    def _source_from_settings(self) -> SessionSource:
        url = None if self.app is None else self.app.conf.get("sqlalchemy_url")
        if self.app is None or url is None:
            raise ConfigurationError(
                "This Alchemy has no database.",
                "Give a bind, Alchemy(app, url), or set sqlalchemy_url in the app's configuration"
                + (" (and call init_app(app) first)." if self.app is None else "."),
            )
        self._engine_options = dict(self.app.conf.get("sqlalchemy_engine_options") or {})
        return self._source_of(url)

    @property
    def async_source(self) -> AsyncSource:
        """Where this Alchemy's AsyncSessions come from.

        Raises:
            ConfigurationError: The bind gives none, or no async driver is installed.
        """
        if self._async_source is None:
            if self._bind is None:
                self.source  # noqa: B018 - reads the URL from the settings.
            # An optional extra: greenlet and an async driver are only there where it is used.
            from .async_engine import async_source_of

            self._async_source = async_source_of(self._bind, self._engine_options)
            if self._labels is not None and self._async_source is not None:
                self._async_source = cast("AsyncSource", LabelledSource(self._async_source, self._labels))
        if self._async_source is None:
            raise ConfigurationError(
                f"An AsyncSession is needed, and a {type(self._bind).__name__!r} as bind gives none.",
                "Give Alchemy a URL, an AsyncEngine or an async_sessionmaker.",
            )
        return self._async_source

    def _source_of(self, bind: object) -> SessionSource:
        if isinstance(bind, scoped_session) or _is_async(bind, "async_scoped_session"):
            # Its own sessions are one for each thread; each request has one of its own.
            bind = cast("Any", bind).session_factory
        self._bind = bind
        url = self._url_of(bind)
        if url is not None:
            self._engine_home = OwnEngine(url, self._engine_options)
            return SessionmakerSource(self._engine_home)
        if self._engine_options:
            raise ConfigurationError(
                f"engine_options were given with a {type(bind).__name__!r}.",
                "They are for a URL; give these options where your engine is made.",
            )
        if isinstance(bind, Engine):
            self._engine_home = ForeignEngine(bind)
            return SessionmakerSource(self._engine_home)
        if isinstance(bind, sessionmaker):
            engine = bind.kw.get("bind")
            if isinstance(engine, Engine):
                self._engine_home = ForeignEngine(engine)
            return SessionmakerSource(OneMaker(bind), bind.class_)
        if callable(bind) and not isinstance(bind, type):
            refuse_unfit(bind, "The callable given to Alchemy")
            return CallableSource(cast("Callable[[], Session]", bind))
        raise ConfigurationError(
            f"bind is a {type(bind).__name__!r}.",
            "Give a URL, an Engine, a sessionmaker, or a callable that takes no arguments and returns a new Session.",
        )

    def _url_of(self, bind: object) -> URL | None:
        """Return the URL for the sync engine of a URL, and of an AsyncEngine, whose own one only works in its event loop."""
        if isinstance(bind, (str, URL)):
            url = checked_url(bind)
            self._bind = url
        else:
            of_maker = getattr(bind, "kw", {}).get("bind") if _is_async(bind, "async_sessionmaker") else bind
            if not _is_async(of_maker, "AsyncEngine"):
                return None
            url = cast("Any", of_maker).url
        if url.get_dialect().is_async and url.get_driver_name() != "psycopg":
            from .async_engine import sync_url_of

            return sync_url_of(url)
        return url

    # --- sessions outside of tasks ---------------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Give a session to code outside of tasks; it is closed at the end, what was not committed is rolled back.

        Inside the block, in the same thread or asyncio task, it is the session at hand for ``delay_on_commit``.
        """
        session = self.source.session()
        outer = at_hand.get()
        at_hand.set(_Block(session, outer))
        try:
            yield session
        except BaseException as exc:
            if is_open(session):
                abandon(session, exc, lambda: "alchemy.session()")
            raise
        else:
            session.close()
        finally:
            at_hand.set(outer)

    @asynccontextmanager
    async def async_session(self) -> AsyncIterator[AsyncSession]:
        """As ``session()``, with an AsyncSession on an engine of the running event loop."""
        session = self.async_source.session(NOTHING)
        outer = at_hand.get()
        at_hand.set(_Block(session.sync_session, outer))
        try:
            async with session:
                yield session
        finally:
            at_hand.set(outer)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """As ``session()``, and commit at the end of the block; roll back if it raises."""
        with self.session() as session:
            yield session
            session.commit()


def _positive(name: str, value: float) -> float:
    given: object = value
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given <= 0:
        raise ConfigurationError(f"{name}={value!r} is not a positive number.", "Give a number greater than 0.")
    return value


class _Block:
    """The session of an ``alchemy.session()`` block, at hand while the block runs."""

    __slots__ = ("outer", "session")

    def __init__(self, session: Session, outer: AtHand | None) -> None:
        self.session = session
        self.outer = outer


def _is_async(bind: object, name: str) -> bool:
    """Tell whether a bind is one of SQLAlchemy's async kinds, without importing its asyncio extension."""
    return any(base.__name__ == name and base.__module__.startswith("sqlalchemy.ext.asyncio") for base in type(bind).__mro__)


def _has_task_class(app: Celery[Any]) -> bool:
    """Tell whether an app was given a task class of its own: as ``task_cls``, or by ``app.Task = ...`` as many Flask apps do."""
    assigned = app.__dict__.get("Task")
    # The class that Celery makes of task_cls carries its app.
    return app.task_cls not in (_DEFAULT_TASK_CLASS, Task) or (assigned is not None and vars(assigned).get("_app") is not app)


def _set_task_class(app: Celery[Any]) -> None:
    bound = [
        task for name, task in cast("Any", app)._tasks.items() if not name.startswith("celery.") and not isinstance(task, SessionTask)
    ]
    if bound:
        raise TasksAlreadyBoundError(tuple(sorted(task.name for task in bound))[:5])
    cast("Any", app).task_cls = SessionTask
    # app.Task is a cached property; Celery's own tasks, which need no session, may have filled it.
    app.__dict__.pop("Task", None)
