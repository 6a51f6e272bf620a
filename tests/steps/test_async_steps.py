"""``await step(...)`` holds for async tasks as ``step(...)`` does for plain ones."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import StepError, enqueue, step
from celery_alchemy.operations import dead_tasks
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Crash
from tests.steps.test_steps import busy, send, steps_of

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy")


@pytest.mark.parametrize("owed", [True, False], ids=["owed", "direct"])
def test_committed_steps_are_not_run_again(stand: OutboxStand, owed: bool) -> None:
    """The next run gets their values, runs the one that was not committed, and completes."""
    made: list[str] = []
    crashes: list[BaseException] = [Crash()]

    async def write(session: AsyncSession, name: str) -> str:
        made.append(name)
        session.add(Effect(name=name))
        await session.flush()
        if name == "b" and crashes:
            raise crashes.pop()
        return f"wrote {name}"

    @stand.task(name="ingest", once=True)
    async def ingest(session: AsyncSession) -> list[Any]:
        first = await step("a", write, "a")
        return [first, session.in_transaction(), await step("b", write, "b")]

    sent = send(stand, ingest, owed=owed)
    with pytest.raises(Crash):
        stand.deliver(sent)
    left = stand.effects(), steps_of(stand)
    ended = stand.deliver(sent)

    assert left == (["a"], ["a"])
    assert ended.value == ["wrote a", False, "wrote b"]
    assert (made, stand.effects(), steps_of(stand)) == (["a", "b", "b"], ["a", "b"], [])


def test_plain_function_may_use_the_session_behind(stand: OutboxStand) -> None:
    """It runs where SQLAlchemy lets plain code use an async driver; a lambda that returns an awaitable is awaited."""

    def write(session: Session, name: str) -> str:
        session.add(Effect(name=name))
        session.flush()
        return name

    async def later(name: str) -> str:
        await asyncio.sleep(0)
        return name

    @stand.task(name="ingest", once=True)
    async def ingest(session: AsyncSession) -> list[Any]:
        inside = await session.run_sync(lambda sync: step("c", write, "c"))
        return [await step("a", write, "a"), await step("b", lambda: later("later")), inside]

    assert stand.deliver(send(stand, ingest)).value == ["a", "later", "c"]
    assert stand.effects() == ["c", "a"]


def test_transient_retries_run_the_step_again_and_not_those_before(stand: OutboxStand) -> None:
    """A committed step is no commit of the body's own, which would forbid another run."""
    made: list[str] = []

    async def note(session: AsyncSession, name: str) -> None:
        made.append(name)
        session.add(Effect(name=name))
        await session.flush()
        if made.count("b") in (1, 2):
            raise busy()

    @stand.task(name="ingest", once=True, transient_retries=2)
    async def ingest() -> None:
        await step("a", note, "a")
        await step("b", note, "b")

    ended = stand.deliver(send(stand, ingest))

    assert ended.state == "SUCCESS"
    assert (made, stand.effects()) == (["a", "b", "b", "b"], ["a", "b"])


def test_sends_in_a_step_go_with_its_commit(stand: OutboxStand) -> None:
    """And not again with the run that finds the step recorded."""
    crashes: list[BaseException] = [Crash()]

    async def notify(session: AsyncSession) -> None:
        stand.effect.delay_on_commit("one")
        enqueue(session, stand.effect.s("two"))

    @stand.task(name="ingest", once=True)
    async def ingest() -> None:
        await step("a", notify)
        if crashes:
            raise crashes.pop()

    sent = send(stand, ingest)
    with pytest.raises(Crash):
        stand.deliver(sent)
    first = [message.args for message in stand.sent()]
    stand.deliver(sent)

    assert first == [["one"], ["two"]]
    assert stand.sent() == []


def test_steps_side_by_side_run_one_after_the_other(stand: OutboxStand) -> None:
    """They share one session, whose commit would take half of another one's work with it; one inside of another is refused."""
    order: list[str] = []

    async def write(session: AsyncSession, name: str) -> str:
        order.append(f"{name} begins")
        session.add(Effect(name=name))
        await session.flush()
        await asyncio.sleep(0)
        order.append(f"{name} ends")
        return name

    async def outer() -> None:
        await step("inner", write, "inner")

    @stand.task(name="ingest", once=True)
    async def ingest() -> list[str]:
        done = await asyncio.gather(step("a", write, "a"), step("b", write, "b"))
        with pytest.raises(StepError, match="'outer' runs"):
            await step("outer", outer)
        return done

    ended = stand.deliver(send(stand, ingest))

    assert ended.value == ["a", "b"]
    assert order == ["a begins", "a ends", "b begins", "b ends"]
    assert stand.effects() == ["a", "b"]


def test_soft_limit_in_a_step_leaves_those_before(stand: OutboxStand, soft_limit: Callable[[], None]) -> None:
    """The task is dead by its limit, which its error says, and goes on after the committed step when it is revived."""
    limits = [soft_limit]
    made: list[str] = []

    async def note(session: AsyncSession, name: str) -> str:
        made.append(name)
        session.add(Effect(name=name))
        await session.flush()
        if name == "b" and limits:
            asyncio.get_running_loop().call_soon(limits.pop())
            await asyncio.sleep(60)
        return name

    @stand.task(name="ingest", once=True)
    async def ingest() -> str:
        await step("a", note, "a")
        return await step("b", note, "b")

    ended = stand.deliver(send(stand, ingest))
    left = stand.effects()
    [dead] = dead_tasks.dead(stand.alchemy.engine)
    dead_tasks.revive(stand.alchemy.engine)
    stand.relay_all()

    assert type(ended.value).__name__ == "SoftTimeLimitExceeded"
    assert left == ["a"]
    assert (dead["last_step"], dead["error"]) == (
        "a",
        "SoftTimeLimitExceeded in step 'b': SoftTimeLimitExceeded()",
    )
    assert stand.deliver(stand.sent()[0]).value == "b"
    assert (made, stand.effects()) == (["a", "b", "b"], ["a", "b"])


def test_object_with_an_async_call_is_a_coroutine_function(stand: OutboxStand) -> None:
    """It is called in the loop, is awaited, and is given the AsyncSession that it asks for; so is a partial of it."""

    class Write:
        async def __call__(self, session: AsyncSession, name: str) -> str:
            session.add(Effect(name=name))
            await session.flush()
            return name

    @stand.task(name="ingest", once=True)
    async def ingest() -> list[str]:
        return [await step("a", Write(), "a"), await step("b", functools.partial(Write(), name="b"))]

    ended = stand.deliver(send(stand, ingest))

    assert ended.value == ["a", "b"]
    assert stand.effects() == ["a", "b"]
