"""The tenant goes with whatever is sent for it: canvases, links, retries, eager calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import enqueue, on_commit
from celery_alchemy.testing import captured
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import OutboxStand
from tests.tenants.orders import current, tenant_of

Seen = list[tuple[str, str]]


@pytest.fixture(params=[True, False], ids=["outbox", "direct"])
def stand(request: pytest.FixtureRequest, seen: Seen, make_stand: MakeStand) -> OutboxStand:
    """An app whose tasks note for which tenant they run."""

    @contextmanager
    def in_tenant(task: Any, session: Session) -> Iterator[None]:
        seen.append((task.name, tenant_of(task)))
        token = current.set(tenant_of(task))
        try:
            yield
        finally:
            current.reset(token)

    stand = make_stand(outbox=request.param, around=in_tenant)
    add_tasks(stand)
    return stand


@pytest.fixture
def seen() -> Seen:
    """The tasks that have run, with their tenants, in order."""
    return []


def add_tasks(stand: OutboxStand) -> None:
    @stand.task(name="plain")
    def plain(session: Session) -> None: ...

    @stand.task(name="once", once=True)
    def once(session: Session) -> None: ...

    @stand.task(name="retries", bind=True, max_retries=1)
    def retries(self: Any, session: Session) -> None:
        if not self.request.retries:
            raise self.retry(countdown=0)

    @stand.task(name="replaces", bind=True)
    def replaces(self: Any, session: Session) -> None:
        raise self.replace(plain.si())

    @stand.task(name="fails")
    def fails(session: Session) -> None:
        raise LookupError

    @stand.task(name="sends")
    def sends(session: Session) -> None:
        plain.delay_on_commit()
        on_commit(session, plain.delay)

    @stand.task(name="calls")
    def calls(session: Session) -> None:
        plain()
        plain.apply()


def canvases(tasks: Any) -> dict[str, tuple[Any, list[str]]]:
    """Return signatures, with the names of the tasks that run for them."""
    plain, once = tasks["plain"], tasks["once"]
    return {
        "chain": (chain(plain.si(), plain.si(), plain.si()), ["plain"] * 3),
        "chain of once": (chain(once.si(), once.si()), ["once"] * 2),
        "link": (plain.signature((), link=[once.si()]), ["plain", "once"]),
        "link_error": (tasks["fails"].signature((), link_error=[plain.si()]), ["fails", "plain"]),
        "group": (group(plain.si(), once.si()), ["plain", "once"]),
        "chord": (chord([plain.si(), once.si()], plain.si()), ["plain", "once", "plain"]),
        "retry": (tasks["retries"].si(), ["retries"] * 2),
        "replace": (tasks["replaces"].si(), ["replaces", "plain"]),
        "sends": (tasks["sends"].si(), ["sends", "plain", "plain"]),
        "calls": (tasks["calls"].si(), ["calls", "plain", "plain"]),
    }


WAYS = [
    "chain",
    "chain of once",
    "link",
    "link_error",
    "group",
    "chord",
    "retry",
    "replace",
    "sends",
    "calls",
]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("way", WAYS)
def test_tenant_goes_with_what_follows(stand: OutboxStand, seen: Seen, way: str) -> None:
    """Celery sends the next link when the body, and what is around it, has ended."""
    signature, names = canvases(stand.app.tasks)[way]

    with captured(stand.alchemy) as sent:
        token = current.set("emma")
        with stand.alchemy.begin() as session:
            enqueue(session, signature)
        current.reset(token)
        sent.run(propagate=False)

    assert seen == [(name, "emma") for name in names]
    assert current.get() is None


@pytest.mark.databases("sqlite")
def test_eager_task_runs_for_the_tenant_of_its_caller(stand: OutboxStand, seen: Seen) -> None:
    """It has no message, and Celery sends no signal for one."""
    stand.app.conf.task_always_eager = True
    token = current.set("emma")
    try:
        stand.app.tasks["plain"].delay().get()
    finally:
        current.reset(token)

    assert seen == [("plain", "emma")]


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.parametrize("name", ["async", "async once"])
def test_tenant_goes_with_what_follows_an_async_task(stand: OutboxStand, seen: Seen, name: str) -> None:
    """The event loop runs it in the context of the thread that waits."""

    @stand.task(name="async")
    async def run(session: AsyncSession) -> None:
        on_commit(session, stand.app.tasks["async"].delay) if len(seen) < 2 else None

    @stand.task(name="async once", once=True)
    async def run_once(session: AsyncSession) -> None: ...

    task = stand.app.tasks[name]
    with captured(stand.alchemy) as sent:
        token = current.set("emma")
        chain(task.si(), task.si()).delay()
        current.reset(token)
        sent.run(propagate=False)

    assert {tenant for _, tenant in seen} == {"emma"}
    assert len(seen) == (3 if name == "async" else 2)
