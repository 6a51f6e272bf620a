"""around of async tasks: an async context manager with the AsyncSession, or a plain one with the Session behind it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import SessionTask
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg")

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


def test_async_one_is_entered_first_and_left_before_the_commit(make_shop: MakeShop) -> None:
    """It awaits statements of the task's own session, in the task's own transaction."""
    seen: list[str] = []

    @asynccontextmanager
    async def around(task: Any, session: AsyncSession) -> AsyncIterator[None]:
        event.listen(session.sync_session, "before_commit", lambda *_: seen.append("commit"))
        event.listen(session.sync_session, "after_flush", lambda *_: seen.append("flush"))
        await session.execute(text("INSERT INTO book (title) VALUES (:title)"), {"title": f"by around {len(seen)}"})
        try:
            yield
        except BaseException as exc:
            seen.append(type(exc).__name__)
            raise
        seen.append("leave")

    shop = make_shop(around=around)

    @shop.task(name="work")
    async def work(session: AsyncSession, fails: bool) -> None:
        seen.append("body")
        session.add(Book(title="Emma"))
        if fails:
            raise LookupError

    shop.trace(work, False)
    succeeded, titles = list(seen), shop.titles()
    shop.trace(work, True)

    assert succeeded == ["body", "flush", "leave", "commit"]
    assert titles == shop.titles() == ["by around 0", "Emma"]
    assert seen[len(succeeded) :] == ["body", "LookupError"]


def test_plain_one_has_the_session_behind(make_shop: MakeShop) -> None:
    """One function serves plain tasks, async tasks and record_failure; what it sets in the context holds in the coroutine."""
    kinds: list[str] = []

    @contextmanager
    def around(task: Any, session: Session) -> Iterator[None]:
        kinds.append(type(session).__name__)
        session.execute(text("INSERT INTO book (title) VALUES (:title)"), {"title": f"of {task.name}, {len(kinds)}"})
        token = tenant.set("emma")
        try:
            yield
        finally:
            tenant.reset(token)

    shop = make_shop(around=around)
    tenants: list[str] = []

    @shop.task(name="async")
    async def async_task(session: AsyncSession) -> None:
        tenants.append(tenant.get())

    def record(session: Session, exc: BaseException) -> None:
        tenants.append(f"recorded for {tenant.get()}")

    @shop.task(name="fails", record_failure=record)
    async def fails() -> None:
        raise LookupError(tenant.get())

    shop.trace(async_task)
    failed = shop.trace(fails)

    assert kinds == ["Session", "Session", "Session"]
    assert tenants == ["emma", "recorded for emma"]
    assert str(failed.value) == "emma"
    assert shop.titles() == ["of async, 1", "of fails, 3"]
    assert tenant.get() == "nobody"


def test_annotation_says_which_session_a_plain_one_gets(make_shop: MakeShop) -> None:
    """One that is annotated with AsyncSession gets it."""
    kinds: list[str] = []

    class Audited(SessionTask):
        abstract = True

        @contextmanager
        def around(self, session: AsyncSession) -> Iterator[None]:
            kinds.append(type(session).__name__)
            yield

    shop = make_shop()

    @shop.task(base=Audited)
    async def work() -> None: ...

    shop.trace(work)

    assert kinds == ["AsyncSession"]


def test_async_one_is_not_for_record_failure(make_shop: MakeShop, caplog: pytest.LogCaptureFixture) -> None:
    """That is a plain function with a Session: the log says what to return for it, and the task's own error stands."""

    @asynccontextmanager
    async def around(task: Any, session: AsyncSession) -> AsyncIterator[None]:
        yield

    shop = make_shop(around=around)

    @shop.task(record_failure=lambda session, exc: None)
    async def fails() -> None:
        raise LookupError

    with caplog.at_level(logging.ERROR):
        traced = shop.trace(fails)

    assert isinstance(traced.value, LookupError)
    assert "Return a plain context manager for a Session" in caplog.text


def test_once_task_is_inside_of_it(make_stand: MakeStand) -> None:
    """What it sets in the transaction is set for the body, and not for the start, which is a transaction of its own."""
    entered: list[str] = []

    @asynccontextmanager
    async def around(task: Any, session: AsyncSession) -> AsyncIterator[None]:
        entered.append(task.name)
        session.add(Effect(name="by around"))
        yield

    stand = make_stand(around=around)

    @stand.task(name="charge", once=True)
    async def charge(session: AsyncSession) -> str:
        session.add(Effect(name="charged"))
        return "done"

    with stand.alchemy.begin():
        charge.delay_on_commit()
    [sent] = stand.sent()
    values = [stand.deliver(sent).value for _ in range(2)]

    assert values == ["done", "done"]
    assert entered == ["charge"]
    assert stand.effects() == ["by around", "charged"]
