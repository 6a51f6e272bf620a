"""A task class with a session_factory of its own serves `async def` tasks as it serves plain ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from celery import Celery
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from celery_alchemy import ConfigurationError, SessionTask
from celery_alchemy.requests.event_loop import process_loop
from celery_alchemy.testing import no_leaks
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Base, Book, add_books

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")


def registry_on(engine: AsyncEngine) -> Any:
    return async_scoped_session(async_sessionmaker(engine), asyncio.current_task)


#: What makes the ``session_factory`` of a class.
FACTORIES: dict[str, Callable[[AsyncEngine], Any]] = {
    "maker": async_sessionmaker,
    "registry": registry_on,
    "function": lambda engine: staticmethod(lambda: AsyncSession(engine)),
    "partial": lambda engine: partial(AsyncSession, engine),
    "method": lambda engine: lambda self: AsyncSession(engine, info={"task": self.name}),
    "method of a maker": lambda engine: lambda self: async_sessionmaker(engine),
    "property of a maker": lambda engine: property(lambda self: async_sessionmaker(engine)),
    "property of a registry": lambda engine: property(partial(lambda registry, self: registry, registry_on(engine))),
}


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app without any Alchemy."""
    app = Celery("plain", broker="memory://", set_as_current=False)
    yield app
    app.close()


@pytest.fixture(params=FACTORIES)
def base(request: pytest.FixtureRequest, database: Database) -> Iterator[Any]:
    """A task class with one of the factories."""
    Base.metadata.create_all(database.engine)
    engine = create_async_engine(database.url)
    factory = FACTORIES[request.param](engine)
    with no_leaks():
        yield type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": factory})
    process_loop.run(engine.dispose)


def titles(database: Database) -> list[str]:
    return [row[0] for row in database.rows("SELECT title FROM book ORDER BY id")]


def test_session_of_each_kind_of_factory_is_the_tasks(app: Celery, database: Database, base: Any) -> None:
    """It is committed when the coroutine returns, and rolled back when it raises."""

    @task_of(app, base=base, bind=True)
    async def add(self: Any, session: AsyncSession, title: str) -> None:
        assert self.session is session
        session.add(Book(title=title))
        await session.flush()
        if title == "Sanditon":
            raise LookupError(title)

    add("Emma")
    add.apply(["Persuasion"], throw=True)
    with pytest.raises(LookupError):
        add("Sanditon")

    assert titles(database) == ["Emma", "Persuasion"]


def test_plain_record_failure_and_plain_tasks_have_a_session(app: Celery, database: Database, base: Any) -> None:
    """Of the same database, by a sync driver, as with an Alchemy on an AsyncEngine."""

    def record(session: Session, exc: Exception) -> None:
        add_books(session, [f"failed by {exc}"])

    @task_of(app, base=base, record_failure=record, name="fail")
    async def fail(session: AsyncSession) -> None:
        raise LookupError("no such page")

    @task_of(app, base=base, name="plain")
    def plain(session: Session) -> None:
        add_books(session, ["Emma"])

    with pytest.raises(LookupError):
        fail()
    plain()

    assert titles(database) == ["failed by no such page", "Emma"]


def test_registry_hands_out_the_session_of_the_task(app: Celery, database: Database) -> None:
    """Helpers that say `registry` take part in the transaction."""
    Base.metadata.create_all(database.engine)
    engine = create_async_engine(database.url)
    registry = registry_on(engine)
    base = type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": registry})

    @task_of(app, base=base)
    async def add(session: AsyncSession) -> bool:
        registry.add(Book(title="Emma"))
        return registry() is session

    assert add() is True
    assert titles(database) == ["Emma"]
    process_loop.run(engine.dispose)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (sessionmaker(), "session_factory of task 'add' is a 'sessionmaker', which gives no AsyncSession.*async_sessionmaker"),
        (staticmethod(Session), "session_factory of task 'add' returned 'Session', which is no AsyncSession"),
    ],
)
def test_factory_of_plain_sessions_is_refused_by_name(app: Celery, factory: Any, message: str) -> None:
    """The error says what to give."""
    base = type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": factory})

    @task_of(app, base=base, name="add")
    async def add(session: AsyncSession) -> None: ...

    with pytest.raises(ConfigurationError, match=message):
        add()
