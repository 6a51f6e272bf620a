"""`transient_retries`: the whole body runs again in a fresh session, and never where that would be wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import Ignore
from sqlalchemy import create_engine, event, make_url, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import SessionTask
from celery_alchemy.databases import trying_again
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect
from tests.delivery.proxy import CommitProxy
from tests.services.databases import Database
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop

#: Where another transaction can make this one fail with a serialization error, each through a driver of its own.
SERIALIZABLE = ("postgresql+psycopg", "postgresql+psycopg2")
ASYNC = ("postgresql+psycopg", "postgresql+asyncpg")

pytestmark = pytest.mark.databases(*SERIALIZABLE)


class Rival:
    """Another transaction, which changes the book that this one has read."""

    def __init__(self, shop: Shop) -> None:
        self._database = shop.database
        self._database.execute("INSERT INTO book (id, title) VALUES (1, 'draft 0')")
        self.changes = 0

    def change(self) -> None:
        """Commit another title."""
        self.changes += 1
        self._database.execute("UPDATE book SET title = :title WHERE id = 1", title=f"draft {self.changes}")


@pytest.fixture
def rival(shop: Shop) -> Rival:
    """A rival on the shop's book 1."""
    return Rival(shop)


def revising(shop: Shop, rival: Rival, fails: int, name: str = "revise", **options: Any) -> tuple[Any, list[Session]]:
    """Return a task that loses against the rival that many times, and the list of the sessions of its runs."""
    sessions: list[Session] = []

    @shop.task(name=name, isolation_level="REPEATABLE READ", **options)
    def revise(session: Session, title: str) -> str:
        sessions.append(session)
        before = session.scalars(select(Book.title)).one()
        if len(sessions) <= fails:
            rival.change()
        session.execute(update(Book).values(title=f"{title} after {before}"))
        return title

    return revise, sessions


def test_body_runs_again_in_a_fresh_session(shop: Shop, rival: Rival, waits: list[float]) -> None:
    """It reads again what the rival has written; nothing of the first run is left."""
    revise, sessions = revising(shop, rival, fails=2, transient_retries=2)

    traced = shop.trace(revise, "Emma")

    assert (traced.state, traced.value) == ("SUCCESS", "Emma")
    assert shop.titles() == ["Emma after draft 2"]
    assert len({id(session) for session in sessions}) == 3
    assert shop.checked_out() == 0


def test_body_runs_again_at_most_so_often(shop: Shop, rival: Rival, waits: list[float]) -> None:
    """Then the database's own error fails the task; the default is not to run again at all."""
    often, runs_of_often = revising(shop, rival, fails=9, transient_retries=2)
    traced = shop.trace(often, "Emma")
    never, runs_of_never = revising(shop, rival, fails=9, name="revise once")
    at_once = shop.trace(never, "Emma")

    assert [traced.state, at_once.state] == ["FAILURE"] * 2
    assert isinstance(traced.value, DBAPIError)
    assert [len(runs_of_often), len(runs_of_never)] == [3, 1]
    assert len(waits) == 2


def test_backoff_is_random_and_grows(shop: Shop) -> None:
    """Two rivals that wait equally long would meet again."""
    by_try = [[trying_again.backoff_seconds(tries) for _ in range(500)] for tries in (1, 2, 3, 30)]

    assert all(len(set(waited)) > 1 for waited in by_try)
    for tries, waited in zip((1, 2, 3), by_try, strict=False):
        bound = trying_again.BACKOFF_SECONDS * 2**tries
        assert bound / 2 < max(waited) <= bound
    assert max(by_try[3]) <= trying_again.BACKOFF_MAX_SECONDS


@pytest.mark.databases("postgresql+psycopg")
@pytest.mark.parametrize("is_async", [False, True])
def test_time_limit_of_statements_counts_from_the_first_run(shop: Shop, is_async: bool) -> None:
    """The worker's limit is for all runs together, and a run's statements have what is left of it."""
    limits: list[float] = []
    show = text("SELECT setting::int FROM pg_settings WHERE name = 'statement_timeout'")
    lose = text("DO $$ BEGIN PERFORM pg_sleep(0.5); RAISE 'lost' USING ERRCODE = '40001'; END $$")

    def work(session: Session) -> None:
        limits.append(session.execute(show).scalar_one())
        if len(limits) == 1:
            session.execute(lose)

    async def async_work(session: AsyncSession) -> None:
        await session.run_sync(work)

    task = shop.task(time_limit=100, transient_retries=1)(async_work if is_async else work)

    assert shop.trace(task).state == "SUCCESS"
    assert limits[1] <= limits[0] - 500


def test_error_that_does_not_pass_is_not_run_again(shop: Shop, waits: list[float]) -> None:
    """A duplicate is one the next time too, and an exception of the body's own says nothing of a transaction."""
    runs: list[str] = []

    @shop.task(transient_retries=5)
    def duplicate(session: Session) -> None:
        runs.append("duplicate")
        session.add_all([Book(title="Emma"), Book(title="Emma")])

    @shop.task(transient_retries=5)
    def fail(session: Session) -> None:
        runs.append("fail")
        raise ConnectionResetError

    assert [shop.trace(duplicate).state, shop.trace(fail).state] == ["FAILURE"] * 2
    assert runs == ["duplicate", "fail"]
    assert waits == []


def test_autoretry_is_considered_after_the_last_run(shop: Shop, rival: Rival, waits: list[float]) -> None:
    """One retry message for all the runs of an attempt, and a failure is recorded when there is neither run nor retry left."""
    recorded: list[str] = []

    def record(session: Session, exc: BaseException, title: str) -> None:
        recorded.append(title)

    revise, runs = revising(
        shop,
        rival,
        fails=9,
        transient_retries=1,
        autoretry_for=(DBAPIError,),
        max_retries=1,
        record_failure=record,
    )

    first = shop.trace(revise, "Emma")
    waiting, so_far = shop.waiting(), len(runs)
    second = shop.trace(revise, "Emma", request={"retries": 1})

    assert (first.state, waiting, so_far) == ("RETRY", 1, 2)
    assert (second.state, len(runs)) == ("FAILURE", 4)
    assert recorded == ["Emma"]


@pytest.mark.parametrize("fails", [1, 9])
def test_failure_is_recorded_after_the_last_run_only(shop: Shop, rival: Rival, waits: list[float], fails: int) -> None:
    """Not for a run that is followed by another."""
    recorded: list[str] = []

    def record(session: Session, exc: BaseException, title: str) -> None:
        recorded.append(type(exc).__name__)

    revise, _ = revising(shop, rival, fails=fails, transient_retries=2, record_failure=record)
    shop.trace(revise, "Emma")

    assert recorded == ([] if fails == 1 else ["OperationalError"])


def test_transaction_of_the_caller_is_not_run_again(shop: Shop, rival: Rival, waits: list[float]) -> None:
    """The database has rolled back what the caller did in it before; only the caller can do that again."""
    revise, runs = revising(shop, rival, fails=9, transient_retries=5)

    with shop.alchemy.session() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        with pytest.raises(DBAPIError):
            revise("Emma", session=session)

    assert len(runs) == 1


def test_session_on_the_caller_s_connection_is_not_run_again(database: Database, make_shop: MakeShop, waits: list[float]) -> None:
    """A test that binds sessions to its own transaction owns it, as a caller that passes its session does."""
    engine = create_engine(database.url, isolation_level="REPEATABLE READ")
    shop = make_shop()
    rival = Rival(shop)
    runs: list[int] = []

    with engine.connect() as connection, connection.begin():

        class Joined(SessionTask):
            """A task inside of the test's transaction."""

            abstract = True
            session_factory = lambda: Session(connection)  # noqa: E731

        @shop.task(base=Joined, transient_retries=5)
        def revise(session: Session) -> None:
            runs.append(1)
            session.scalars(select(Book.title)).one()
            rival.change()
            session.execute(update(Book).values(title="Emma"))

        assert shop.trace(revise).state == "FAILURE"

    engine.dispose()
    assert len(runs) == 1


def test_inner_task_that_may_not_run_again_leaves_the_outer_one_its_runs(shop: Shop, rival: Rival, waits: list[float]) -> None:
    """The inner one fails in the outer one's transaction: it is the outer one that runs again."""
    inner, runs = revising(shop, rival, fails=1)
    outer_runs: list[int] = []

    @shop.task(isolation_level="REPEATABLE READ", transient_retries=1)
    def outer(session: Session) -> str:
        outer_runs.append(1)
        return str(inner("Emma", session=session))

    assert shop.trace(outer).value == "Emma"
    assert [len(outer_runs), len(runs)] == [2, 2]
    assert shop.titles() == ["Emma after draft 1"]


def test_task_inside_a_task_has_runs_of_its_own(shop: Shop, rival: Rival, waits: list[float]) -> None:
    """Also the same task inside itself: what the inner one fails with does not run the outer one again."""
    calls: list[str] = []

    @shop.task(bind=True, isolation_level="REPEATABLE READ", transient_retries=1)
    def nest(self: Any, session: Session, depth: int) -> str:
        calls.append(f"depth {depth}")
        if depth:
            return str(self(depth=0))
        before = session.scalars(select(Book.title)).one()
        if calls.count("depth 0") == 1:
            rival.change()
        session.execute(update(Book).values(title=f"Emma after {before}"))
        return before

    assert shop.trace(nest, 1).value == "draft 1"
    assert calls == ["depth 1", "depth 0", "depth 0"]


# --- a COMMIT without an answer -----------------------------------------------------------------------------


def test_commit_without_an_answer_is_not_run_again(proxy: CommitProxy, shop: Shop, waits: list[float]) -> None:
    """It may have been carried out, as it was here; running the body again would do its work twice."""
    runs: list[int] = []

    @shop.task(transient_retries=5)
    def add(session: Session) -> None:
        runs.append(1)
        session.add(Book(title=f"book {len(runs)}"))
        proxy.lose_next("answer")

    traced = shop.trace(add)

    assert traced.state == "FAILURE"
    assert proxy.lost == 1
    assert shop.titles() == ["book 1"]


def test_commit_without_an_answer_that_an_ignored_task_asked_for_is_not_run_again(
    proxy: CommitProxy, shop: Shop, waits: list[float]
) -> None:
    """As that of a success: the policy may let any outcome commit."""
    runs: list[int] = []

    @shop.task(transient_retries=5, commit_on=("ignore",))
    def add(session: Session) -> None:
        runs.append(1)
        session.add(Book(title=f"book {len(runs)}"))
        proxy.lose_next("answer")
        raise Ignore

    traced = shop.trace(add)

    assert traced.state == "FAILURE"
    assert shop.titles() == ["book 1"]


def test_commit_without_an_answer_of_a_once_task_is_looked_up(proxy: CommitProxy, make_stand: MakeStand, waits: list[float]) -> None:
    """Its record says that it was carried out: the task has succeeded, after one run."""
    stand = make_stand()
    runs: list[int] = []

    @stand.task(once=True, transient_retries=5)
    def add(session: Session) -> int:
        runs.append(1)
        proxy.lose_next("answer")
        session.add(Effect(name=f"effect {len(runs)}"))
        return len(runs)

    add.delay()
    ended = stand.deliver(stand.sent()[0])

    assert (ended.state, ended.value) == ("SUCCESS", 1)
    assert stand.effects() == ["effect 1"]


def test_connection_cut_before_the_commit_of_a_once_task_runs_it_again(
    make_stand: MakeStand, database: Database, waits: list[float]
) -> None:
    """Its record says that nothing was committed; so it runs again, and commits once."""
    stand = make_stand()
    runs: list[int] = []

    @stand.task(once=True, transient_retries=5)
    def add(session: Session) -> int:
        runs.append(1)
        session.add(Effect(name=f"effect {len(runs)}"))
        session.flush()
        if len(runs) == 1:
            assert database.disconnect_others() > 0
        return len(runs)

    add.delay()
    ended = stand.deliver(stand.sent()[0])

    assert (ended.state, ended.value) == ("SUCCESS", 2)
    assert stand.effects() == ["effect 2"]


def test_connection_cut_in_the_body_runs_it_again(shop: Shop, waits: list[float]) -> None:
    """The server has rolled the work back; a fresh session has a fresh connection."""
    runs: list[int] = []

    @shop.task(transient_retries=1)
    def add(session: Session) -> None:
        runs.append(1)
        session.add(Book(title=f"book {len(runs)}"))
        session.flush()
        if len(runs) == 1:
            assert shop.database.disconnect_others() > 0
        session.execute(text("SELECT 1"))

    assert shop.trace(add).state == "SUCCESS"
    assert shop.titles() == ["book 2"]


# --- other databases, and async tasks ------------------------------------------------------------------------


@pytest.mark.databases("mariadb")
def test_lock_that_was_waited_for_too_long_runs_the_body_again(shop: Shop, waits: list[float]) -> None:
    """MariaDB rolls back the statement only; the transaction is rolled back by us before the next run."""
    shop.database.execute("INSERT INTO book (id, title) VALUES (1, 'draft')")
    runs: list[int] = []
    with shop.database.engine.connect() as other:
        other.execute(text("UPDATE book SET title = 'locked' WHERE id = 1"))

        @shop.task(transient_retries=1)
        def revise(session: Session) -> None:
            runs.append(1)
            session.add(Book(title=f"book {len(runs)}"))
            session.flush()
            if len(runs) == 2:
                other.rollback()
            session.execute(text("SELECT * FROM book WHERE id = 1 FOR UPDATE NOWAIT"))

        assert shop.trace(revise).state == "SUCCESS"

    assert shop.titles() == ["draft", "book 2"]


@pytest.fixture
def impatient(database: Database, make_shop: MakeShop) -> Iterator[Shop]:
    """A shop whose SQLite connections do not wait for another writer."""
    shop = make_shop()

    def stop_waiting(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA busy_timeout = 0")

    event.listen(shop.alchemy.engine, "connect", stop_waiting)
    yield shop
    event.remove(shop.alchemy.engine, "connect", stop_waiting)


@pytest.mark.databases("sqlite")
def test_busy_file_runs_the_body_again(impatient: Shop, waits: list[float]) -> None:
    """Another process writes; at the second run it has ended."""
    shop, runs = impatient, []
    with shop.database.engine.connect() as other:
        other.execute(text("INSERT INTO book (title) VALUES ('theirs')"))

        @shop.task(transient_retries=1)
        def add(session: Session) -> None:
            runs.append(1)
            if len(runs) == 2:
                other.commit()
            session.add(Book(title=f"book {len(runs)}"))

        traced = shop.trace(add)

    assert traced.state == "SUCCESS"
    assert shop.titles() == ["theirs", "book 2"]


@pytest.mark.databases(*ASYNC)
@pytest.mark.parametrize("way", ["worker", "awaited"])
@pytest.mark.parametrize("fails", [2, 9])
def test_async_body_runs_again(shop: Shop, rival: Rival, monkeypatch: pytest.MonkeyPatch, way: str, fails: int) -> None:
    """In a fresh AsyncSession, as often and no oftener; its failure is recorded after the last run."""
    monkeypatch.setattr(trying_again, "BACKOFF_SECONDS", 0.001)
    sessions: list[AsyncSession] = []
    recorded: list[str] = []

    def record(session: Session, exc: BaseException, title: str) -> None:
        recorded.append(title)

    @shop.task(isolation_level="REPEATABLE READ", transient_retries=2, record_failure=record)
    async def revise(session: AsyncSession, title: str) -> str:
        sessions.append(session)
        before = (await session.scalars(select(Book.title))).one()
        if len(sessions) <= fails:
            await asyncio.to_thread(rival.change)
        await session.execute(update(Book).values(title=f"{title} after {before}"))
        return title

    ends: dict[str, Callable[[], Any]] = {
        "worker": lambda: shop.trace(revise, "Emma").value,
        "awaited": lambda: asyncio.run(_result_of(revise, "Emma")),
    }
    result = ends[way]()

    assert len({id(session) for session in sessions}) == 3
    if fails == 2:
        assert (result, shop.titles(), recorded) == ("Emma", ["Emma after draft 2"], [])
    else:
        assert isinstance(result, DBAPIError)
        assert (shop.titles(), recorded) == ([f"draft {rival.changes}"], ["Emma"])


async def _result_of(task: Any, *args: Any) -> Any:
    try:
        return await task(*args)
    except DBAPIError as exc:
        return exc


@pytest.mark.databases("postgresql+asyncpg")
def test_async_connection_that_is_refused_runs_the_body_again(
    database: Database, make_shop: MakeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that restarts: asyncpg reports it by an error of the operating system, not of the database."""
    monkeypatch.setattr(trying_again, "BACKOFF_SECONDS", 0.001)
    runs: list[int] = []
    there = make_url(database.url)
    shop = make_shop()

    @shop.task(transient_retries=2)
    async def add(session: AsyncSession) -> None:
        runs.append(1)
        engine: Any = session.get_bind()
        arguments = {"port": 1 if len(runs) < 3 else there.port or 5432}
        event.listen(engine, "do_connect", lambda dialect, record, args, kwargs: kwargs.update(arguments), once=True)
        session.add(Book(title=f"book {len(runs)}"))
        await session.flush()

    assert shop.trace(add).state == "SUCCESS"
    assert shop.titles() == ["book 3"]
