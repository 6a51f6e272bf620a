"""isolation_level, read_only and the time limit of a task hold for its transaction, and for nobody else's."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from celery_alchemy import Alchemy, SessionTask
from tests.unit.shop import Book, Shop, add_books, task_of

SERVERS = ("postgresql", "mariadb")
SERVERS_AND_PSYCOPG2 = ("postgresql", "postgresql+psycopg2", "mariadb")

_LEVEL = {"postgresql": "SHOW transaction_isolation", "mariadb": "SELECT @@tx_isolation"}
_TIMEOUT = {"postgresql": "SHOW statement_timeout", "mariadb": "SELECT @@max_statement_time"}
_SLEEP = {"postgresql": "SELECT pg_sleep(20)", "mariadb": "SELECT sleep(20)"}


@pytest.mark.databases(*SERVERS_AND_PSYCOPG2)
def test_isolation_level_holds_for_the_task_alone(shop: Shop) -> None:
    """The next task on the same pooled connection has the engine's level again."""
    query = text(_LEVEL[shop.database.name])

    @shop.task(name="strict", isolation_level="SERIALIZABLE")
    def strict(session: Session) -> tuple[str, str]:
        first = session.execute(query).scalar_one()
        session.commit()
        return first, session.execute(query).scalar_one()

    @shop.task(name="plain")
    def plain(session: Session) -> str:
        return str(session.execute(query).scalar_one())

    before, within, after = plain(), strict(), plain()

    assert [level.upper() for level in within] == ["SERIALIZABLE"] * 2
    assert before == after != within[0]


@pytest.mark.databases("postgresql")
def test_isolation_level_reaches_sessions_of_a_sessionmaker_and_of_a_callable(shop: Shop) -> None:
    """Whatever the bind, the level is the task's."""
    engine = shop.alchemy.engine
    levels = []
    for number, bind in enumerate([sessionmaker(engine), sessionmaker(binds={Book: engine}), lambda: Session(engine)]):
        app = Celery(f"shop-{number}", broker="memory://", set_as_current=False)
        Alchemy(app, bind)

        @task_of(app, isolation_level="REPEATABLE READ")
        def ask(session: Session) -> str:
            bound = session.connection(bind_arguments={"mapper": Book.__mapper__})
            return str(bound.execute(text(_LEVEL["postgresql"])).scalar_one())

        levels.append(ask())

    assert levels == ["repeatable read"] * 3


@pytest.mark.databases("sqlite")
def test_unknown_isolation_level_is_the_databases_own_error(shop: Shop) -> None:
    """SQLAlchemy names the levels that there are."""

    @shop.task(isolation_level="SNAPSHOT")
    def work(session: Session) -> None:
        session.connection()

    with pytest.raises(ArgumentError, match="SERIALIZABLE"):
        work()


@pytest.mark.databases("sqlite", *SERVERS_AND_PSYCOPG2)
def test_read_only_task_cannot_write(shop: Shop) -> None:
    """The database refuses, in every transaction of the task; the next task on the connection may write."""
    shop.database.execute("INSERT INTO book (title) VALUES ('Emma')")

    @shop.task(name="report", read_only=True)
    def report(session: Session, write: bool, commit_first: bool) -> int:
        count = len(session.query(Book).all())
        if commit_first:
            session.commit()
        if write:
            add_books(session, ["refused"])
        return count

    @shop.task(name="add")
    def add(session: Session) -> None:
        add_books(session, ["Persuasion"])

    counted = report(False, False)
    for commit_first in (False, True):
        with pytest.raises(DBAPIError, match=r"read.?only|READ ONLY|query_only"):
            report(True, commit_first)
    add()

    assert counted == 1
    assert shop.titles() == ["Emma", "Persuasion"]


@pytest.mark.databases(*SERVERS_AND_PSYCOPG2)
def test_statement_is_ended_with_the_tasks_time(shop: Shop) -> None:
    """A statement that would outlive the task's limit is cancelled by the server; the next task has no limit."""

    @shop.task(name="slow", time_limit=1)
    def slow(session: Session) -> None:
        session.execute(text(_SLEEP[shop.database.name]))

    traced = shop.trace(slow)

    # MariaDB's sleep() is interrupted with a 1 for its result instead of an error, from 10.11 on.
    if shop.database.name == "postgresql":
        assert "statement timeout" in str(traced.value)
    assert traced.runtime_seconds < 10
    assert _timeout_of_next_task(shop) in ("0", "0.0", "0E-6", "0.000000")
    assert shop.checked_out() == 0


@pytest.mark.databases(*SERVERS)
def test_time_limit_of_the_message_wins(shop: Shop) -> None:
    """What is left of the limit that this request was sent with, hard before soft, to the millisecond."""

    @shop.task(bind=True, time_limit=1000, soft_time_limit=900)
    def work(self: SessionTask) -> str:
        return str(self.session.execute(text(_TIMEOUT[shop.database.name])).scalar_one())

    by_task = shop.trace(work).value
    by_message = shop.trace(work, request={"timelimit": [20, 10]}).value
    soft_only = shop.trace(work, request={"timelimit": [None, 10]}).value

    assert 990 < _seconds(by_task) <= 1000
    assert 18 < _seconds(by_message) <= 20
    assert 990 < _seconds(soft_only) <= 1000


@pytest.mark.databases(*SERVERS)
def test_soft_limit_leaves_time_to_clean_up(shop: Shop) -> None:
    """At a soft limit the body is told and goes on; the server ends its statements a little later, never before."""

    @shop.task(bind=True, soft_time_limit=20)
    def work(self: SessionTask) -> str:
        return str(self.session.execute(text(_TIMEOUT[shop.database.name])).scalar_one())

    assert 20 < _seconds(shop.trace(work).value) <= 22
    assert 10 < _seconds(shop.trace(work, request={"timelimit": [None, 10]}).value) <= 12


@pytest.mark.databases(*SERVERS)
def test_limit_shrinks_with_the_time_that_is_spent(shop: Shop) -> None:
    """A later transaction of the task gets what is left, and no session variable outlives the task."""

    @shop.task(bind=True, time_limit=100)
    def work(self: SessionTask) -> tuple[str, str]:
        query = text(_TIMEOUT[shop.database.name])
        first = self.session.execute(query).scalar_one()
        self.session.execute(text(_SLEEP[shop.database.name].replace("20", "0.2")))
        self.session.commit()
        return str(first), str(self.session.execute(query).scalar_one())

    first, second = (_seconds(value) for value in shop.trace(work).value)

    assert second <= first - 0.2
    assert _timeout_of_next_task(shop) in ("0", "0.0", "0E-6", "0.000000")


@pytest.mark.databases(*SERVERS)
def test_task_without_a_limit_has_no_statement_time_out(shop: Shop) -> None:
    """Nothing is sent for it."""
    assert _timeout_of_next_task(shop) in ("0", "0.0", "0E-6", "0.000000")


@pytest.mark.databases(*SERVERS)
def test_direct_and_eager_calls_are_not_limited(shop: Shop) -> None:
    """No worker will kill them, so neither does the server."""

    @shop.task(bind=True, time_limit=1000)
    def work(self: SessionTask) -> str:
        return str(self.session.execute(text(_TIMEOUT[shop.database.name])).scalar_one())

    assert _seconds(work()) == _seconds(work.apply().get()) == 0


def _timeout_of_next_task(shop: Shop) -> str:
    @shop.task(name="next")
    def ask(session: Session) -> str:
        return str(session.execute(text(_TIMEOUT[shop.database.name])).scalar_one())

    return str(shop.trace(ask).value)


def _seconds(value: Any) -> float:
    """Return a server's answer, such as 1000, 19999ms, 1000s or 990000ms, as seconds."""
    answer = str(value)
    for unit, factor in (("ms", 0.001), ("min", 60.0), ("s", 1.0), ("h", 3600.0)):
        if answer.endswith(unit):
            return float(answer.removesuffix(unit)) * factor
    return float(answer)
