"""Sessions join the test's transaction, and everything behaves as after a commit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, on_commit
from celery_alchemy.testing import Sent, joined
from tests.kit.store import Payment, Store
from tests.services.databases import Database


def test_what_a_task_commits_is_rolled_back_with_the_test(store: Store) -> None:
    """The task has committed, the test sees it, and afterwards it never was."""
    with joined(store.alchemy) as transaction:
        store.pay.apply(("a",), throw=True)
        store.pay("b")

        assert transaction.session().scalars(select(Payment.order)).all() == ["a", "b"]
        assert store.paid == ["a", "b"]

    assert store.committed() == 0


def test_what_fails_is_rolled_back_at_once(store: Store, alchemy_session: Session) -> None:
    """A failed task leaves nothing behind, and the test's transaction is well."""
    alchemy_session.add(Payment(order="before"))
    alchemy_session.commit()

    with pytest.raises(LookupError):
        store.fail()
    with pytest.raises(SoftTimeLimitExceeded), store.alchemy.begin() as session:
        session.add(Payment(order="interrupted"))
        session.flush()
        raise SoftTimeLimitExceeded

    assert store.paid == ["before"]


@pytest.mark.parametrize("bind", ["sessionmaker", "engine", "callable"])
@pytest.mark.databases("sqlite", "postgresql")
def test_every_kind_of_bind_joins(bind: str, database: Database, make_store: Callable[..., Store]) -> None:
    """A user's own engine, sessionmaker and callable, the pysqlite default of which begins no transaction before a SAVEPOINT."""
    engine = create_engine(database.url)
    maker = sessionmaker(engine)
    store = make_store({"sessionmaker": maker, "engine": engine, "callable": lambda: Session(engine)}[bind])

    with joined(store.alchemy):
        store.pay("a")
        if bind == "sessionmaker":
            with maker.begin() as session:  # As a web application would, past Alchemy.
                session.add(Payment(order="b"))

        assert store.paid == (["a", "b"] if bind == "sessionmaker" else ["a"])

    assert store.committed() == 0
    store.pay("c")
    assert store.committed() == 1
    engine.dispose()


@pytest.mark.databases("sqlite", "postgresql")
def test_async_tasks_and_sessions_see_the_same_rows(store: Store, alchemy: Alchemy) -> None:
    """Of a sync and an async session, in whatever loop, one sees what the other has committed."""

    async def request() -> list[str]:
        async with alchemy.async_session() as session:
            session.add(Payment(order="b"))
            await session.commit()
            return list(await session.scalars(select(Payment.order).order_by(Payment.id)))

    with joined(alchemy) as transaction:
        store.pay("a")

        assert asyncio.run(request()) == ["a", "b"]
        store.pay_async.apply(("c",), throw=True)
        assert transaction.session().scalars(select(Payment.order).order_by(Payment.id)).all() == ["a", "b", "c"]

    assert store.committed() == 0


@pytest.mark.databases("postgresql")
def test_users_async_sessionmaker_joins(database: Database, make_store: Callable[..., Store]) -> None:
    """The sessions that an async web application makes for itself join too."""
    maker = async_sessionmaker(create_async_engine(database.url), expire_on_commit=False)
    store = make_store(maker)

    async def request() -> None:
        async with maker.begin() as session:
            session.add(Payment(order="b"))

    with joined(store.alchemy):
        store.pay_async.apply(("a",), throw=True)
        asyncio.run(request())

        assert store.paid == ["a", "b"]

    assert store.committed() == 0


@pytest.mark.databases("sqlite")
def test_async_session_of_the_test(store: Store, alchemy_async_session: AsyncSession) -> None:
    """A test that is async arranges and asserts with an AsyncSession, made outside of its loop."""

    async def body() -> list[str]:
        alchemy_async_session.add(Payment(order="a"))
        await alchemy_async_session.commit()
        return list(await alchemy_async_session.scalars(select(Payment.order)))

    assert asyncio.run(body()) == ["a"]
    assert store.paid == ["a"]


def test_commit_of_the_outermost_session_counts(store: Store, sent: Sent, alchemy_session: Session) -> None:
    """What waits for the commit happens at the session's own commit, though the test's transaction is open; not for a SAVEPOINT."""
    happened: list[str] = []
    with store.alchemy.begin() as session:
        with session.begin_nested() as savepoint:
            store.receipt.delay_on_commit("taken back")
            savepoint.rollback()
        with session.begin_nested():
            store.receipt.delay_on_commit("released")
        on_commit(session, lambda: happened.append("committed"))
        assert sent == []
        assert happened == []

    assert sent == [store.receipt.s("released")]
    assert happened == ["committed"]


@pytest.mark.usefixtures("joined_transaction")
def test_task_inside_a_task_joins_too(store: Store, sent: Sent) -> None:
    """The inner one's work stands and is seen; of the outer one's writes the library still knows."""
    task: Any = store.app.task

    @task(shared=False)
    def outer(session: Session) -> bool:
        assert session.scalars(select(Payment)).all() == []
        store.pay("inner")
        session.add(Payment(order="outer"))
        session.flush()
        with pytest.warns(match="before its transaction has committed|uncommitted"):
            store.receipt.delay("too early")
        return True

    assert outer() is True
    assert store.paid == ["inner", "outer"]


@pytest.mark.usefixtures("joined_transaction")
@pytest.mark.databases("sqlite", "postgresql")
def test_session_of_another_thread_joins(store: Store) -> None:
    """A web framework runs requests in threads."""
    thread = threading.Thread(target=store.pay, args=("from a thread",))
    thread.start()
    thread.join()

    assert store.paid == ["from a thread"]


@pytest.mark.usefixtures("joined_transaction")
@pytest.mark.databases("sqlite", "postgresql")
def test_read_only_task_leaves_the_transaction_writable(store: Store) -> None:
    """What a task says of its transaction ends with it."""
    task: Any = store.app.task

    @task(shared=False, read_only=True)
    def count(session: Session) -> int:
        return len(session.scalars(select(Payment)).all())

    assert count() == 0
    store.pay("a")
    assert count() == 1


@pytest.mark.parametrize("bind", ["callable", "sessionmaker", "registry"])
@pytest.mark.databases("sqlite", "postgresql")
def test_sessions_that_choose_their_engine_join(bind: str, database: Database, make_store: Callable[..., Store]) -> None:
    """As Flask-SQLAlchemy's do by the model: their choice stands, and the connection of the test takes the engine's place."""
    engine = create_engine(database.url)

    class Choosing(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return engine

    maker = sessionmaker(engine, class_=Choosing)
    binds: dict[str, Any] = {
        "callable": lambda: Choosing(engine),
        "sessionmaker": maker,
        "registry": scoped_session(maker),
    }
    store = make_store(binds[bind])

    with joined(store.alchemy):
        store.pay("a")
        store.pay_once.apply(("b",), throw=True)
        with pytest.raises(LookupError):
            store.fail()

        assert store.paid == ["a", "b"]

    assert store.committed() == 0
    store.pay("c")
    assert store.committed() == 1
    engine.dispose()


# --- a suite that has a fixture of its own ---------------------------------------------------------------------------------


@pytest.fixture
def db_session(store: Store) -> Iterator[Session]:
    """What many suites have: a session in a transaction that is rolled back, SQLAlchemy's recipe."""
    with store.alchemy.engine.connect() as connection:
        transaction = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()
    assert store.committed() == 0


everywhere = pytest.mark.databases("sqlite", "postgresql", "mariadb")


@everywhere
def test_task_that_is_given_the_suites_session_sees_its_unflushed_rows(store: Store, db_session: Session) -> None:
    """`task(session=...)` runs the body in the test's own session and ends nothing."""
    db_session.add(Payment(order="a"))

    store.pay("b", session=db_session)

    assert db_session.scalars(select(Payment.order).order_by(Payment.id)).all() == ["a", "b"]


@everywhere
@pytest.mark.parametrize("flushes", [False, True])
def test_tasks_join_the_transaction_of_the_suites_session(store: Store, db_session: Session, flushes: bool) -> None:
    """With sessions of their own, as in production: they see its unflushed rows, and it sees theirs."""
    seen: list[list[str]] = []

    @store.app.task(shared=False)
    def look(session: Session) -> None:
        seen.append(list(session.scalars(select(Payment.order).order_by(Payment.id))))

    with joined(store.alchemy, db_session):
        db_session.add(first := Payment(order="a"))
        if flushes:
            db_session.flush()
        store.pay("b")
        first.order = "c"
        store.pay_once.apply(("d",), throw=True)
        with pytest.raises(LookupError):
            store.fail()
        look()

        assert seen == [["c", "b", "d"]]
        assert first in db_session
        assert db_session.scalars(select(Payment.order).order_by(Payment.id)).all() == ["c", "b", "d"]


@everywhere
def test_rows_of_the_kits_session_are_seen_without_a_flush(store: Store, alchemy_session: Session) -> None:
    """That of the fixture `alchemy_session`."""
    alchemy_session.add(Payment(order="a"))

    assert store.paid == ["a"]


@everywhere
def test_session_with_the_suites_own_engine_is_joined(store: Store, database: Database) -> None:
    """A suite that makes an engine of its own for its tests need not give it to the Alchemy."""
    engine = create_engine(database.url)
    with Session(engine) as session:
        session.add(Payment(order="a"))
        with joined(store.alchemy, session):
            store.pay("b")
            assert session.scalars(select(Payment.order).order_by(Payment.id)).all() == ["a", "b"]
        session.rollback()
    engine.dispose()

    assert store.committed() == 0


@everywhere
def test_rows_of_the_applications_registry_are_seen_without_a_flush(database: Database, make_store: Callable[..., Store]) -> None:
    """The test says `db.session` as the application does; the task has another session in it."""
    engine = create_engine(database.url)
    registry = scoped_session(sessionmaker(engine))
    store = make_store(registry)

    with joined(store.alchemy):
        registry.add(Payment(order="a"))
        store.pay("b")
        assert registry.scalars(select(Payment.order).order_by(Payment.id)).all() == ["a", "b"]
        registry.remove()

    assert store.committed() == 0
    engine.dispose()


def test_registry_in_the_suites_transaction_is_joined(store: Store, db_session: Session) -> None:
    """`joined(alchemy, db.session)`: the session that it hands out to the test."""
    registry = scoped_session(sessionmaker(), scopefunc=lambda: "test")
    registry.registry.set(db_session)
    registry.add(Payment(order="a"))

    with joined(store.alchemy, registry):
        assert store.paid == ["a"]


@pytest.mark.databases("sqlite")
def test_async_session_is_no_session_to_join(store: Store, database: Database) -> None:
    """Its connection belongs to its event loop; the kit has one that works everywhere."""
    session = AsyncSession(create_async_engine("sqlite+aiosqlite://"))

    with pytest.raises(ConfigurationError, match=r"is a AsyncSession.*async_session\(\)"), joined(store.alchemy, session):
        pass
