"""on_end runs a callable when the outermost transaction has ended, whichever way."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from celery.exceptions import Ignore
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import CallableError, PublishError, SessionTask, on_commit, on_end, released
from celery_alchemy.requests.event_loop import process_loop
from celery_alchemy.testing import joined
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql")

Ran = list[str]


@pytest.fixture
def ran() -> Ran:
    """What has run, in order."""
    return []


@pytest.fixture
def engine(shop: Shop) -> Engine:
    return shop.alchemy.engine


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


ENDS: dict[str, Callable[[Session], object]] = {
    "commit": Session.commit,
    "rollback": Session.rollback,
    "close": Session.close,
    "invalidate": Session.invalidate,
    "block": lambda session: session.__exit__(None, None, None),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("begun", [False, True])
def test_callable_runs_once_when_the_transaction_has_ended(session: Session, shop: Shop, ran: Ran, begun: bool, how: str) -> None:
    """Given before the transaction begins or in it; the connection is back, and the next end is not its own."""
    if begun:
        add_books(session, ["Emma"])
    on_end(session, lambda: ran.append(f"{shop.checked_out()} {shop.titles()}"))
    if not begun:
        add_books(session, ["Emma"])
    before = list(ran)

    ENDS[how](session)
    session.execute(text("SELECT 1"))
    session.commit()
    session.close()

    assert before == []
    assert ran == ["0 ['Emma']" if how == "commit" else "0 []"]


@pytest.mark.parametrize("how", ["close", "invalidate", "block"])
def test_session_that_never_begins_ends_with_its_close(session: Session, ran: Ran, how: str) -> None:
    """There is no transaction that could end; nothing of the session is changed for good."""
    on_end(session, lambda: ran.append("x"))
    ENDS[how](session)
    session.close()

    assert ran == ["x"]
    assert session.close == Session.close.__get__(session)


def test_transaction_may_still_be_begun_by_hand(session: Session, ran: Ran) -> None:
    """It begins none, so `with session.begin():` works after it."""
    on_end(session, lambda: ran.append("x"))
    with session.begin():
        add_books(session, ["Emma"])

    assert ran == ["x"]


def test_runs_after_what_waits_for_the_commit(session: Session, ran: Ran) -> None:
    """In order, whatever was given first."""
    on_end(session, lambda: ran.append("end 1"))
    on_commit(session, lambda: ran.append("commit"))
    on_end(session, lambda: ran.append("end 2"))
    session.commit()

    assert ran == ["commit", "end 1", "end 2"]


def test_savepoint_is_no_end(session: Session, ran: Ran) -> None:
    """Neither its release nor its rollback; and one that is rolled back does not take the callable along."""
    with session.begin_nested():
        on_end(session, lambda: ran.append("released"))
    savepoint = session.begin_nested()
    on_end(session, lambda: ran.append("rolled back"))
    savepoint.rollback()
    before = list(ran)
    session.commit()

    assert before == []
    assert ran == ["released", "rolled back"]


def test_failing_commit_is_an_end_when_it_is_rolled_back(session: Session, ran: Ran) -> None:
    """The place of a `finally: lock.release()` around a commit that may fail."""
    on_end(session, lambda: ran.append("x"))
    session.add_all([Book(title="Emma"), Book(title="Emma")])
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()

    assert ran == ["x"]


def test_lost_connection_is_an_end(shop: Shop, session: Session, ran: Ran) -> None:
    """The caller sees the database's own error."""
    if shop.database.name == "sqlite":
        pytest.skip("a file is not lost")
    session.execute(text("SELECT 1"))
    on_end(session, lambda: ran.append("x"))
    shop.database.disconnect_others()
    with pytest.raises(DBAPIError), session:
        session.execute(text("SELECT 1"))

    assert ran == ["x"]


def test_callable_may_use_the_session_and_register_another(session: Session, ran: Ran) -> None:
    """The other one waits for the next end."""

    def again() -> None:
        ran.append("first")
        on_end(session, lambda: ran.append("second"))

    on_end(session, again)
    session.execute(text("SELECT 1"))
    session.commit()
    after_first = list(ran)
    session.execute(text("SELECT 1"))
    session.commit()

    assert after_first == ["first"]
    assert ran == ["first", "second"]


@pytest.mark.parametrize("how", ["rollback", "close", "error", "task"])
def test_what_it_sends_and_writes_is_committed_after_a_rollback_too(shop: Shop, engine: Engine, ran: Ran, how: str) -> None:
    """Its transaction is a new one, which nobody else would commit; the one that has ended stays undone."""

    def leave(session: Session) -> None:
        session.add(Book(title="undone"))
        session.flush()
        on_end(session, lambda: follow(session))

    def follow(session: Session) -> None:
        session.add(Book(title="done"))
        on_commit(session, lambda: ran.append("sent"))

    def work(session: Session) -> None:
        leave(session)
        raise LookupError

    if how == "task":
        shop.trace(shop.task(name="work")(work))
    elif how == "error":
        with pytest.raises(LookupError), Session(engine) as session:
            work(session)
    else:
        with Session(engine) as session:
            leave(session)
            getattr(session, how)()

    assert ran == ["sent"]
    assert shop.titles() == ["done"]


def test_what_it_cannot_write_after_a_rollback_is_logged(session: Session, ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    """It must not hide why there was a rollback."""

    def follow() -> None:
        session.add_all([Book(id=1, title="one"), Book(id=1, title="the same")])
        on_commit(session, lambda: ran.append("sent"))

    on_end(session, follow)
    with pytest.raises(LookupError), session:
        session.execute(text("SELECT 1"))
        raise LookupError

    assert ran == []
    assert "what its callables have sent and written is not committed" in caplog.text


def broken() -> None:
    """A callable that fails."""
    raise ConnectionError("lock server down")


def test_error_after_a_commit_is_raised_as_that_of_on_commit(session: Session, ran: Ran) -> None:
    """With the words that the work is committed; the others run."""
    on_commit(session, broken, what="the mail")
    on_end(session, broken, what="the lock")
    on_end(session, lambda: ran.append("x"))
    with pytest.raises(PublishError, match="is committed.*the mail: Conn.*the lock: ConnectionError"):
        session.commit()

    assert ran == ["x"]


def test_error_after_a_rollback_is_logged(session: Session, ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    """It must not hide why there was a rollback."""
    on_end(session, broken, what="the lock")
    on_end(session, lambda: ran.append("x"))
    with pytest.raises(LookupError), session:
        session.execute(text("SELECT 1"))
        raise LookupError

    assert ran == ["x"]
    assert "the lock failed after it" in caplog.text


@pytest.mark.parametrize("explicit", [False, True])
def test_error_in_a_task_does_not_fail_committed_work(shop: Shop, caplog: pytest.LogCaptureFixture, explicit: bool) -> None:
    """Also if the body commits by itself: a failure would make autoretry run committed work again."""
    runs: list[int] = []

    @shop.task(name="work", autoretry_for=(Exception,))
    def work(session: Session) -> None:
        runs.append(1)
        add_books(session, ["Emma"])
        on_commit(session, broken, what="the mail")
        on_end(session, broken, what="the lock")
        if explicit:
            session.commit()

    traced = shop.trace(work)

    assert (traced.state, runs, shop.titles()) == ("SUCCESS", [1], ["Emma"])
    assert "Task work[" in caplog.text
    assert "the lock failed after it" in caplog.text


OUTCOMES: dict[str, Callable[[Any], object]] = {
    "success": lambda task: None,
    "error": lambda task: 1 / 0,
    "ignore": lambda task: (_ for _ in ()).throw(Ignore),
    "retry": lambda task: task.retry(countdown=60),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("touched", [False, True])
def test_task_ends_its_transaction_on_every_outcome(shop: Shop, ran: Ran, outcome: str, touched: bool) -> None:
    """Also of a session that nothing else has used."""

    @shop.task(bind=True)
    def work(self: SessionTask, session: Session) -> None:
        on_end(session, lambda: ran.append(f"{shop.checked_out()}"))
        if touched:
            session.execute(text("SELECT 1"))
        assert ran == []
        OUTCOMES[outcome](self)

    shop.trace(work)

    assert ran == ["0"]


def test_lock_is_given_back_after_the_rows_are_there(shop: Shop) -> None:
    """What a hand-written `finally: lock.release()` in a body gets wrong: it lets another in before the commit."""
    lock = threading.Lock()
    seen: list[list[str]] = []

    @shop.task()
    def work(session: Session) -> None:
        lock.acquire()
        on_end(session, lock.release)
        add_books(session, ["Emma"])
        threading.Thread(target=wait).start()

    def wait() -> None:
        with lock:
            seen.append(shop.titles())
        done.set()

    done = threading.Event()
    shop.trace(work)

    assert done.wait(10)
    assert seen == [["Emma"]]


def test_released_is_an_end(shop: Shop, ran: Ran) -> None:
    """It ends the transaction, so that a lock does not outlive it."""

    @shop.task()
    def work(session: Session) -> None:
        session.scalars(select(Book)).all()
        on_end(session, lambda: ran.append("x"))
        with released(session):
            ran.append("slow work")

    shop.trace(work)

    assert ran == ["x", "slow work"]


def test_registries_are_accepted(engine: Engine, ran: Ran) -> None:
    """What Flask users have; remove() closes."""
    registry = scoped_session(sessionmaker(engine))
    on_end(registry, lambda: ran.append("removed"))
    registry.remove()
    on_end(registry, lambda: ran.append("committed"))
    registry.execute(text("SELECT 1"))
    registry.commit()
    registry.remove()

    assert ran == ["removed", "committed"]


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
def test_async_sessions_and_their_registries_end_too(shop: Shop, ran: Ran) -> None:
    """By commit, by the end of the block, and by remove()."""

    async def work() -> None:
        engine = create_async_engine(shop.database.url)
        maker = async_sessionmaker(engine)
        async with maker() as session:
            on_end(session, lambda: ran.append("committed"))
            await session.execute(text("SELECT 1"))
            await session.commit()
            on_end(session, lambda: ran.append("closed"))
        registry = async_scoped_session(maker, scopefunc=asyncio.current_task)
        on_end(registry, lambda: ran.append("removed"))
        await registry.remove()
        await engine.dispose()

    asyncio.run(work())

    assert ran == ["committed", "closed", "removed"]


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
@pytest.mark.parametrize("fails", [False, True])
def test_async_task_ends_its_transaction(shop: Shop, ran: Ran, fails: bool) -> None:
    """As a plain one, touched or not."""

    @shop.task()
    async def work(session: AsyncSession) -> None:
        on_end(session, lambda: ran.append("x"))
        if fails:
            raise LookupError

    shop.trace(work)

    assert ran == ["x"]


def test_caller_s_connection_is_waited_for(engine: Engine, ran: Ran) -> None:
    """A session in somebody else's transaction has not ended before that one has, rolled back or not."""
    for end in ("commit", "rollback"):
        with engine.connect() as connection:
            outer = connection.begin()
            for name in ("commit", "rollback"):
                with Session(connection, join_transaction_mode="create_savepoint") as session:
                    session.execute(text("SELECT 1"))
                    on_end(session, lambda name=name, end=end: ran.append(f"{name} in {end}"))
                    getattr(session, name)()
            before = len(ran)
            getattr(outer, end)()
        assert len(ran) == before + 2

    assert ran == ["commit in commit", "rollback in commit", "commit in rollback", "rollback in rollback"]


def test_kit_s_joined_session_ends_by_itself(shop: Shop, ran: Ran) -> None:
    """The test's transaction stands for the outermost one of the code under test."""

    @shop.task()
    def work(session: Session, fails: bool) -> None:
        on_end(session, lambda: ran.append(f"fails={fails}"))
        add_books(session, ["Emma"])
        if fails:
            raise LookupError

    with joined(shop.alchemy):
        shop.trace(work, True)
        shop.trace(work, False)
        assert ran == ["fails=True", "fails=False"]


# --- what waited for a commit that never came ------------------------------------------------------------------


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of what did not happen."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "celery_alchemy.transaction" and record.levelno == logging.WARNING
    ]


@pytest.mark.parametrize("way", ["close", "collected", "task"])
def test_send_that_saw_no_commit_is_reported(shop: Shop, engine: Engine, caplog: pytest.LogCaptureFixture, way: str) -> None:
    """A forgotten commit does not pass without a word."""
    if way == "task":

        @shop.task(commit_on=())
        def work(session: Session) -> None:
            on_commit(session, lambda: None, what="the mail")

        shop.trace(work)
    else:
        session = Session(engine)
        on_commit(session, lambda: None, what="the mail")
        if way == "close":
            session.close()
        del session
        gc.collect()

    assert len(warned(caplog)) == 1
    assert "closed without a commit" in warned(caplog)[0]
    assert warned(caplog)[0].endswith(": the mail")


@pytest.mark.databases("sqlite", "postgresql", "sqlite+aiosqlite")
@pytest.mark.parametrize("way", ["rollback", "error", "task", "async task", "commit"])
def test_send_of_work_that_failed_is_not_reported(shop: Shop, caplog: pytest.LogCaptureFixture, way: str) -> None:
    """A rollback is meant to take it along."""
    if "aiosqlite" in shop.database.url and way != "async task":
        pytest.skip("a plain engine")

    def fail(session: Any) -> None:
        on_commit(session, lambda: None, what="the mail")
        raise LookupError

    async def fail_in_loop(session: AsyncSession) -> None:
        fail(session)

    def fail_in_thread(session: Session) -> None:
        fail(session)

    if way == "task":
        shop.trace(shop.task(name="work")(fail_in_thread))
    elif way == "async task":
        shop.trace(shop.task(name="work")(fail_in_loop))
    else:
        with pytest.raises(LookupError), shop.alchemy.session() as session:
            on_commit(session, lambda: None, what="the mail")
            if way == "error":
                raise LookupError
            getattr(session, way)()
            raise LookupError

    gc.collect()
    assert warned(caplog) == []


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
def test_coroutine_functions_are_awaited_under_an_async_session(shop: Shop, ran: Ran) -> None:
    """In a task and outside, behind the commit; what one raises is the callable's error, and the others run."""

    async def note(name: str) -> None:
        await asyncio.sleep(0)
        ran.append(name)

    async def fail() -> None:
        raise LookupError("no such page")

    @shop.task()
    async def work(session: AsyncSession) -> None:
        on_commit(session, fail)
        on_commit(session, partial(note, "committed"))
        on_end(session, lambda: note("ended"))
        ran.append("returned")

    async def outside() -> None:
        async with shop.alchemy.async_session() as session:
            on_end(session, partial(note, "ended outside"))
            on_commit(session, fail)
            await session.commit()

    work()
    with pytest.raises(PublishError, match="no such page"):
        asyncio.run(outside())

    assert ran == ["returned", "committed", "ended", "ended outside"]


def test_coroutine_function_is_refused_for_a_plain_session(shop: Shop, ran: Ran) -> None:
    """A lock would never be given back; a coroutine that comes out of a plain function is an error of that."""

    async def note() -> None: ...

    class Note:
        async def __call__(self) -> None: ...

    with shop.alchemy.session() as session:
        for later in (on_commit, on_end):
            for given in (note, Note(), partial(Note())):
                with pytest.raises(CallableError, match="was given an `async def`.*AsyncSession"):
                    later(session, given)
        on_commit(session, lambda: note())  # noqa: PLW0108 - only its result shows that it is one.
        with pytest.raises(PublishError, match="was given a coroutine"):
            session.commit()
