"""An AsyncSession sends by the same rules, and the event loop goes on while the broker is spoken to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from celery_alchemy import enqueue, on_commit, released
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg")

#: The driver of the stand's own engine, where the test's driver knows no synchronous use.
SYNC_DRIVERS = {"aiosqlite": "pysqlite", "asyncpg": "psycopg"}


@pytest.fixture(params=[True, False], ids=["outbox", "direct"])
def stand(request: pytest.FixtureRequest, database: Any, make_stand: MakeStand) -> OutboxStand:
    """A stand, once with and once without the outbox, whose own engine is synchronous."""
    database.async_url = database.url
    dialect, _, driver = make_url(database.url).drivername.partition("+")
    sync_url = make_url(database.url).set(drivername=f"{dialect}+{SYNC_DRIVERS.get(driver, driver)}")
    database.url = sync_url.render_as_string(hide_password=False)
    return make_stand(outbox=request.param)


def in_session(stand: OutboxStand, use: Callable[[AsyncSession], Awaitable[Any]]) -> Any:
    """Run a coroutine with an AsyncSession of the user's own engine, in an event loop of its own."""

    async def run() -> Any:
        engine = create_async_engine(stand.database.async_url, poolclass=NullPool)  # type: ignore[attr-defined]
        try:
            async with AsyncSession(engine, expire_on_commit=False) as session:
                return await use(session)
        finally:
            await engine.dispose()

    return asyncio.run(run())


def test_committed_async_transaction_sends_its_task(stand: OutboxStand) -> None:
    """After the commit, once, under the final id."""

    async def use(session: AsyncSession) -> tuple[Any, int]:
        session.add(Effect(name="written"))
        result = enqueue(session, stand.effect.s("sent"))
        before = len(stand.sent())
        await session.commit()
        return result, before

    result, before = in_session(stand, use)
    [sent] = stand.sent()

    assert before == 0
    assert (sent.id, sent.args) == (result.id, ["sent"])
    assert stand.effects() == ["written"]
    assert stand.outbox() == []


def test_rolled_back_async_transaction_sends_nothing(stand: OutboxStand) -> None:
    """Neither the transaction's nor the SAVEPOINT's; what was outside of it is sent."""

    async def use(session: AsyncSession) -> None:
        enqueue(session, stand.effect.s("ghost"))
        await session.rollback()
        async with session.begin_nested() as savepoint:
            enqueue(session, stand.effect.s("ghost of the savepoint"))
            await savepoint.rollback()
        async with session.begin_nested():
            enqueue(session, stand.effect.s("released"))
        await session.commit()

    in_session(stand, use)

    assert [sent.args for sent in stand.sent()] == [["released"]]
    assert stand.outbox() == []


def test_delay_on_commit_takes_an_async_session(stand: OutboxStand) -> None:
    """apply_async_on_commit(session=...) and on_commit take one as enqueue does."""
    ran: list[str] = []

    async def use(session: AsyncSession) -> None:
        stand.effect.apply_async_on_commit(("sent",), session=session)
        on_commit(session, lambda: ran.append("after"))
        await session.commit()

    in_session(stand, use)

    assert [sent.args for sent in stand.sent()] == [["sent"]]
    assert ran == ["after"]


def test_event_loop_goes_on_while_the_broker_is_slow(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that waits for a confirm must not stop every other request of the process."""
    publishing, may_publish = threading.Event(), threading.Event()
    send = "celery_alchemy.messages.publisher.send"

    def slow_send(*args: Any, **kwargs: Any) -> None:
        publishing.set()
        if not may_publish.wait(10):
            raise TimeoutError("the event loop did not go on")

    monkeypatch.setattr(send, slow_send)

    async def use(session: AsyncSession) -> None:
        enqueue(session, stand.effect.s("sent"))
        commit = asyncio.ensure_future(session.commit())
        while not publishing.is_set():
            await asyncio.sleep(0.001)
        # Only a loop that runs gets here.
        may_publish.set()
        await commit

    in_session(stand, use)

    assert publishing.is_set()


def test_many_async_sessions_send_at_once(stand: OutboxStand) -> None:
    """Sessions of one loop commit side by side; each sends its own, none twice."""
    count = 8

    async def run() -> None:
        engine = create_async_engine(stand.database.async_url, poolclass=NullPool)  # type: ignore[attr-defined]

        async def one(number: int) -> None:
            async with AsyncSession(engine) as session:
                enqueue(session, stand.effect.s(f"{number}"))
                await session.commit()

        await asyncio.gather(*(one(number) for number in range(count)))
        await engine.dispose()

    asyncio.run(run())

    assert sorted(sent.args[0] for sent in stand.sent()) == sorted(str(number) for number in range(count))
    assert stand.outbox() == []


def test_async_scoped_session_sends_as_its_session_does(stand: OutboxStand) -> None:
    """Enqueue, on_commit and released take the registry itself, as web applications hold it."""
    ran: list[str] = []

    async def use(session: AsyncSession) -> Any:
        registry = async_scoped_session(async_sessionmaker(session.bind), scopefunc=asyncio.current_task)
        result = enqueue(registry, stand.effect.s("kept"))
        on_commit(registry, lambda: ran.append("kept"))
        async with released(registry, commit=True):
            pass
        enqueue(registry, stand.effect.s("ghost"))
        await registry.rollback()
        await registry.remove()
        return result

    result = in_session(stand, use)

    assert [sent.id for sent in stand.sent()] == [result.id]
    assert ran == ["kept"]


def test_send_of_a_callable_that_waited_for_an_async_commit_goes_out(stand: OutboxStand) -> None:
    """In a transaction of its own, in the greenlet of the commit."""

    async def use(session: AsyncSession) -> None:
        def follow() -> None:
            session.add(Effect(name="after"))
            enqueue(session, stand.effect.s("child"))

        on_commit(session, follow)
        await session.commit()

    in_session(stand, use)

    assert [sent.args for sent in stand.sent()] == [["child"]]
    assert stand.effects() == ["after"]
