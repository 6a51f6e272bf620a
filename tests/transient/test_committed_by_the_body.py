"""`transient_retries` never runs a body again that has committed writes by itself."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from celery_alchemy import released
from celery_alchemy.databases import trying_again
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect
from tests.delivery.proxy import CommitProxy
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql", "mariadb")

Commit = Callable[[Shop, Session], object]


def lose() -> None:
    """Fail with what may pass."""
    raise OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))


def commit(shop: Shop, session: Session) -> None:
    """Commit as bodies do."""
    add_books(session, ["Emma"])
    session.commit()


def release(shop: Shop, session: Session) -> None:
    """Commit on the way to slow work."""
    session.add(Book(title="Emma"))
    with released(session, commit=True):
        pass


def core_statement(shop: Shop, session: Session) -> None:
    """Commit what no object stands for."""
    session.execute(insert(Book).values(title="Emma"))
    session.commit()


def begin_again(shop: Shop, session: Session) -> None:
    """Commit, and roll back another transaction after it."""
    commit(shop, session)
    add_books(session, ["Persuasion"])
    session.rollback()


def other_session(shop: Shop, session: Session) -> None:
    """Commit in a session that the body opens itself."""
    with shop.alchemy.begin() as other:
        add_books(other, ["Emma"])


def foreign_session(shop: Shop, session: Session) -> None:
    """Commit in a session that the library has nothing to do with."""
    with sessionmaker(shop.database.engine).begin() as other:
        add_books(other, ["Emma"])


def connection(shop: Shop, session: Session) -> None:
    """Commit on a connection of the tasks' engine, without a session."""
    with shop.alchemy.engine.begin() as own:
        own.execute(insert(Book).values(title="Emma"))


def inner_task(shop: Shop, session: Session) -> None:
    """Have a task commit that is called directly."""

    @shop.task(name="inner")
    def inner(session: Session) -> None:
        add_books(session, ["Emma"])

    inner()


def commit_text(shop: Shop, session: Session) -> None:
    """Commit by a statement."""
    add_books(session, ["Emma"])
    session.execute(text("commit"))


def commit_text_after_unseen(shop: Shop, session: Session) -> object:
    """Commit by a statement what the driver's own cursor has written."""
    if shop.database.name == "mariadb":
        # It cannot be asked.
        return commit_text(shop, session)
    connection = session.connection().connection
    connection.cursor().execute("INSERT INTO book (title) VALUES ('Emma')")
    session.execute(text("commit"))
    return None


def commit_connection(shop: Shop, session: Session) -> None:
    """Commit the session's own Connection."""
    add_books(session, ["Emma"])
    session.connection().commit()


def commit_itself(shop: Shop, session: Session) -> object:
    """Write on a connection of the tasks' engine that commits each statement."""
    if shop.database.name == "sqlite":
        # Our engine begins a transaction there as well.
        return connection(shop, session)
    with shop.alchemy.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as own:
        own.execute(insert(Book).values(title="Emma"))
    return None


COMMITS: list[Commit] = [
    commit,
    release,
    core_statement,
    begin_again,
    other_session,
    foreign_session,
    connection,
    inner_task,
    commit_text,
    commit_text_after_unseen,
    commit_connection,
    commit_itself,
]


@pytest.mark.parametrize("way", COMMITS)
def test_body_that_has_committed_writes_is_not_run_again(
    shop: Shop, waits: list[float], caplog: pytest.LogCaptureFixture, way: Commit
) -> None:
    """The error stands, and says why; what was committed is there once."""
    runs: list[int] = []

    @shop.task(name="work", transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        # On SQLite nobody else could write meanwhile.
        session.rollback()
        way(shop, session)
        lose()

    with caplog.at_level(logging.WARNING, "celery_alchemy"):
        traced = shop.trace(work)

    why = "Not run again by transient_retries=2: it has committed writes."
    assert (traced.state, len(runs), waits) == ("FAILURE", 1, [])
    assert isinstance(traced.value, OperationalError)
    assert shop.titles() == ["Emma"]
    assert why in caplog.text
    if sys.version_info >= (3, 11):
        assert traced.value.__notes__ == [why]


IMPLIED = [
    "TRUNCATE TABLE staging",
    "CREATE TABLE IF NOT EXISTS staging (id INT)",
    "ALTER TABLE staging COMMENT 'x'",
    "ANALYZE TABLE staging",
    "LOCK TABLES book WRITE",
    "START TRANSACTION",
    "SET autocommit=1",
]


@pytest.mark.parametrize("statement", IMPLIED)
@pytest.mark.databases("mariadb")
def test_commit_that_a_statement_implies_counts(shop: Shop, waits: list[float], statement: str) -> None:
    """MariaDB and MySQL commit what was written before it."""
    shop.database.execute("CREATE TABLE IF NOT EXISTS staging (id INT)")
    runs: list[int] = []

    @shop.task(transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        add_books(session, ["Emma"])
        session.execute(text(statement))
        try:
            lose()
        finally:
            # No setting of it stays in the pool.
            session.invalidate()

    assert (shop.trace(work).state, len(runs), shop.titles()) == ("FAILURE", 1, ["Emma"])


@pytest.mark.databases("mariadb")
def test_commit_that_a_failing_statement_implies_counts(shop: Shop, waits: list[float]) -> None:
    """It comes before the statement itself."""
    runs: list[int] = []

    @shop.task(transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        add_books(session, ["Emma"])
        with pytest.raises(DBAPIError):
            session.execute(text("TRUNCATE TABLE nothing_of_this_name"))
        lose()

    assert (shop.trace(work).state, len(runs), shop.titles()) == ("FAILURE", 1, ["Emma"])


@pytest.mark.databases("sqlite")
def test_commit_of_a_send_alone_counts(shop: Shop, waits: list[float]) -> None:
    """The message is out; another run would send another."""
    runs: list[int] = []

    @shop.task(name="child")
    def child() -> None: ...

    @shop.task(transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        child.delay_on_commit()
        session.commit()
        lose()

    traced = shop.trace(work)

    assert (traced.state, len(runs), shop.waiting()) == ("FAILURE", 1, 1)
    if sys.version_info >= (3, 11):
        assert "what waited for the commit is sent" in traced.value.__notes__[0]


@pytest.mark.parametrize("way", ["sync", "released", "awaited"])
@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "mariadb+aiomysql")
def test_async_body_that_has_committed_writes_is_not_run_again(shop: Shop, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """In a worker, and where a coroutine awaits it."""
    monkeypatch.setattr(trying_again, "BACKOFF_SECONDS", 0.001)
    runs: list[int] = []

    @shop.task(transient_retries=2)
    async def work(session: AsyncSession) -> None:
        runs.append(1)
        session.add(Book(title="Emma"))
        if way == "released":
            async with released(session, commit=True):
                pass
        else:
            await session.commit()
        lose()

    if way == "awaited":
        with pytest.raises(OperationalError):
            asyncio.run(work())
    else:
        assert isinstance(shop.trace(work).value, OperationalError)
    assert len(runs) == 1
    assert shop.titles() == ["Emma"]


def read_and_commit(session: Session) -> None:
    session.execute(text("SELECT 1"))
    session.commit()


def release_after_reading(session: Session) -> None:
    session.execute(text("SELECT 1"))
    with released(session):
        pass


def write_and_roll_back(session: Session) -> None:
    add_books(session, ["Emma"])
    session.rollback()


def release_savepoint(session: Session) -> None:
    with session.begin_nested():
        add_books(session, ["Emma"])


def fail_to_commit(session: Session) -> None:
    with pytest.raises(DBAPIError):
        session.add_all([Book(title="Emma"), Book(title="Emma")])
        session.commit()
    session.rollback()


def commit_text_after_reading(session: Session) -> None:
    session.execute(text("SELECT 1"))
    session.execute(text("commit"))


HARMLESS: list[Callable[[Session], object]] = [
    read_and_commit,
    release_after_reading,
    write_and_roll_back,
    release_savepoint,
    fail_to_commit,
    commit_text_after_reading,
]


@pytest.mark.parametrize("harmless", HARMLESS)
def test_body_that_has_committed_nothing_is_run_again(shop: Shop, waits: list[float], harmless: Callable[[Session], object]) -> None:
    """A commit of reads, a rollback, a SAVEPOINT's release and a commit that the database refused leave nothing behind."""
    runs: list[int] = []

    @shop.task(transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        harmless(session)
        if len(runs) < 3:
            lose()

    assert shop.trace(work).state == "SUCCESS"
    assert len(runs) == 3


@pytest.mark.databases("sqlite", "postgresql")
def test_unseen_writes_that_the_body_has_committed_count(shop: Shop, waits: list[float]) -> None:
    """The database is asked before the commit, as `released` asks it."""
    runs: list[int] = []

    @shop.task(transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        cursor = session.connection().connection.cursor()
        cursor.execute("INSERT INTO book (title) VALUES ('Emma')")
        cursor.close()
        session.commit()
        lose()

    shop.trace(work)

    assert len(runs) == 1


@pytest.mark.databases("postgresql", "postgresql+psycopg2", "mariadb")
@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("loss", ["answer", "commit"])
def test_commit_of_the_body_without_an_answer_is_not_run_again(
    proxy: CommitProxy, shop: Shop, waits: list[float], loss: Any, caught: bool
) -> None:
    """Nobody knows whether it was carried out; also if the body has caught the error and fails with another one."""
    runs: list[int] = []

    @shop.task(transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        add_books(session, [f"book {len(runs)}"])
        proxy.lose_next(loss)
        try:
            session.commit()
        except DBAPIError:
            if not caught:
                raise
            session.rollback()
        lose()

    traced = shop.trace(work)

    assert (traced.state, len(runs), proxy.lost) == ("FAILURE", 1, 1)
    assert shop.titles() == (["book 1"] if loss == "answer" else [])


@pytest.mark.databases("postgresql", "mariadb")
def test_commit_of_reads_without_an_answer_is_run_again(proxy: CommitProxy, shop: Shop, waits: list[float]) -> None:
    """There was nothing that it could have carried out."""
    runs: list[int] = []

    @shop.task(transient_retries=2)
    def work(session: Session) -> None:
        runs.append(1)
        session.execute(text("SELECT 1"))
        if len(runs) == 1:
            proxy.lose_next("commit")
        session.commit()

    assert shop.trace(work).state == "SUCCESS"
    assert len(runs) == 2


@pytest.mark.databases("sqlite", "postgresql")
def test_failure_is_recorded_though_runs_are_left(shop: Shop, waits: list[float]) -> None:
    """A body that is not run again has failed for good."""
    recorded: list[str] = []

    def record(session: Session, exc: BaseException) -> None:
        recorded.append(type(exc).__name__)

    @shop.task(transient_retries=2, record_failure=record)
    def work(session: Session) -> None:
        commit(shop, session)
        lose()

    shop.trace(work)

    assert recorded == ["OperationalError"]


@pytest.mark.databases("sqlite", "postgresql")
def test_start_of_a_once_task_is_no_commit_of_its_body(make_stand: MakeStand, waits: list[float]) -> None:
    """The library's own commit may be repeated: the body runs again, and its writes are committed once."""
    stand = make_stand()
    runs: list[int] = []

    @stand.task(once=True, transient_retries=2)
    def works(session: Session) -> None:
        runs.append(1)
        session.add(Effect(name="a"))
        session.flush()
        if len(runs) == 1:
            lose()

    with stand.alchemy.begin() as session:
        works.apply_async_on_commit(session=session)
    ended = stand.deliver(stand.sent()[0])

    assert (ended.state, len(runs)) == ("SUCCESS", 2)
    assert stand.effects() == ["a"]


@pytest.mark.databases("sqlite", "postgresql")
def test_once_task_whose_other_session_has_committed_is_not_run_again(make_stand: MakeStand, waits: list[float]) -> None:
    """What another session has committed would be there twice."""
    stand = make_stand()
    runs: list[int] = []

    @stand.task(once=True, transient_retries=2)
    def works(session: Session) -> None:
        runs.append(1)
        with stand.alchemy.begin() as other:
            other.add(Effect(name="a"))
        lose()

    works.delay()
    ended = stand.deliver(stand.sent()[0])

    assert (ended.state, len(runs)) == ("FAILURE", 1)


@pytest.mark.databases("sqlite", "postgresql")
def test_inner_task_that_runs_again_leaves_its_outer_one_its_runs(shop: Shop, waits: list[float]) -> None:
    """Only what was committed counts, and the inner one's first run has committed nothing."""
    inner_runs: list[int] = []
    outer_runs: list[int] = []

    @shop.task(name="inner", transient_retries=1)
    def inner(session: Session) -> None:
        inner_runs.append(1)
        if len(inner_runs) == 1:
            lose()
        session.execute(text("SELECT 1"))

    @shop.task(name="outer", transient_retries=1)
    def outer(session: Session) -> None:
        outer_runs.append(1)
        inner()
        if len(outer_runs) == 1:
            lose()

    assert shop.trace(outer).state == "SUCCESS"
    assert (len(outer_runs), len(inner_runs)) == (2, 3)
