"""A session that takes the place of the task's own in a registry: its around holds for it too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from celery_alchemy import Alchemy
from celery_alchemy.requests.event_loop import process_loop
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Base, Book

SCHEMAS = ("emma", "public")

pytestmark = pytest.mark.databases("postgresql")


def set_tenant(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Have each transaction work in the tenant's schema."""
    connection.execution_options(schema_translate_map={None: "emma"})


@contextmanager
def by_listener(task: Any, session: Session) -> Iterator[None]:
    """Have it set when each transaction begins."""
    event.listen(session, "after_begin", set_tenant)
    yield
    event.remove(session, "after_begin", set_tenant)


@contextmanager
def by_bind(task: Any, session: Session) -> Iterator[None]:
    """Give the session its engine with other options."""
    options: Any = {"schema_translate_map": {None: session.info.setdefault("tenant", "emma")}}
    session.bind = session.get_bind().execution_options(**options)
    yield


@pytest.fixture
def titles(database: Database) -> Iterator[Callable[[], dict[str, list[str]]]]:
    """What is committed in the schemas of the tenant and of nobody."""
    database.execute("CREATE SCHEMA emma")
    options: Any = {"schema_translate_map": {None: "emma"}}
    Base.metadata.create_all(database.engine.execution_options(**options))
    Base.metadata.create_all(database.engine)

    def read() -> dict[str, list[str]]:
        query = "SELECT title FROM {}.book"
        return {name: [row[0] for row in database.rows(query.format(name))] for name in SCHEMAS}

    yield read
    database.disconnect_others()
    database.execute("DROP SCHEMA emma CASCADE")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close at the end what a test has opened."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("around", [by_listener, by_bind])
@pytest.mark.parametrize("way", ["removed", "replaced"])
@pytest.mark.parametrize("once", [False, True])
def test_next_session_of_the_registry_is_the_tenants_too(
    database: Database, stack: ExitStack, titles: Any, around: Any, way: str, once: bool
) -> None:
    """After `remove()`, and where the application has put one of its own there."""
    engine = create_engine(database.url)
    stack.callback(engine.dispose)
    registry = scoped_session(sessionmaker(engine))
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    alchemy = Alchemy(app, registry, around=around)
    alchemy.create_tables()

    @task_of(app, once=once)
    def work(session: Session) -> None:
        registry.add(Book(title="taken back"))
        registry.flush()
        registry.remove()
        if way == "replaced":
            registry(autoflush=False)
        assert not registry.registry.has() or way == "replaced"
        registry.add(Book(title="kept"))

    work.apply(throw=True)

    assert titles() == {"emma": ["kept"], "public": []}


def test_next_session_of_an_async_registry_is_the_tenants_too(
    database: Database,
    stack: ExitStack,
    titles: Any,
) -> None:
    """In coroutines as well."""
    engine = create_async_engine(database.engine.url.set(drivername="postgresql+asyncpg"))
    stack.callback(process_loop.close)
    registry = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    Alchemy(app, registry, around=by_listener)

    @task_of(app)
    async def work() -> None:
        await registry.execute(text("SELECT 1"))
        await registry.remove()
        registry.add(Book(title="kept"))

    work()

    assert titles() == {"emma": ["kept"], "public": []}
