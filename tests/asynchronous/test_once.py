"""`once` and sends on commit hold for async tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery.canvas import xmap, xstarmap
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, DeadTaskError, OnceCommitError, SessionTask, enqueue, released
from celery_alchemy.messages import publisher
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.requests import failure
from celery_alchemy.requests.once_records import State
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Crash

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy")

LOOP = "celery-alchemy-loop"


def test_second_delivery_reports_the_first_one_s_result(stand: OutboxStand) -> None:
    """The body runs once; every delivery returns what it returned."""
    runs: list[str] = []

    @stand.task(once=True)
    async def charge(session: AsyncSession, name: str) -> str:
        runs.append(name)
        session.add(Effect(name=name))
        return f"charged {name}"

    charge.delay("Emma")
    [sent] = stand.sent()
    first, second = stand.deliver(sent), stand.deliver(sent)

    assert [(ended.state, ended.value) for ended in (first, second)] == [("SUCCESS", "charged Emma")] * 2
    assert runs == ["Emma"]
    assert stand.effects() == ["Emma"]


def test_two_runs_at_once_commit_once(stand: OutboxStand) -> None:
    """Whoever records the completion second rolls back and reports the first one's result."""
    sent: list[Any] = []
    inner: list[Any] = []

    @stand.task(once=True)
    async def charge(session: AsyncSession, name: str) -> int:
        number = len(inner)
        if not inner:
            inner.append(None)
            # Another worker takes the same message and is done before this one writes.
            inner[0] = await asyncio.to_thread(stand.deliver, sent[0])
        session.add(Effect(name=name))
        return number

    charge.delay("Emma")
    sent.extend(stand.sent())
    outer = stand.deliver(sent[0])

    assert (inner[0].state, inner[0].value) == ("SUCCESS", 1)
    assert (outer.state, outer.value) == ("SUCCESS", 1)
    assert stand.effects() == ["Emma"]


def test_commit_in_a_once_body_is_refused(stand: OutboxStand) -> None:
    """It would part the writes from their record; `released()` of what was only read is fine."""

    @stand.task(once=True)
    async def charge(session: AsyncSession, name: str) -> None:
        async with released(session):
            pass
        session.add(Effect(name=name))
        await session.commit()

    charge.delay("Emma")
    ended = stand.deliver(stand.sent()[0])

    assert (ended.state, type(ended.value)) == ("FAILURE", OnceCommitError)
    assert stand.effects() == []


def test_task_that_fails_for_good_is_dead(stand: OutboxStand) -> None:
    """It is recorded once, outside of the loop, kept with its error, and not run again."""
    threads: list[str] = []

    def record(session: Session, exc: BaseException, name: str) -> None:
        threads.append(threading.current_thread().name)
        session.add(Effect(name=f"{name}: {exc}"))

    @stand.task(once=True, record_failure=record)
    async def charge(session: AsyncSession, name: str) -> None:
        session.add(Effect(name=name))
        await session.flush()
        raise LookupError("no such account")

    charge.delay("Emma")
    [sent] = stand.sent()
    first, second = stand.deliver(sent), stand.deliver(sent)

    assert (first.state, type(first.value)) == ("FAILURE", LookupError)
    assert (second.state, type(second.value)) == ("FAILURE", DeadTaskError)
    assert stand.effects() == ["Emma: no such account"]
    assert len(threads) == 1
    assert threads != [LOOP]


def test_death_and_record_failure_are_one_transaction(stand: OutboxStand) -> None:
    """A process that dies between them leaves neither."""
    crashes = [True]

    def record(session: Session, exc: BaseException, name: str) -> None:
        session.add(Effect(name=f"{name}: {exc}"))
        if crashes and crashes.pop():
            event.listen(session, "before_commit", crash)

    def crash(session: Session) -> None:
        raise Crash

    @stand.task(once=True, record_failure=record)
    async def charge(session: AsyncSession, name: str) -> None:
        raise LookupError("no such account")

    charge.delay("Emma")
    [sent] = stand.sent()
    with pytest.raises(Crash):
        stand.deliver(sent)
    left = stand.effects(), upkeep.dead(stand.alchemy.engine)
    ended = stand.deliver(sent)

    assert left == ([], [])
    assert ended.state == "FAILURE"
    assert stand.effects() == ["Emma: no such account"]
    assert [row["error"] for row in upkeep.dead(stand.alchemy.engine)] == ["LookupError: no such account"]


def test_death_and_coroutine_record_failure_are_one_transaction(stand: OutboxStand) -> None:
    """As with a plain one: a process that dies between them leaves neither; what may pass is tried again in the loop."""
    crashes = [Crash(), OperationalError("INSERT", {}, Exception("lost"), connection_invalidated=True)]
    threads: list[str] = []

    async def record(session: AsyncSession, exc: BaseException, name: str) -> None:
        threads.append(threading.current_thread().name)
        session.add(Effect(name=f"{name}: {exc}"))
        await session.flush()
        if crashes:
            raise crashes.pop(0)

    @stand.task(once=True, record_failure=record)
    async def charge(session: AsyncSession, name: str) -> None:
        raise LookupError("no such account")

    charge.delay("Emma")
    [sent] = stand.sent()
    with pytest.raises(Crash):
        stand.deliver(sent)
    left = stand.effects(), upkeep.dead(stand.alchemy.engine)
    ended = stand.deliver(sent)

    assert left == ([], [])
    assert (ended.state, type(ended.value)) == ("FAILURE", LookupError)
    assert stand.effects() == ["Emma: no such account"]
    assert [row["error"] for row in upkeep.dead(stand.alchemy.engine)] == ["LookupError: no such account"]
    assert threads == [LOOP] * 3


def test_rival_that_has_succeeded_first_leaves_nothing_to_record(stand: OutboxStand) -> None:
    """This delivery reports the other one's result."""
    told: list[str] = []
    runs: list[int] = []

    @stand.task(once=True, record_failure=lambda session, exc, name: told.append(name))
    async def charge(session: AsyncSession, name: str) -> str:
        runs.append(len(runs))
        if runs[-1] == 0:
            await asyncio.to_thread(stand.deliver, sent)
            raise LookupError("no such account")
        session.add(Effect(name=name))
        return f"charged {name}"

    charge.delay("Emma")
    [sent] = stand.sent()
    ended = stand.deliver(sent)

    assert (ended.state, ended.value) == ("SUCCESS", "charged Emma")
    assert (stand.effects(), told) == (["Emma"], [])
    assert upkeep.dead(stand.alchemy.engine) == []


def test_rival_that_was_ignored_is_reported_after_too_many_starts(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is not dead: another delivery has ended it while this one was about to say so."""

    @stand.task(once=True, max_deliveries=1, record_failure=lambda session, exc: None)
    async def charge(session: AsyncSession) -> None:
        raise Crash

    with stand.alchemy.begin():
        charge.delay_on_commit()
    [sent] = stand.sent()
    with pytest.raises(Crash):
        stand.deliver(sent)
    monkeypatch.setattr(failure, "look", lambda session, key: State("completed", "ignored"))
    ended = stand.deliver(sent)

    assert ended.state == "IGNORED"


def test_task_at_its_soft_limit_is_dead(stand: OutboxStand, soft_limit: Callable[[], None]) -> None:
    """The limit is a failure for good, as it is for a plain task; the task does not stay owed for ever."""

    def record(session: Session, exc: BaseException) -> None:
        session.add(Effect(name=type(exc).__name__))

    @stand.task(once=True, record_failure=record)
    async def charge(session: AsyncSession) -> None:
        session.add(Effect(name="Emma"))
        await session.flush()
        asyncio.get_running_loop().call_soon(soft_limit)
        await asyncio.sleep(60)

    charge.delay()
    [sent] = stand.sent()
    first, second = stand.deliver(sent), stand.deliver(sent)

    assert first.state == "FAILURE"
    assert type(first.value).__name__ == "SoftTimeLimitExceeded"
    assert isinstance(second.value, DeadTaskError)
    assert stand.effects() == ["SoftTimeLimitExceeded"]


def test_task_that_kills_its_process_too_often_is_dead(stand: OutboxStand) -> None:
    """Starts are counted before the body, so that one which ends the process is not started for ever."""
    starts: list[int] = []

    @stand.task(once=True, max_deliveries=2)
    async def charge(session: AsyncSession) -> None:
        starts.append(1)
        raise Crash

    with stand.alchemy.begin() as session:
        enqueue(session, charge.s())
    [sent] = stand.sent()
    for _ in range(2):
        with pytest.raises(Crash):
            stand.deliver(sent)

    assert isinstance(stand.deliver(sent).value, DeadTaskError)
    assert len(starts) == 2


def test_retry_keeps_an_async_task_owed(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry has a row, and its message is sent outside of the loop."""
    threads = _threads_that_publish(monkeypatch)

    @stand.task(bind=True, once=True)
    async def charge(self: SessionTask, session: AsyncSession, name: str) -> int:
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        session.add(Effect(name=name))
        return int(self.request.retries)

    with stand.alchemy.begin() as session:
        enqueue(session, charge.s("Emma"))
    assert stand.deliver(stand.sent()[0]).state == "RETRY"
    assert len(stand.outbox()) == 1
    ended = stand.deliver(stand.sent()[0])

    assert (ended.state, ended.value) == ("SUCCESS", 1)
    assert stand.effects() == ["Emma"]
    assert LOOP not in threads


@pytest.mark.parametrize("outbox", [True, False], ids=["outbox", "direct"])
@pytest.mark.parametrize("fails", [True, False], ids=["rolled back", "committed"])
def test_sends_wait_for_the_commit(make_stand: MakeStand, monkeypatch: pytest.MonkeyPatch, fails: bool, outbox: bool) -> None:
    """`delay_on_commit` and `enqueue` in a body: after the commit, never on rollback, never in the loop's thread."""
    stand = make_stand(outbox=outbox)
    threads = _threads_that_publish(monkeypatch)
    early: list[Any] = []

    @stand.task()
    async def work(session: AsyncSession) -> None:
        session.add(Effect(name="written"))
        stand.effect.delay_on_commit("first")
        enqueue(session, stand.effect.s("second"))
        early.extend(await asyncio.to_thread(stand.sent))
        if fails:
            raise LookupError

    work.apply()

    assert early == []
    assert [sent.args for sent in stand.sent()] == ([] if fails else [["first"], ["second"]])
    assert stand.effects() == ([] if fails else ["written"])
    assert LOOP not in threads
    assert stand.outbox() == []


def _threads_that_publish(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each thread that hands a message to the broker."""
    threads: list[str] = []
    send = publisher.send

    def noted(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread().name)
        return send(*args, **kwargs)

    monkeypatch.setattr(publisher, "send", noted)
    return threads


@pytest.mark.parametrize(
    "made", [lambda task: xmap(task.s(), [1, 2], app=task.app), lambda task: xstarmap(task.s(), [(1,), (2,)], app=task.app)]
)
def test_map_that_is_sent_past_the_library_does_nothing(stand: OutboxStand, made: Callable[[Any], Any]) -> None:
    """Its message is refused where it runs, as for a plain task."""

    @stand.task(name="charge", once=True)
    async def charge(session: AsyncSession, number: int) -> None:
        session.add(Effect(name=str(number)))

    made(charge).apply_async()
    [sent] = stand.sent()
    ended = stand.deliver(sent)

    assert (ended.state, type(ended.value)) == ("FAILURE", ConfigurationError)
    assert stand.effects() == []
