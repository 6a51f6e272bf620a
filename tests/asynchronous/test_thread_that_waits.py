"""What an async task leaves to the thread that waits for its coroutine, and what it has there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.conftest import MakeStand
from tests.unit.shop import Book, Shop

pytestmark = pytest.mark.databases(
    "sqlite+aiosqlite",
    "postgresql+asyncpg",
    "postgresql+psycopg",
    "mariadb+asyncmy",
)

RaiseLimit = Callable[[], None]

tenant: ContextVar[str] = ContextVar("tenant")


def test_failure_is_recorded_in_the_thread_of_the_task_and_in_the_context_of_its_body(
    shop: Shop,
) -> None:
    """An application context, a request stack and what the body has set are there."""
    seen: list[object] = []

    def record(session: Session, exc: BaseException) -> None:
        seen.extend([threading.get_ident(), tenant.get(), fails.request.id])
        session.add(Book(title="failed"))

    @shop.task(record_failure=record)
    async def fails(session: AsyncSession) -> None:
        tenant.set("acme")
        await session.connection()
        raise LookupError("Emma")

    traced = shop.trace(fails, request={"id": "a-request"})

    assert traced.state == "FAILURE"
    assert seen == [threading.get_ident(), "acme", "a-request"]
    assert shop.titles() == ["failed"]


def test_event_loop_goes_on_while_a_failure_is_recorded(shop: Shop) -> None:
    """A record that waits for another coroutine of the loop is not waited for by it."""
    go_on = threading.Event()

    def record(session: Session, exc: BaseException) -> None:
        asyncio.run_coroutine_threadsafe(let_go(), process_loop.get())
        assert go_on.wait(20)
        session.add(Book(title="failed"))

    async def let_go() -> None:
        go_on.set()

    @shop.task(record_failure=record)
    async def fails(session: AsyncSession) -> None:
        raise LookupError("Emma")

    assert shop.trace(fails).state == "FAILURE"
    assert shop.titles() == ["failed"]


def test_soft_time_limit_in_record_failure_leaves_the_error_of_the_task(
    shop: Shop,
    soft_limit: RaiseLimit,
) -> None:
    """It breaks into the record, as it would in a plain task."""

    def record(session: Session, exc: BaseException) -> None:
        session.add(Book(title="failed"))
        soft_limit()
        raise AssertionError("The signal has not come.")  # pragma: no cover

    @shop.task(record_failure=record)
    async def fails(session: AsyncSession) -> None:
        raise LookupError("Emma")

    traced = shop.trace(fails)

    assert (traced.state, type(traced.value)) == ("FAILURE", LookupError)
    assert shop.titles() == []
    assert shop.checked_out() == 0


def test_soft_time_limit_in_the_commit_is_what_the_task_fails_with(
    shop: Shop,
    soft_limit: RaiseLimit,
) -> None:
    """The connection is dropped, nothing is committed, and the limit is what is recorded."""
    errors: list[type[BaseException]] = []

    def record(session: Session, exc: BaseException) -> None:
        errors.append(type(exc))

    def wait_in_commit(session: Session) -> None:
        soft_limit()
        await_only(asyncio.sleep(60))

    @shop.task(record_failure=record)
    async def adds(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        event.listen(session.sync_session, "before_commit", wait_in_commit)

    traced = shop.trace(adds)

    assert (traced.state, type(traced.value)) == ("FAILURE", SoftTimeLimitExceeded)
    assert errors == [SoftTimeLimitExceeded]
    assert shop.titles() == []
    assert shop.database.transactions() == 0


def test_task_that_a_coroutine_awaits_and_cancels_is_cancelled(shop: Shop) -> None:
    """It ends with asyncio's own timeout, and what the task has written is rolled back."""

    @shop.task()
    async def waits(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        await asyncio.sleep(60)

    async def call() -> None:
        await asyncio.wait_for(waits(), 0.5)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(call())

    assert shop.titles() == []
    assert shop.database.transactions() == 0


def test_sessions_of_many_coroutines_at_once_are_their_own(shop: Shop) -> None:
    """Each has its own unit of work, context variables and commit, though all run on one loop."""
    together = 4
    all_here: list[asyncio.Event] = []
    arrived: list[int] = []

    @shop.task(bind=True)
    async def adds(self: Any, session: AsyncSession, number: int) -> bool:
        all_here.append(asyncio.Event())
        tenant.set(f"tenant {number}")
        session.add(Book(title=f"Emma {number}"))
        arrived.append(number)
        if len(arrived) == together:
            all_here[0].set()
        await asyncio.wait_for(all_here[0].wait(), 60)
        return self.session is session and tenant.get() == f"tenant {number}"

    adds.name  # noqa: B018 - Celery makes the task at its first use, in one thread.
    results: list[object] = []

    def run(number: int) -> None:
        results.append(shop.trace(adds, number).value)

    threads = [threading.Thread(target=run, args=[number]) for number in range(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)

    assert results == [True] * together
    assert sorted(shop.titles()) == [f"Emma {number}" for number in range(together)]


def test_retry_of_an_owed_task_is_sent_in_the_thread_of_the_task(make_stand: MakeStand) -> None:
    """It is written to the outbox by a synchronous session."""
    stand = make_stand()
    threads: list[int] = []

    def note(session: Session) -> None:
        threads.append(threading.get_ident())

    @stand.task(name="charge", once=True, bind=True)
    async def charge(self: Any, session: AsyncSession) -> None:
        event.listen(Session, "before_commit", note)
        raise self.retry(countdown=0)

    with stand.alchemy.begin():
        charge.delay_on_commit()
    [sent] = stand.sent()
    try:
        stand.deliver(sent)
    finally:
        event.remove(Session, "before_commit", note)

    assert threading.get_ident() in threads
