"""Alchemy: ties one database to one Celery app.

At the edge: it checks what the user gives, makes the source of sessions and registers it for the
app's tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Engine, MetaData
from sqlalchemy.orm import Session

from .broker.homes import WORKER_LOST_AFTER, BrokerHome, free_key
from .broker.routes import Routes
from .broker.settings import be_broker_of
from .databases.tables import outbox_in
from .errors import ConfigurationError
from .events import SessionListener, listener_of
from .messages.celery_types import App, tasks_so_far
from .messages.publisher import Publisher
from .messages.recording import install
from .outbox.hand_over import EXIT_SECONDS
from .outbox.outbox import MAX_MESSAGE_BYTES, Outbox
from .outbox.place import Place
from .requests.around import Around
from .requests.insight import switch_on
from .requests.plain_sends import intercept
from .requests.registry import give_home
from .requests.sends_by_name import let_entities_travel
from .sessions.binds import Bind, Bound, bound_if_given, bound_to, engine_options_of
from .sessions.blocks import async_session_block, begin_block, session_block
from .sessions.engine import WorkerPool
from .sessions.isolation import ShownEngine
from .sessions.scope import RequestRegistry
from .sessions.sources import SessionSource
from .signatures import settings
from .signatures.entities import belongs_to, models_from
from .signatures.options import check_around
from .signatures.outcomes import CommitOn, commit_on_from
from .signatures.settings import PublishInTransaction
from .task import SessionTask
from .task_class import give_task_class

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from .sessions.async_engine import AsyncSource

__all__ = ["Alchemy", "Bind", "PublishInTransaction"]

#: Celery's setting beside ``sqlalchemy_url``.
_ENGINE_OPTIONS = "sqlalchemy_engine_options"

_REPLACED = (
    "The app {app!r} had an Alchemy already, and its tasks use this one from now on."
    " For a second database make an Alchemy without the app: analytics = Alchemy(bind=url)."
)


class Alchemy:
    """One database for one Celery app.

    Args:
        app: The Celery app; left out, ``init_app(app)`` gives it later.
        bind: The database: a URL, an Engine or AsyncEngine, a sessionmaker or async_sessionmaker, a
            callable that takes no arguments and returns a new Session, or the registry that the
            application's code uses, a scoped_session such as Flask-SQLAlchemy's ``db.session`` or
            an async_scoped_session: while a task's body runs, it hands out the task's session. Left
            out, the URL is read from the app's setting ``sqlalchemy_url`` at first use, and
            ``create_engine`` options from ``sqlalchemy_engine_options``.
        commit_on: The outcomes that commit, for tasks that do not say: any of ``"success"``,
            ``"retry"``, ``"ignore"``, ``"reject"``; every other outcome, and every exception, rolls
            back.
        engine_options: ``create_engine`` options for a URL; they win over Alchemy's own choice.
        broker: The database is the app's broker too: its table is the queue that workers take
            messages from. It implies ``outbox=True``.
        worker_lost_after: Seconds without a heartbeat after which a worker counts as lost, and what
            it had taken is due again.
        publish_in_transaction: What a plain ``.delay()`` does inside a task's transaction that has
            uncommitted writes: ``"warn"``, ``"raise"``, ``"defer"`` (sends after the commit) or
            ``"allow"``.
        outbox: Keep every message that is sent on commit in the table ``celery_outbox``, in the
            sender's own transaction.
        relay: Run a relay in every worker that sends what the outbox still holds.
        relay_interval_seconds: How often a relay looks when there was nothing to do.
        idle_transaction_seconds: A task's transaction that is idle for longer is reported in the
            log; None for never.
        on_session_closed: Called with a SessionReport when a task's session is closed; see
            ``on_session_closed()``.
        once_window: How long completion records are kept: seconds, or a timedelta. Default 7 days.
        redeliver_after: Seconds after which an owed ``once`` task is sent again.
        max_deliveries: Starts without an end after which a ``once`` task is dead.
        max_message_bytes: The largest message body that the outbox accepts.
        schema: The schema of the library's own table: on MySQL and MariaDB a database, on SQLite an
            attached one. Left out, the one that the database gives a new connection.
        engine: The engine of that table, where the bind cannot tell: sessions with ``binds=`` only,
            sharded ones, Flask-SQLAlchemy's outside of an app context.
        models: The declarative bases, registries or MetaData whose entities may be arguments of
            tasks; left out, every mapped class may.
        remote_tasks: Names, or patterns such as ``"billing.*"``, of tasks that other services run
            and this app does not know.
        around: Called with the task and its session; returns a context manager that is around each
            run of a task's body and of its ``record_failure``: entered first in the transaction,
            left before the commit. See ``SessionTask.around``.

    Raises:
        ConfigurationError: The URL, the bind or an option cannot work.
        TasksAlreadyBoundError: Tasks of the app are in use already, with a class that knows no
            sessions.
    """

    app: App | None = None
    outbox: Outbox | None = None
    _broker_home: BrokerHome | None = None

    def __init__(
        self,
        app: App | None = None,
        bind: Bind | None = None,
        *,
        commit_on: Iterable[str] = ("success",),
        engine_options: Mapping[str, object] | None = None,
        publish_in_transaction: PublishInTransaction = "warn",
        outbox: bool = False,
        broker: bool = False,
        worker_lost_after: float = WORKER_LOST_AFTER,
        relay: bool = True,
        relay_interval_seconds: float = 1.0,
        idle_transaction_seconds: float | None = 5.0,
        on_session_closed: SessionListener | None = None,
        once_window: float | timedelta = timedelta(days=7),
        redeliver_after: float = 900,
        max_deliveries: int = 5,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        schema: str | None = None,
        engine: Engine | None = None,
        models: object = None,
        remote_tasks: Iterable[str] = (),
        around: Around | None = None,
    ) -> None:
        settings.refuse_bind_as_app(app)
        check_around(around, "of Alchemy")
        window = once_window.total_seconds() if isinstance(once_window, timedelta) else once_window
        self.app: App | None = None
        self.outbox: Outbox | None = None
        self.is_broker: bool = settings.flag("broker", broker)
        self.keeps_messages: bool = settings.flag("outbox", outbox) or broker
        self.runs_relay: bool = settings.flag("relay", relay)
        self.commit_on: CommitOn = commit_on_from(commit_on, "Alchemy")
        self.publish_in_transaction: str = settings.known_publishing(publish_in_transaction)
        self.around: Around | None = around
        self.worker_lost_after: float = settings.positive("worker_lost_after", worker_lost_after)
        self.idle_transaction_seconds: float | None = settings.positive_or_none(
            "idle_transaction_seconds", idle_transaction_seconds
        )
        self.session_listeners: list[SessionListener] = []
        if on_session_closed is not None:
            self.on_session_closed(on_session_closed)
        self.relay_interval_seconds: float = settings.positive(
            "relay_interval_seconds", relay_interval_seconds
        )
        self.once_window_seconds: float = settings.positive("once_window", window)
        self.redeliver_after: float = settings.positive("redeliver_after", redeliver_after)
        self.max_deliveries: int = settings.whole("max_deliveries", max_deliveries)
        self._max_message_bytes = settings.whole("max_message_bytes", max_message_bytes)
        self.remote_tasks: tuple[str, ...] = settings.names("remote_tasks", remote_tasks)
        self._models = None if models is None else models_from(models)
        self.place: Place = Place(settings.schema_or_none(schema), settings.engine_or_none(engine))
        self._engine_seen: Engine | None = None
        self._bound = bound_if_given(bind, engine_options, self.place.engine)
        self._async_source: AsyncSource | None = None
        switch_on()
        if app is not None:
            self._tie(app)

    def init_app(self, app: App) -> None:
        """Serve the tasks of a Celery app; its default task class becomes SessionTask.

        A task class that the app was given stays, with SessionTask mixed in front of it; one that
        was given by name, at its first use.

        Raises:
            TasksAlreadyBoundError: Tasks of the app are in use already, with a class that knows no
                sessions.
            ConfigurationError: This Alchemy serves another app, this is no app, or its task class
                cannot be mixed with SessionTask.
        """
        self._tie(app)

    def _tie(self, app: App) -> None:
        settings.refuse_unfit_app(app, self.app)
        routes = self._routes_for(app) if self.is_broker else None
        give_task_class(app)
        self.app = app
        self.outbox = Outbox(
            Publisher(app), lambda: self.engine, self._max_message_bytes, self.place, routes
        )
        install(app, intercept)
        let_entities_travel(app)
        if give_home(app, self) not in (None, self):
            # Not refused: a test may give an app another database.
            warnings.warn(_REPLACED.format(app=app.main), stacklevel=3)
        for task in tasks_so_far(app):
            if isinstance(task, SessionTask):
                task.see_home()
        for step in ("SessionStep", "GrowthStep", "RelayStep"):
            app.steps["worker"].add(f"celery_alchemy.worker.boot_steps:{step}")

    def _routes_for(self, app: App) -> Routes:
        """Make the database the broker of an app."""
        if self._broker_home is None:
            self._broker_home = BrokerHome(
                free_key(app.main or "celery"),
                lambda: self.engine,
                self.place,
                self.worker_lost_after,
                self.max_deliveries,
                self.once_window_seconds,
                app,
            )
        be_broker_of(app, self._broker_home.key)
        return Routes(self._broker_home, lambda: app.amqp.queues)

    # --- the source of sessions -------------------------------------------------------------------

    @property
    def source(self) -> SessionSource:
        """Where this Alchemy's sessions come from.

        Raises:
            ConfigurationError: No bind was given and the app has no ``sqlalchemy_url``.
        """
        return self._bound_now().source

    @property
    def async_source(self) -> AsyncSource:
        """Where this Alchemy's AsyncSessions come from.

        Raises:
            ConfigurationError: The bind gives none, or no async driver is installed.
        """
        if self._async_source is None:
            self._async_source = self._bound_now().async_source()
        return self._async_source

    @property
    def registry(self) -> RequestRegistry | None:
        """The application's own registry, if it is the bind.

        It hands out the requests' sessions.
        """
        return None if self._bound is None else self._bound.registry

    def _bound_now(self) -> Bound:
        """Return what the bind has become; at the first call without one the settings are read."""
        if self._bound is None:
            self._bound = self._bound_by_settings()
        return self._bound

    def _bound_by_settings(self) -> Bound:
        url = None if self.app is None else self.app.conf.get("sqlalchemy_url")
        if self.app is None or url is None:
            raise ConfigurationError(
                "This Alchemy has no database.",
                "Give a bind, Alchemy(app, url), or set sqlalchemy_url in the app's configuration"
                + (" (and call init_app(app) first)." if self.app is None else "."),
            )
        options = self.app.conf.get(_ENGINE_OPTIONS)
        return bound_to(url, engine_options_of(_ENGINE_OPTIONS, options), self.place.engine)

    @property
    def engine(self) -> Engine:
        """The engine of the default database.

        It is the same object for the life of the Alchemy, also in processes that are forked. Where
        the bind does not show it, a session is asked where it would write; what one has answered
        holds until the next.

        Raises:
            ConfigurationError: The sessions know no engine, here and now.
        """
        if self.place.engine is not None:
            return self.place.engine
        bound = self._bound_now()
        if bound.engine_home is not None:
            return bound.engine_home.get()
        return bound.source.engine() or self._engine_of_sessions(bound.source)

    def _engine_of_sessions(self, source: SessionSource) -> Engine:
        try:
            with closing(source.opened()) as session:
                engine = self._engine_seen = self.place.bind_of(session).engine
        except ConfigurationError as exc:
            if self._engine_seen is not None:
                return self._engine_seen
            raise ConfigurationError(
                f"This Alchemy knows no engine: its sessions are not bound to one. {exc.problem}",
                "Give it a URL, an Engine, or a sessionmaker with bind=engine; or name the engine"
                " that has the library's table: Alchemy(..., engine=...).",
            ) from exc
        return engine

    def engine_in(self, pool: WorkerPool) -> Engine:
        """Return the engine as it is in a worker of this shape, with the pool that it has there.

        ``alchemy check`` asks for it.

        Raises:
            ConfigurationError: As for ``engine``.
        """
        home = self._bound_now().engine_home
        return self.engine if home is None else home.in_worker(pool)

    def on_session_closed(self, listener: SessionListener) -> SessionListener:
        """Have a callable told of each closed session of a task.

        Returns it, so it serves as a decorator.

        It runs in the task's process, right after the session was closed; what it raises is logged.
        """
        self.session_listeners.append(listener_of(listener))
        return listener

    def engines_shown(self) -> list[ShownEngine]:
        """Return the engines that the bind is known to use.

        Nothing is connected, and no engine is made.
        """
        return [] if self._bound is None else self._bound.engines_shown()

    def allows_entity(self, class_: type) -> bool:
        """Tell whether entities of a mapped class may be arguments of tasks."""
        return self._models is None or belongs_to(class_, self._models)

    @property
    def metadata(self) -> MetaData:
        """The library's own tables.

        For Alembic ``target_metadata = [Base.metadata, alchemy.metadata]``.
        """
        return outbox_in(self.place.schema).metadata

    def create_tables(self) -> None:
        """Make the library's own tables where they do not exist.

        On PostgreSQL it also makes the ``schema`` that they were given.
        """
        self.place.create(self.engine)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until the broker has every message that this process has committed so far.

        A commit does not wait for the broker: a thread hands its messages over right after it. A
        process that ends does this by itself, for up to 10 seconds.

        Args:
            timeout: Seconds for which it waits at most; left out, 10.

        Returns:
            True when all of them are handed over. False when the time was over, or when some could
            not be since the last call: the relay sends those. Without an outbox there is nothing to
            wait for.
        """
        if self.outbox is None:
            return True
        return self.outbox.drain(EXIT_SECONDS if timeout is None else timeout)

    # --- sessions outside of tasks ----------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Give a session to code outside of tasks.

        It is closed at the end of the block; what was not committed is rolled back. Inside the
        block, in the same thread or asyncio task, it is the session at hand for
        ``delay_on_commit``.
        """
        with session_block(self.source) as session:
            yield session

    @asynccontextmanager
    async def async_session(self) -> AsyncIterator[AsyncSession]:
        """As ``session()``, with an AsyncSession on an engine of the running event loop."""
        async with async_session_block(self.async_source) as session:
            yield session

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """As ``session()``, and commit at the end of the block; roll back if it raises."""
        with begin_block(self.source) as session:
            yield session
