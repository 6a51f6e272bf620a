"""The transaction policy holds for async tasks, and the event loop waits for no broker and no synchronous driver."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.signals import before_task_publish
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, SessionParameterError, SessionTask
from tests.unit.shop import Book, Shop

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy")

LOOP = "celery-alchemy-loop"


def retry(self: SessionTask) -> None:
    raise self.retry(countdown=60)


def ignore(self: SessionTask) -> None:
    raise Ignore


def reject(self: SessionTask) -> None:
    raise Reject("no", requeue=False)


ENDS: dict[str, Callable[[SessionTask], None]] = {
    "success": lambda self: None,
    "retry": retry,
    "ignore": ignore,
    "reject": reject,
}


@pytest.fixture
def published() -> Iterator[list[tuple[str, str]]]:
    """For each message that goes to the broker: its task, and the thread that sends it."""
    messages: list[tuple[str, str]] = []

    def note(sender: str, **kwargs: Any) -> None:
        messages.append((sender, threading.current_thread().name))

    before_task_publish.connect(note)
    yield messages
    before_task_publish.disconnect(note)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("outcome", ENDS)
def test_outcome_commits_if_it_is_listed(shop: Shop, outcome: str, listed: bool) -> None:
    """The policy decides for an async body as it does for a plain one."""

    @shop.task(bind=True, commit_on=(outcome,) if listed else ())
    async def work(self: SessionTask, session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        ENDS[outcome](self)

    shop.trace(work)

    assert shop.titles() == (["Emma"] if listed else [])


def test_retry_is_sent_after_the_transaction_and_outside_of_the_loop(shop: Shop, published: list[tuple[str, str]]) -> None:
    """A broker that does not answer must not stop the other tasks of the loop."""

    @shop.task(name="work", bind=True)
    async def work(self: SessionTask, session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        try:
            raise self.retry(countdown=60)
        finally:
            assert published == []

    assert shop.trace(work).state == "RETRY"
    assert [name for name, _ in published] == ["work"]
    assert LOOP not in [thread for _, thread in published]
    assert shop.titles() == []


def test_replacement_is_sent_after_the_commit_and_outside_of_the_loop(shop: Shop, published: list[tuple[str, str]]) -> None:
    """What replaces the task finds its rows."""

    @shop.task(name="other")
    def other() -> None: ...

    @shop.task(name="work", bind=True)
    async def work(self: SessionTask, session: AsyncSession) -> Any:
        session.add(Book(title="Emma"))
        await session.flush()
        try:
            return self.replace(other.si())
        finally:
            assert published == []

    assert shop.trace(work).state == "IGNORED"
    assert [name for name, _ in published] == ["other"]
    assert LOOP not in [thread for _, thread in published]
    assert shop.titles() == ["Emma"]


def test_autoretry_sees_the_error_of_an_async_body(shop: Shop, published: list[tuple[str, str]]) -> None:
    """Rolled back first, retried then, and not recorded as a failure."""
    recorded: list[BaseException] = []

    def record(session: Session, exc: BaseException) -> None:
        recorded.append(exc)

    @shop.task(name="work", autoretry_for=(LookupError,), max_retries=1, record_failure=record)
    async def work(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        raise LookupError

    assert shop.trace(work).state == "RETRY"
    assert recorded == []
    assert shop.trace(work, request={"retries": 1}).state == "FAILURE"
    assert [type(exc) for exc in recorded] == [LookupError]
    assert [name for name, _ in published] == ["work"]
    assert shop.titles() == []


def test_eager_retry_runs_again(shop: Shop) -> None:
    """Celery runs an eager retry inside of the body that asks for it, in the thread of the loop."""

    @shop.task(bind=True)
    async def work(self: SessionTask, session: AsyncSession) -> int:
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        session.add(Book(title="Emma"))
        return int(self.request.retries)

    work.apply().get(disable_sync_subtasks=False, propagate=False)

    assert shop.titles() == ["Emma"]


@pytest.mark.parametrize("way", ["worker", "direct call"])
def test_failure_is_recorded_outside_of_the_loop(shop: Shop, way: str) -> None:
    """`record_failure` has a synchronous session, with the task's own arguments; it is committed."""
    threads: list[str] = []

    def record(session: Session, exc: BaseException, title: str) -> None:
        threads.append(threading.current_thread().name)
        session.add(Book(title=f"{title}: {exc}"))

    @shop.task(record_failure=record)
    async def work(session: AsyncSession, title: str) -> None:
        session.add(Book(title=title))
        await session.flush()
        raise LookupError("no such page")

    if way == "worker":
        shop.trace(work, "Emma")
    else:
        with pytest.raises(LookupError):
            work("Emma")

    assert shop.titles() == ["Emma: no such page"]
    assert len(threads) == 1
    assert threads != [LOOP]


@pytest.mark.parametrize("way", ["worker", "direct call", "awaited", "last retry"])
def test_record_failure_may_be_a_coroutine_function(shop: Shop, way: str) -> None:
    """It has an AsyncSession of its own, in the loop of the task; it is committed."""
    loops: list[Any] = []
    options = {"autoretry_for": (LookupError,), "max_retries": 1} if way == "last retry" else {}

    async def record(session: AsyncSession, exc: BaseException, title: str) -> None:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        session.add(Book(title=f"{title}: {exc}"))
        await session.flush()

    @shop.task(record_failure=record, **options)
    async def work(session: AsyncSession, title: str) -> None:
        loops.append(asyncio.get_running_loop())
        session.add(Book(title=title))
        await session.flush()
        raise LookupError("no such page")

    async def awaiting() -> None:
        await work("Emma")

    if way in ("worker", "last retry"):
        shop.trace(work, "Emma", request={"retries": int(way == "last retry")})
    else:
        with pytest.raises(LookupError):
            asyncio.run(awaiting()) if way == "awaited" else work("Emma")

    assert shop.titles() == ["Emma: no such page"]
    assert len(loops) == 2
    assert len(set(map(id, loops))) == 1


def test_coroutine_record_failure_without_annotations_gets_the_session_first(shop: Shop) -> None:
    """By the contract's order, as a plain one; a method of the class has the task."""

    class Importer(SessionTask):
        abstract = True

        async def record_failure(self, session, exc, title):  # type: ignore[no-untyped-def]
            await session.flush()
            session.add(Book(title=f"{self.name} {title}: {exc}"))

    @shop.task(base=Importer, name="work")
    async def work(title: str) -> None:
        raise LookupError("no such page")

    shop.trace(work, "Emma")

    assert shop.titles() == ["work Emma: no such page"]


def test_error_and_time_limit_of_a_coroutine_record_failure_mask_nothing(
    shop: Shop, soft_limit: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """They are logged; the task's own error stands, and half a reason is rolled back."""

    async def record(session: AsyncSession, exc: BaseException, limit: bool) -> None:
        session.add(Book(title="half a reason"))
        await session.flush()
        if limit:
            asyncio.get_running_loop().call_soon(soft_limit)
            await asyncio.sleep(60)
        raise ZeroDivisionError

    @shop.task(name="work", record_failure=record)
    async def work(limit: bool) -> None:
        raise LookupError("no such page")

    for limit in (False, True):
        with pytest.raises(LookupError):
            work(limit)

    assert caplog.text.count("record_failure of task work failed; the task's own error stands") == 2
    assert "ZeroDivisionError" in caplog.text
    assert "SoftTimeLimitExceeded" in caplog.text
    assert shop.titles() == []
    assert shop.checked_out() == 0


@pytest.mark.databases("sqlite+aiosqlite")
def test_record_failure_of_another_kind_than_its_session_or_task_is_refused(shop: Shop) -> None:
    """A plain task has no loop in which it could be awaited; a Session would block that of an async one."""

    async def record(session: AsyncSession, exc: BaseException) -> None: ...

    async def blocking(session: Session, exc: BaseException) -> None: ...

    @shop.task(name="work", record_failure=record)
    def work(session: Session) -> None: ...

    @shop.task(name="blocks", record_failure=blocking)
    async def blocks(session: AsyncSession) -> None: ...

    with pytest.raises(ConfigurationError, match=r"record_failure of task 'work' is an `async def`, and.*plain `def` with a"):
        work.apply()
    with pytest.raises(SessionParameterError, match="record_failure of blocks.*Annotate it with AsyncSession"):
        blocks.apply()


def test_refused_commit_fails_the_task(shop: Shop) -> None:
    """The body returned, the database did not agree: the task has failed with the database's exception."""

    @shop.task()
    async def work(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        session.add(Book(title="Emma"))

    traced = shop.trace(work)

    assert (traced.state, type(traced.value).__name__) == ("FAILURE", "IntegrityError")
    assert shop.titles() == []


# --- the soft time limit ------------------------------------------------------------------------------------


def test_soft_limit_cancels_the_body(shop: Shop, soft_limit: Callable[[], None]) -> None:
    """The body sees a CancelledError, the task fails with the limit, and the connection is not used again."""
    seen: list[str] = []
    connections: list[Any] = []
    slow = {"sqlite": "SELECT 1", "postgresql": "SELECT pg_sleep(60)", "mariadb": "SELECT sleep(60)"}
    statement = slow[shop.database.name]

    @shop.task()
    async def wait(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        connections.append((await (await session.connection()).get_raw_connection()).driver_connection)
        asyncio.get_running_loop().call_later(0.05, soft_limit)
        try:
            await session.execute(text(statement))
            await asyncio.sleep(60)
        except asyncio.CancelledError as exc:
            seen.append(type(exc).__name__)
            raise

    @shop.task()
    async def look(session: AsyncSession) -> None:
        connections.append((await (await session.connection()).get_raw_connection()).driver_connection)

    traced = shop.trace(wait)
    look.apply().get()

    assert (traced.state, type(traced.value)) == ("FAILURE", SoftTimeLimitExceeded)
    assert traced.runtime_seconds < 20
    assert seen == ["CancelledError"]
    assert shop.titles() == []
    assert connections[0] is not connections[1]


@pytest.mark.databases("postgresql+psycopg")
def test_body_may_end_in_order_at_the_soft_limit(shop: Shop, soft_limit: Callable[[], None]) -> None:
    """One that catches the cancellation and returns has succeeded, as one that catches SoftTimeLimitExceeded has."""

    @shop.task()
    async def wait(session: AsyncSession) -> str:
        session.add(Book(title="Emma"))
        await session.flush()
        asyncio.get_running_loop().call_soon(soft_limit)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "as far as it got"
        return "not reached"

    traced = shop.trace(wait)

    assert (traced.state, traced.value) == ("SUCCESS", "as far as it got")
    assert shop.titles() == ["Emma"]


@pytest.mark.databases("postgresql+psycopg")
def test_soft_limit_is_recorded_as_the_failure(shop: Shop, soft_limit: Callable[[], None]) -> None:
    """Not as a cancellation, which would tell nobody why."""

    def record(session: Session, exc: BaseException) -> None:
        session.add(Book(title=type(exc).__name__))

    @shop.task(record_failure=record)
    async def wait(session: AsyncSession) -> None:
        asyncio.get_running_loop().call_soon(soft_limit)
        await asyncio.sleep(60)

    shop.trace(wait)

    assert shop.titles() == ["SoftTimeLimitExceeded"]


@pytest.mark.databases("postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy", "mariadb+aiomysql")
def test_time_limit_ends_the_statements_of_an_async_task(shop: Shop) -> None:
    """A killed worker leaves no query running: the server is told what is left of the limit."""
    query = "SELECT @@max_statement_time * 1000" if shop.database.name == "mariadb" else "SHOW statement_timeout"

    @shop.task(time_limit=100)
    async def look(session: AsyncSession) -> str:
        return str((await session.execute(text(query))).scalar_one())

    @shop.task()
    async def look_without_a_limit(session: AsyncSession) -> str:
        return str((await session.execute(text(query))).scalar_one())

    shown = shop.trace(look, request={"called_directly": False}).value
    afterwards = shop.trace(look_without_a_limit, request={"called_directly": False}).value

    assert 90_000 < float(shown.removesuffix("ms")) <= 100_000
    assert float(afterwards) == 0
