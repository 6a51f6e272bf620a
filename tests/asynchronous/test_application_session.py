"""An async_scoped_session hands out the AsyncSession of the request that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, OnceCommitError
from tests.services.databases import Database
from tests.unit.shop import Book, Shop

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")


class AsyncBookshop(Shop):
    """A shop whose coroutines say `registry`."""

    def __init__(self, database: Database) -> None:
        self.engine = create_async_engine(database.url)
        maker = async_sessionmaker(self.engine)
        self.registry = async_scoped_session(maker, asyncio.current_task)
        super().__init__(database, bind=self.registry)
        self.alchemy.create_tables()

    async def add(self, title: str) -> None:
        """Put a book where the application's code puts it."""
        self.registry.add(Book(title=title))
        await self.registry.flush()


@pytest.fixture
def shop(database: Database) -> Iterator[AsyncBookshop]:
    """A shop on an async driver."""
    shop = AsyncBookshop(database)
    yield shop
    shop.close()


@pytest.mark.parametrize("once", [False, True])
def test_what_a_coroutine_writes_is_committed_with_the_task(shop: AsyncBookshop, once: bool) -> None:
    """The registry, the parameter and `self.session` are one AsyncSession."""

    @shop.task(bind=True, once=once)
    async def work(self: Any, session: AsyncSession) -> None:
        await shop.add("Emma")
        assert shop.registry() is session is self.session

    @shop.task(once=once)
    async def by_helper() -> None:
        await shop.add("Persuasion")

    @shop.task(once=once)
    async def fail() -> None:
        await shop.add("Sanditon")
        raise LookupError

    states = [shop.trace(task).state for task in (work, by_helper, fail)]

    assert states == ["SUCCESS", "SUCCESS", "FAILURE"]
    assert shop.titles() == ["Emma", "Persuasion"]


@pytest.mark.parametrize("once", [False, True])
def test_removed_session_is_rolled_back_and_the_next_is_the_tasks_too(shop: AsyncBookshop, once: bool) -> None:
    """The removed one is refused from then on."""

    @shop.task(once=once)
    async def work(session: AsyncSession, uses: bool) -> None:
        await shop.add("rolled back")
        await shop.registry.remove()
        await shop.add(f"committed {uses}")
        assert shop.registry() is not session
        if uses:
            await session.scalars(select(Book))

    traced = [shop.trace(work, uses) for uses in (False, True)]

    assert [one.state for one in traced] == ["SUCCESS", "FAILURE"]
    assert isinstance(traced[1].value, ConfigurationError)
    assert shop.titles() == ["committed False"]


def test_commit_through_the_registry_is_refused_in_a_once_task(shop: AsyncBookshop) -> None:
    """Also after remove()."""

    @shop.task(once=True)
    async def work(removes: bool) -> None:
        await shop.registry.connection()
        if removes:
            await shop.registry.remove()
        await shop.add("Emma")
        await shop.registry.commit()

    for removes in (False, True):
        assert isinstance(shop.trace(work, removes).value, OnceCommitError)

    assert shop.titles() == []


def test_coroutine_that_awaits_a_task_keeps_its_own_session(shop: AsyncBookshop) -> None:
    """A request of a web framework awaits the task: two sessions, and the caller's is as it was."""

    @shop.task()
    async def work() -> None:
        await shop.add("Emma")

    async def request() -> None:
        mine = shop.registry()
        mine.add(pending := Book(title="pending"))
        await work()
        assert shop.registry() is mine
        assert list(mine.new) == [pending]
        await shop.registry.remove()
        await shop.engine.dispose()

    asyncio.run(request())

    assert shop.titles() == ["Emma"]


def test_session_that_the_caller_passes_is_handed_out(shop: AsyncBookshop) -> None:
    """Itself, or the registry that stands for it."""

    @shop.task()
    async def look(session: AsyncSession) -> list[str]:
        assert shop.registry() is session
        return list(await shop.registry.scalars(select(Book.title)))

    async def test() -> None:
        shop.registry.add(Book(title="Emma"))
        assert await look(session=shop.registry) == ["Emma"]
        assert await look(session=shop.registry()) == ["Emma"]
        await shop.registry.remove()
        await shop.engine.dispose()

    asyncio.run(test())

    assert shop.titles() == []


def test_asyncio_tasks_of_the_body_have_their_own_sessions(shop: AsyncBookshop) -> None:
    """An AsyncSession is one coroutine's at a time; the registry's scope function says which."""

    @shop.task()
    async def work(session: AsyncSession) -> None:
        async def helper() -> bool:
            own = shop.registry()
            await shop.registry.scalars(select(Book))
            await shop.registry.remove()
            return own is not session

        assert await asyncio.gather(helper(), helper()) == [True, True]
        await shop.add("Emma")

    work()

    assert shop.titles() == ["Emma"]


def test_record_failure_and_plain_tasks_of_such_an_app_have_sessions(
    shop: AsyncBookshop,
) -> None:
    """Their sessions are Sessions, which no async registry can hand out."""

    def record(session: Session, exc: Exception) -> None:
        session.add(Book(title="failed"))

    @shop.task(record_failure=record)
    async def fail() -> None:
        await shop.add("half done")
        raise LookupError

    @shop.task()
    def plain(session: Session) -> None:
        session.add(Book(title="plain"))

    assert shop.trace(fail).state == "FAILURE"
    assert shop.trace(plain).state == "SUCCESS"

    assert shop.titles() == ["failed", "plain"]
