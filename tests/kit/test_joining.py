"""Sessions join the test's transaction, and everything behaves as after a commit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

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


@pytest.mark.databases("sqlite")
def test_sessions_that_choose_their_engine_are_refused(database: Database, make_store: Callable[..., Store]) -> None:
    """A session that would not join is not let through to write for good."""
    engine = create_engine(database.url)

    class Choosing(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return engine

    store = make_store(lambda: Choosing(engine))

    with joined(store.alchemy), pytest.raises(ConfigurationError, match="choose their engine"):
        store.pay("a")
    engine.dispose()
