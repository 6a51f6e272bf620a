"""isolation_level, read_only and the time limit of a task hold for its transaction, and for nobody else's."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction

from celery_alchemy import SessionTask
from tests.unit.conftest import InWorker, MakeShop
from tests.unit.shop import Book, Shop, add_books
from tests.waiting import eventually

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


@pytest.mark.databases("sqlite")
def test_read_only_task_does_not_wait_for_a_writer(shop: Shop) -> None:
    """SQLite has one writer at a time; who only reads sees what was committed before, in every transaction."""
    shop.database.execute("INSERT INTO book (title) VALUES ('Emma')")

    @shop.task(name="report", read_only=True)
    def report(session: Session) -> list[int]:
        first = len(session.query(Book).all())
        session.commit()
        return [first, len(session.query(Book).all())]

    started = monotonic()
    with shop.alchemy.session() as writer:
        add_books(writer, ["Persuasion"])
        counted = report()
        writer.commit()

    assert counted == [1, 1]
    # The busy time-out is 30 s.
    assert monotonic() - started < 20
    assert report() == [2, 2]


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
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_limit_that_nobody_enforces_is_none_when_it_is_over(shop: Shop, in_worker: InWorker, pool: str) -> None:
    """Celery lets the body go on in these pools, and so do its later transactions."""
    in_worker(pool, 2)

    @shop.task(bind=True, time_limit=0.2)
    def work(self: SessionTask) -> str:
        started = monotonic()
        eventually(lambda: monotonic() > started + 0.3)
        return str(self.session.execute(text(_TIMEOUT[shop.database.name])).scalar_one())

    @shop.task(bind=True, time_limit=100)
    def in_time(self: SessionTask) -> str:
        return str(self.session.execute(text(_TIMEOUT[shop.database.name])).scalar_one())

    assert _seconds(shop.trace(work).value) == 0
    assert 90 < _seconds(shop.trace(in_time).value) <= 100


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


#: How a connection gets a limit of its own of 5 s, when it is opened.
_STRICT: dict[str, Any] = {
    "postgresql": {"options": "-c statement_timeout=5s"},
    "mariadb": {"init_command": "SET SESSION max_statement_time = 5"},
}


@pytest.mark.databases(*SERVERS)
def test_stricter_limit_of_the_connection_stays(make_shop: MakeShop) -> None:
    """An hour for the task does not give an hour to each statement; what was set before is there for the next task."""
    name = make_shop().database.name
    shop = make_shop(engine_options={"connect_args": _STRICT[name], "pool_size": 1, "max_overflow": 0})

    @shop.task(bind=True)
    def work(self: SessionTask) -> tuple[str, str]:
        query = text(_TIMEOUT[name])
        first = self.session.execute(query).scalar_one()
        self.session.commit()
        return str(first), str(self.session.execute(query).scalar_one())

    wide = shop.trace(work, request={"timelimit": [3600, None]}).value
    after_wide = _timeout_of_next_task(shop)
    narrow = shop.trace(work, request={"timelimit": [2, None]}).value
    after_narrow = _timeout_of_next_task(shop, "next but one")

    assert [_seconds(value) for value in wide] == [5, 5]
    assert all(0 < _seconds(value) <= 2 for value in narrow)
    assert _seconds(after_wide) == _seconds(after_narrow) == 5


@pytest.mark.databases("postgresql")
def test_stricter_limit_of_a_listener_stays(shop: Shop) -> None:
    """Of one that ran before, in the same transaction."""

    def limit(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        connection.execute(text("SET LOCAL statement_timeout = 3000"))

    @shop.task(bind=True, time_limit=3600)
    def work(self: SessionTask) -> str:
        return str(self.session.execute(text(_TIMEOUT["postgresql"])).scalar_one())

    event.listen(Session, "after_begin", limit)
    try:
        value = shop.trace(work).value
    finally:
        event.remove(Session, "after_begin", limit)

    assert _seconds(value) == 3


@pytest.mark.databases("postgresql")
def test_limit_is_no_query(shop: Shop) -> None:
    """A body may begin with what has to come before any query."""

    @shop.task(bind=True, time_limit=3600)
    def work(self: SessionTask) -> str:
        self.session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        return str(self.session.execute(text("SHOW transaction_isolation")).scalar_one())

    assert shop.trace(work).value == "serializable"


@pytest.mark.databases(*SERVERS_AND_PSYCOPG2)
def test_limit_holds_in_autocommit(make_shop: MakeShop) -> None:
    """There is no transaction that would end it: what was set before is put back when the connection is given back."""
    name = make_shop().database.name
    shop = make_shop(engine_options={"pool_size": 1, "max_overflow": 0})

    @shop.task(name="vacuum", bind=True, time_limit=100, isolation_level="AUTOCOMMIT")
    def vacuum(self: SessionTask) -> tuple[str, str]:
        query = text(_TIMEOUT[name])
        first = self.session.execute(query).scalar_one()
        self.session.commit()
        return str(first), str(self.session.execute(query).scalar_one())

    first, second = (_seconds(value) for value in shop.trace(vacuum).value)

    assert 90 < second <= first <= 100
    assert _seconds(_timeout_of_next_task(shop)) == 0


def _timeout_of_next_task(shop: Shop, name: str = "next") -> str:
    @shop.task(name=name)
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
