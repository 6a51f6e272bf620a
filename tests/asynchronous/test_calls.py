"""However an async task is called, its body runs in one session and one transaction."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, cast

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, NoSessionError, SessionTask, UncommittedChangesError, released
from celery_alchemy.requests.event_loop import process_loop
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop
from tests.waiting import eventually

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+aiomysql")


def adding(shop: Shop, **options: Any) -> Any:
    """Return a task that adds a book and returns its title."""

    @shop.task(**options)
    async def add(session: AsyncSession, title: str) -> str:
        session.add(Book(title=title))
        await session.flush()
        return title

    return add


def always_eager(shop: Shop, task: Any, *args: Any) -> Any:
    """Send a task with `task_always_eager` on."""
    shop.app.conf.task_always_eager = True
    return task.delay(*args).get()


WAYS: dict[str, Callable[..., Any]] = {
    "worker": lambda shop, task, *args: shop.trace(task, *args).value,
    "apply": lambda shop, task, *args: task.apply(args).get(),
    "always eager": always_eager,
    "direct call": lambda shop, task, *args: task(*args),
    "awaited": lambda shop, task, *args: asyncio.run(_awaited(task, *args)),
}


async def _awaited(task: Any, *args: Any) -> Any:
    return await task(*args)


@pytest.mark.parametrize("way", WAYS)
def test_body_is_committed_when_it_returns(shop: Shop, way: str) -> None:
    """In a worker, eagerly, called from synchronous code, and awaited."""
    result = WAYS[way](shop, adding(shop), "Emma")

    assert result == "Emma"
    assert shop.titles() == ["Emma"]


@pytest.mark.parametrize("way", ["apply", "direct call", "awaited"])
def test_body_that_raises_is_rolled_back(shop: Shop, way: str) -> None:
    """The caller gets the body's own exception, the database nothing."""

    @shop.task()
    async def add(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        raise LookupError("no such page")

    with pytest.raises(LookupError, match="no such page"):
        WAYS[way](shop, add)

    assert shop.titles() == []


def test_all_tasks_of_a_process_run_in_one_loop_on_one_engine(shop: Shop) -> None:
    """A connection belongs to the loop that opened it: a loop for each task would strand one each time."""

    @shop.task()
    async def where(session: AsyncSession) -> tuple[int, int, str]:
        connection = await session.connection()
        return id(asyncio.get_running_loop()), id(connection.engine.sync_engine.pool), threading.current_thread().name

    places = {where.apply().get() for _ in range(10)} | {where() for _ in range(10)}

    assert len(places) == 1
    assert places.pop()[2] == "celery-alchemy-loop"


def test_task_without_use_of_its_session_opens_no_connection(shop: Shop) -> None:
    """The parameter alone costs nothing at the server."""

    @shop.task()
    async def look(session: AsyncSession) -> bool:
        return session.in_transaction()

    assert look.apply().get() is False
    assert shop.database.connections() == []


def test_awaited_task_runs_in_the_loop_of_its_caller(shop: Shop) -> None:
    """Locks, clients and context variables of the caller's loop work in it, and cancelling reaches it."""

    @shop.task()
    async def where(session: AsyncSession) -> Any:
        await session.execute(select(Book))
        return asyncio.get_running_loop()

    async def main() -> bool:
        return await where() is asyncio.get_running_loop()

    assert asyncio.run(main())
    assert where.apply().get() is process_loop.get()


def test_loop_that_ends_takes_its_connections_along(shop: Shop) -> None:
    """A script that calls `asyncio.run()` a hundred times does not leave a hundred connections open."""
    add = adding(shop)

    async def main(title: str) -> None:
        await add(title)
        async with shop.alchemy.async_session() as session:
            await session.execute(select(Book))

    for number in range(4):
        asyncio.run(main(f"book {number}"))

    assert len(shop.titles()) == 4
    eventually(lambda: shop.database.connections() == [], what="the connections are closed")


def test_task_awaited_in_a_task_has_its_own_transaction(shop: Shop) -> None:
    """The outer one's rollback does not touch it, and the outer one's session is at hand again after it."""
    add = adding(shop)

    @shop.task(bind=True)
    async def outer(self: SessionTask, session: AsyncSession) -> None:
        assert await add("Emma") == "Emma"
        own: Any = self.session
        assert own is session
        session.add(Book(title="Persuasion"))
        await session.flush()
        raise LookupError

    assert shop.trace(outer).state == "FAILURE"
    assert shop.titles() == ["Emma"]


@pytest.mark.parametrize("depth", [1, 2])
def test_task_run_eagerly_in_a_task_does_not_wait_for_itself(shop: Shop, depth: int) -> None:
    """`apply()` blocks the thread of the loop; so another loop runs the inner task."""

    @shop.task(bind=True)
    async def nest(self: SessionTask, session: AsyncSession, depth: int) -> int:
        if depth:
            self.apply((depth - 1,)).get(disable_sync_subtasks=False)
        session.add(Book(title=f"book {depth}"))
        return depth

    assert nest.apply((depth,)).get() == depth
    assert shop.titles() == [f"book {number}" for number in range(depth + 1)]


def test_awaited_task_uses_the_session_that_it_is_given(shop: Shop) -> None:
    """It is neither committed nor closed, and `self.session` is the same."""

    @shop.task(bind=True)
    async def add(self: SessionTask, session: AsyncSession, title: str) -> bool:
        session.add(Book(title=title))
        await session.flush()
        own: Any = self.session
        return own is session

    async def main() -> tuple[bool, bool]:
        async with shop.alchemy.async_session() as session:
            same = await add(session=session, title="Emma")
            found = await session.scalar(select(Book.title))
            return same, found == "Emma"

    assert asyncio.run(main()) == (True, True)
    assert shop.titles() == []


def test_none_as_session_means_the_task_s_own(shop: Shop) -> None:
    """A wrapper that passes `session=None` on gets what it would have got without it."""
    add = adding(shop)

    add(session=None, title="Emma")

    assert shop.titles() == ["Emma"]


def test_requests_at_once_do_not_mix(shop: Shop) -> None:
    """Each body keeps its own `self.request`, `self.session` and transaction, while all stand in the middle of theirs."""
    count = 8
    waiting: list[asyncio.Future[None]] = []

    async def meet() -> None:
        mine = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        if len(waiting) == count:
            for each in waiting:
                each.set_result(None)
        await asyncio.wait_for(mine, 20)

    @shop.task(bind=True, base=SessionTask)
    async def add(self: SessionTask, title: str) -> tuple[str, str]:
        session: Any = self.session
        before = self.request.id
        await meet()
        session.add(Book(title=f"{title} of {self.request.id}"))
        assert self.session is session
        assert await asyncio.create_task(_id_of(self)) == before
        assert await asyncio.to_thread(lambda: self.request.id) == before
        args: Any = self.request.args
        return str(before), str(args[0])

    async def _id_of(task: SessionTask) -> Any:
        return task.request.id

    # Celery makes a task at its first use, and not for two threads at once.
    assert add.name in shop.app.tasks
    with ThreadPoolExecutor(count) as threads:
        results = list(threads.map(lambda number: shop.trace(add, f"book {number}"), range(count)))

    assert {result.state for result in results} == {"SUCCESS"}
    assert [result.value[1] for result in results] == [f"book {number}" for number in range(count)]
    assert sorted(shop.titles()) == sorted(f"{result.value[1]} of {result.value[0]}" for result in results)


def test_session_ends_with_the_request(shop: Shop) -> None:
    """`self.session` after it raises, instead of opening one that nobody would close."""

    @shop.task(bind=True)
    async def touch(self: SessionTask) -> None:
        await self.session.execute(select(Book))  # type: ignore[misc]

    touch.apply().get()

    with pytest.raises(NoSessionError):
        touch.session  # noqa: B018


def test_async_with_released_gives_the_connection_back(shop: Shop) -> None:
    """Inside of the block no transaction is open; after it the session goes on, and objects are still loaded."""

    @shop.task()
    async def rename(session: AsyncSession) -> tuple[bool, str]:
        session.add(Book(title="Emma"))
        async with released(session, commit=True):
            is_open = session.in_transaction()
        book = (await session.scalars(select(Book))).one()
        async with released(session):
            title = book.title
        book.title = "Emma, revised"
        return is_open, title

    assert rename.apply().get() == (False, "Emma")
    assert shop.titles() == ["Emma, revised"]


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.parametrize("begun", [False, True])
def test_plain_block_is_refused_for_an_async_session_and_the_other_way_round(shop: Shop, begun: bool) -> None:
    """Used or not: the error shows the block to write."""

    async def work() -> None:
        async with shop.alchemy.async_session() as session:
            if begun:
                await session.execute(select(1))
            for one in (session, async_scoped_session(lambda: session, lambda: None)):
                with pytest.raises(ConfigurationError, match="`async with released"), released(one):
                    raise LookupError

    async def other_way_round() -> None:
        with shop.alchemy.session() as session, pytest.raises(ConfigurationError, match="`with released"):
            async with released(session):
                raise LookupError

    asyncio.run(work())
    asyncio.run(other_way_round())


def test_async_with_released_refuses_uncommitted_work(shop: Shop) -> None:
    """It would be lost, or half done, behind the body's back."""

    @shop.task()
    async def add(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        async with released(session):
            raise AssertionError("not reached")

    with pytest.raises(UncommittedChangesError):
        add.apply().get()

    assert shop.titles() == []


@pytest.mark.databases("sqlite+aiosqlite")
def test_cancelled_error_of_the_body_s_own_fails_the_task(shop: Shop) -> None:
    """Celery takes a BaseException for the end of the worker; awaiting something that was cancelled is not that."""

    @shop.task()
    async def await_cancelled(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        part = asyncio.create_task(asyncio.sleep(60))
        part.cancel()
        await part

    traced = shop.trace(await_cancelled)

    assert (traced.state, type(traced.value)) == ("FAILURE", CancelledError)
    assert shop.titles() == []


@pytest.mark.databases("sqlite+aiosqlite")
def test_system_exit_ends_the_request_and_not_the_loop(shop: Shop) -> None:
    """In an asyncio task of its own a SystemExit would end the loop, and every later task would wait for ever."""
    add = adding(shop)

    @shop.task()
    async def leave(session: AsyncSession) -> None:
        session.add(Book(title="Emma"))
        await session.flush()
        raise SystemExit(3)

    @shop.task()
    async def leave_behind() -> None:
        async def leave() -> None:
            raise SystemExit(3)

        await asyncio.wait([asyncio.ensure_future(leave())])

    with pytest.raises(SystemExit):
        shop.trace(leave)
    loop = process_loop.get()

    assert leave_behind.apply().get() is None
    assert add.apply(("Persuasion",)).get() == "Persuasion"
    assert process_loop.get() is loop
    assert shop.titles() == ["Persuasion"]


def test_connections_are_back_after_every_ending(make_shop: MakeShop) -> None:
    """More failures than the pool has connections, and the next task still gets one."""
    shop = make_shop(engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 5})
    add = adding(shop)

    @shop.task()
    async def fail(session: AsyncSession) -> None:
        await session.execute(select(Book))
        raise LookupError

    for _ in range(3):
        assert shop.trace(fail).state == "FAILURE"

    assert add.apply(("Emma",)).get() == "Emma"


def test_async_session_of_the_task_is_its_session_with_its_own_type(shop: Shop) -> None:
    """`self.async_session` is what `self.session` is, for type checkers; outside of a request it raises as that does."""

    @shop.task(bind=True)
    async def adds(self: SessionTask) -> bool:
        self.async_session.add(Book(title="Emma"))
        return isinstance(self.async_session, AsyncSession) and cast("Any", self.async_session) is self.session

    assert shop.trace(adds).value is True
    assert shop.titles() == ["Emma"]
    with pytest.raises(NoSessionError):
        adds.async_session  # noqa: B018 - a property.


def test_plain_task_has_no_async_session(shop: Shop) -> None:
    """The error says what to use."""

    @shop.task(bind=True, name="adds")
    def adds(self: SessionTask) -> None:
        self.async_session.add(Book(title="Emma"))

    traced = shop.trace(adds)

    assert isinstance(traced.value, NoSessionError)
    assert "self.async_session of task 'adds'" in str(traced.value)
    assert "use self.session" in str(traced.value)


def run_async(body: Callable[..., Any]) -> Callable[..., Any]:
    """Run a coroutine function, as projects did before their tasks could be `async def`."""

    @functools.wraps(body)
    def call(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(body(*args, **kwargs))

    return call


def test_decorator_that_runs_the_coroutine_itself_makes_a_plain_task(shop: Shop) -> None:
    """It is called where no loop runs, and has a Session as any plain task."""

    @shop.task(bind=True)
    @run_async
    async def add(self: SessionTask, session: Session, title: str) -> bool:
        await asyncio.sleep(0)
        session.add(Book(title=title))
        return self.session is session

    @shop.task()
    @run_async
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return number * 2

    assert WAYS["worker"](shop, add, "Emma") is True
    assert WAYS["apply"](shop, double, 2) == 4
    assert shop.titles() == ["Emma"]


def test_decorator_that_hands_the_coroutine_on_leaves_the_task_async(shop: Shop) -> None:
    """Whatever it is called, it may also answer by itself, without the coroutine."""

    def counted(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(self: SessionTask, title: str) -> Any:
            return body(self, title) if title else "nothing to do"

        return call

    @shop.task(bind=True)
    @counted
    async def add(self: SessionTask, title: str) -> str:
        self.async_session.add(Book(title=title))
        await self.async_session.flush()
        return title

    def next_run(body: Callable[..., Any]) -> Callable[..., Any]:
        run = functools.partial(body)

        @functools.wraps(body)
        def call(*args: Any) -> Any:
            return run(*args)

        return call

    @shop.task()
    @next_run
    async def asking(session: AsyncSession) -> bool:
        return (await session.scalars(select(Book.title))).all() == ["Emma"]

    @shop.task()
    @next_run
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return number * 2

    assert [WAYS["worker"](shop, add, title) for title in ("Emma", "")] == ["Emma", "nothing to do"]
    assert WAYS["apply"](shop, asking) is True
    assert WAYS["worker"](shop, double, 2) == 4
    assert shop.titles() == ["Emma"]
