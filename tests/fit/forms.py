"""Applications of each form of session, on one database with a place for each tenant.

``bodies.py`` gives them their tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from celery import Celery
from celery.signals import before_task_publish
from sqlalchemy import Connection, Engine, String, create_engine, event, text
from sqlalchemy.ext.asyncio import (
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    SessionTransaction,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import Pool

from celery_alchemy import Alchemy
from tests.fit.plans import Plan
from tests.services.databases import Database

__all__ = ["TENANTS", "Application", "Base", "Mark", "current", "open_places"]

TENANTS = ("emma", "anne")
ASYNC_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mariadb": "mysql+asyncmy",
}

#: The tenant of what runs here.
current: ContextVar[str | None] = ContextVar("tenant of the mix", default=None)


class Base(DeclarativeBase):
    """The tables of the applications."""


class Mark(Base):
    """A row that a body has written; its slot is taken once."""

    __tablename__ = "mark"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    slot: Mapped[str | None] = mapped_column(String(100), unique=True)


# --- where the tenants are ----------------------------------------------------------------------


class Places:
    """Where each tenant's tables are: a schema, a database of the server, or an attached file.

    Args:
        database: The test's.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        prefix = f"{database.engine.url.database}_" if database.name == "mariadb" else ""
        self._schemas: dict[str, str] = {name: f"{prefix}{name}" for name in TENANTS}

    def schema(self, tenant: str) -> str:
        """Return the name of a tenant's schema."""
        return self._schemas[tenant]

    def attach(self, connection: Any, record: Any) -> None:
        """Attach the tenants' files to a connection of SQLite; its driver begins nothing itself."""
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout = 1000")
        path = self.database.engine.url.database
        for schema in self._schemas.values():
            cursor.execute(f"ATTACH DATABASE '{path}.{schema}' AS {schema}")
        cursor.close()

    def create(self) -> None:
        """Make the tables of every tenant, and those of nobody in particular."""
        with self.database.engine.connect() as connection:
            for schema in self._schemas.values() if self.database.name != "sqlite" else ():
                connection.execute(text(f"CREATE SCHEMA {schema}"))
            for place in (None, *self._schemas.values()):
                options: Any = {"schema_translate_map": {None: place}}
                Base.metadata.create_all(connection.execution_options(**options))
            connection.commit()

    def drop(self) -> None:
        """Drop what is not in the test's own database."""
        cascade = " CASCADE" if self.database.name == "postgresql" else ""
        for schema in self._schemas.values() if self.database.name != "sqlite" else ():
            self.database.execute(f"DROP SCHEMA {schema}{cascade}")

    def rows(self) -> list[tuple[str | None, str]]:
        """Return what is committed: tenant and name of each row."""
        tables: dict[str | None, str] = {None: "mark"}
        tables.update((name, f"{schema}.mark") for name, schema in self._schemas.items())
        with self.database.engine.connect() as connection:
            return [
                (tenant, row[0])
                for tenant, table in tables.items()
                for row in connection.execute(text(f"SELECT name FROM {table} ORDER BY id"))
            ]

    def clear(self) -> None:
        """Empty all tables."""
        tables = ["mark", "celery_outbox", *(f"{schema}.mark" for schema in self._schemas.values())]
        with self.database.engine.begin() as connection:
            for table in tables:
                connection.execute(text(f"DELETE FROM {table}"))


@contextmanager
def open_places(database: Database) -> Iterator[Places]:
    """Make the places of the tenants, and drop them at the end."""
    places = Places(database)
    if database.name == "sqlite":
        event.listen(Pool, "connect", places.attach)
    places.create()
    try:
        yield places
    finally:
        if database.name == "sqlite":
            event.remove(Pool, "connect", places.attach)
        database.disconnect_others()
        places.drop()


@before_task_publish.connect
def _send_tenant_along(headers: dict[str, Any], **_: Any) -> None:
    if current.get() is not None:
        headers.setdefault("tenant", current.get())


# --- the applications ---------------------------------------------------------------------------


class Application:
    """An application of one form.

    Args:
        form: Where the sessions of its tasks come from.
        places: Its database.
        outbox: It keeps messages.

    Attributes:
        plan: What its task does next.
        registry: What its code uses, where it has one.
        factory: Of the task classes with a ``session_factory``; None for the other forms.
        heard: The callables that have run.
        sessions: The sessions that bodies have seen.
        runs: How often the body was started.
        tasks: By what tells them apart; ``bodies.py`` makes them.
    """

    def __init__(self, form: str, places: Places, *, outbox: bool) -> None:
        self.plan = Plan()
        self.places = places
        self.heard: list[str] = []
        self.sessions: list[Session] = []
        self.runs = 0
        self.tasks: dict[Any, Any] = {}
        self.registry: Any = None
        self.factory: Any = None
        self._engines: list[Engine] = []
        self.app = Celery(f"fit-{form}-{outbox}", broker="memory://", set_as_current=False)
        self.app.conf.update(task_publish_retry=False, result_backend="cache+memory://")
        self.alchemy = Alchemy(
            self.app,
            self._bind(form),
            outbox=outbox,
            around=self.around,
            publish_in_transaction="defer" if outbox else "allow",
        )
        self.alchemy.create_tables()

    def _bind(self, form: str) -> Any:
        url = self.places.database.url
        if form in ("url", "factory"):
            self.factory = sessionmaker(self._engine()) if form == "factory" else None
            return url
        if form.startswith("async"):
            database = self.places.database
            async_url = database.engine.url.set(drivername=ASYNC_DRIVERS[database.name])
            async_engine = create_async_engine(async_url)
            self._keep(async_engine.sync_engine)
            if form == "async engine":
                return async_engine
            async_maker = async_sessionmaker(async_engine, expire_on_commit=False)
            if form == "async sessionmaker":
                return async_maker
            self.registry = async_scoped_session(async_maker, scopefunc=asyncio.current_task)
            return self.registry
        engine = self._engine()
        maker = sessionmaker(engine)
        if form == "registry":
            self.registry = scoped_session(maker)
            return self.registry
        return {"engine": engine, "sessionmaker": maker, "callable": lambda: Session(engine)}[form]

    def _engine(self) -> Any:
        engine = create_engine(self.places.database.url)
        self._keep(engine)
        return engine

    def _keep(self, engine: Engine) -> None:
        """Keep an engine of the application's own; on SQLite it must say when it begins."""
        self._engines.append(engine)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))

    def around(self, task: Any, session: Session) -> Any:
        """Return what sets a session to the tenant of the request."""
        tenant = (task.request.headers or {}).get("tenant") or current.get()
        return nullcontext() if tenant is None else self._in_tenant(tenant, session)

    @contextmanager
    def _in_tenant(self, tenant: str, session: Session) -> Iterator[None]:
        """Have each transaction of a session work for a tenant, by a map or by the search_path."""
        schema = self.places.schema(tenant)

        def begin(session: Session, began: SessionTransaction, connection: Connection) -> None:
            if self.plan.by_path:
                statement = text("SELECT set_config('search_path', :path, true)")
                connection.execute(statement, {"path": schema})
            else:
                connection.execution_options(schema_translate_map={None: schema})

        token = current.set(tenant)
        event.listen(session, "after_begin", begin)
        try:
            yield
        finally:
            event.remove(session, "after_begin", begin)
            current.reset(token)

    def checked_out(self) -> int:
        """Return how many connections of its pools are lent out."""
        pools: list[Any] = [engine.pool for engine in self._engines]
        return sum(pool.checkedout() for pool in [*pools, self.alchemy.engine.pool])

    def close(self) -> None:
        """Close every connection."""
        if self.alchemy.outbox is not None:
            self.alchemy.outbox.publisher.close()
        for engine in self._engines:
            if not engine.dialect.is_async:
                engine.dispose()
        self.alchemy.engine.dispose()
        self.app.close()
