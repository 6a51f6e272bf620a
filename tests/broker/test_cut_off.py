"""A `once` task whose database is cut goes back to its queue, and so does a retry that cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import BackendStoreError, Reject, Retry
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import step
from celery_alchemy.databases import trying_again
from celery_alchemy.requests import failure, once, put_back
from celery_alchemy.requests.put_back import PutBack
from tests.broker.broker_stand import BrokerStand, write
from tests.delivery.proxy import CommitProxy
from tests.services.databases import Database
from tests.stand import tracer_of

pytestmark = pytest.mark.databases("postgresql", "mariadb")

WRITE = text("INSERT INTO effect (name) VALUES ('written')")


#: For all later transactions of a connection.
_READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}


def store(session: Session) -> None:
    session.execute(WRITE)


class OwnError(Exception):
    """What a body makes of the database's error."""


def ended(stand: BrokerStand, task: Any, **request: Any) -> Any:
    """Deliver a task as a worker's child does; return what it tells the parent: a value or an error."""
    told = stand.trace(task, request=request).told
    raised = getattr(told, "exception", told)
    # One that has a traceback is wrapped on its way to the parent.
    return getattr(raised, "exc", raised)


def effects(stand: BrokerStand) -> list[str]:
    return [row[0] for row in stand.database.rows("SELECT name FROM effect")]


def let_through(session: Session, cut: Callable[[], object]) -> None:
    """The database's error comes out of the body."""
    session.execute(WRITE)
    cut()
    session.execute(WRITE)


def own_error(session: Session, cut: Callable[[], object]) -> None:
    """The body raises an error of its own, from that of the database."""
    cut()
    try:
        session.execute(WRITE)
    except DBAPIError as exc:
        raise OwnError from exc


def own_error_meanwhile(session: Session, cut: Callable[[], object]) -> None:
    """As before, without saying what it comes from."""
    cut()
    try:
        session.execute(WRITE)
    except DBAPIError:
        raise OwnError  # noqa: B904 - this is the case.


def swallow(session: Session, cut: Callable[[], object]) -> None:
    """The body goes on as if nothing had happened."""
    cut()
    with suppress(DBAPIError):
        session.execute(WRITE)
    session.execute(WRITE)


def at_commit(session: Session, cut: Callable[[], object]) -> None:
    """The database is gone when the body has ended."""
    session.execute(WRITE)
    cut()


def in_step(session: Session, cut: Callable[[], object]) -> None:
    """A step is cut off."""

    def store(session: Session) -> None:
        session.execute(WRITE)
        cut()
        session.execute(WRITE)

    step("store", store)


@pytest.mark.parametrize("body", [let_through, own_error, own_error_meanwhile, swallow, at_commit, in_step])
def test_once_task_that_is_cut_off_goes_back(stand: BrokerStand, database: Database, body: Any) -> None:
    """Whatever the body makes of it; nothing of it is there, and its end is not recorded."""

    def run(session: Session) -> None:
        session.execute(text("SELECT 1"))
        body(session, database.disconnect_others)

    told = ended(stand, stand.task(run, once=True))

    assert type(told) is PutBack, told
    assert told.requeue
    assert effects(stand) == []
    assert stand.rows() == []
    assert database.rows("SELECT id FROM celery_outbox WHERE died_at IS NOT NULL") == []


def test_async_once_task_that_is_cut_off_goes_back(stand: BrokerStand, database: Database) -> None:
    """By the same rule."""

    async def run(session: AsyncSession) -> None:
        await session.execute(WRITE)
        database.disconnect_others()
        await session.execute(WRITE)

    told = ended(stand, stand.task(run, once=True))

    assert type(told) is PutBack, told
    assert effects(stand) == []


def demote_the_first(stand: BrokerStand) -> None:
    """Have the next connection of the tasks' engine lead to a server that only reads since a failover."""
    is_standby = [True]
    stand.alchemy.engine.dispose()

    def connect(driver_connection: Any, record: object) -> None:
        if is_standby.pop():
            cursor = driver_connection.cursor()
            cursor.execute(_READ_ONLY[stand.database.name])
            cursor.close()
            driver_connection.commit()
        is_standby.append(False)

    event.listen(stand.alchemy.engine, "connect", connect)


@pytest.mark.parametrize("body", [lambda session: session.execute(WRITE), lambda session: step("write", store), lambda session: None])
def test_once_task_goes_back_where_the_database_only_reads(stand: BrokerStand, body: Any) -> None:
    """Since a failover, for a while: as one whose database is cut. The next delivery does it, on another connection."""

    def run(session: Session) -> str:
        session.execute(text("SELECT 1"))
        body(session)
        return "done"

    task = stand.task(run, once=True)
    demote_the_first(stand)

    assert type(ended(stand, task, id="1")) is PutBack
    assert stand.database.rows("SELECT id FROM celery_outbox WHERE died_at IS NOT NULL") == []
    stand.trace(task, request={"id": "1"})
    assert [(status, id_) for status, id_ in stand.rows("status, id")] == [("SUCCESS", "1")]


def test_error_from_none_stands_for_itself(stand: BrokerStand, database: Database) -> None:
    """The body has said that the database has nothing to do with it."""

    def run(session: Session) -> None:
        session.execute(text("SELECT 1"))
        database.disconnect_others()
        try:
            session.execute(WRITE)
        except DBAPIError:
            raise OwnError from None

    assert type(ended(stand, stand.task(run, once=True))) is OwnError


def test_plain_task_that_is_cut_off_fails(stand: BrokerStand, database: Database) -> None:
    """As it does by hand: somebody else may have seen what it did."""

    def run(session: Session) -> None:
        let_through(session, database.disconnect_others)

    assert isinstance(ended(stand, stand.task(run)), DBAPIError)
    assert stand.rows() == [("FAILURE",)]


def test_other_error_of_a_once_task_is_its_end(stand: BrokerStand) -> None:
    """What the database says of a statement will not pass."""

    def run(session: Session) -> None:
        session.execute(text("SELECT nothing FROM nowhere"))

    assert isinstance(ended(stand, stand.task(run, once=True)), DBAPIError)
    assert stand.rows() == [("FAILURE",)]


def test_asked_for_retry_wins(stand: BrokerStand, database: Database) -> None:
    """Both the body's own and Celery's `autoretry_for`."""

    def run(self: Any, session: Session) -> None:
        try:
            let_through(session, database.disconnect_others)
        except DBAPIError as exc:
            self.retry(exc=exc, countdown=60)

    def run_again(session: Session) -> None:
        let_through(session, database.disconnect_others)

    own = stand.task(run, once=True, bind=True)
    by_celery = stand.task(run_again, once=True, autoretry_for=(DBAPIError,))

    assert isinstance(ended(stand, own), Retry)
    assert isinstance(ended(stand, by_celery), Retry)


def test_transient_retries_come_first(stand: BrokerStand, database: Database) -> None:
    """The body runs again at once; only when it may no more does the delivery go back."""
    runs: list[int] = []

    def run(session: Session) -> None:
        runs.append(1)
        let_through(session, database.disconnect_others)

    assert type(ended(stand, stand.task(run, once=True, transient_retries=2))) is PutBack
    assert len(runs) == 3


def test_direct_call_raises(stand: BrokerStand, database: Database) -> None:
    """It has no message that could go back."""

    def run(session: Session) -> None:
        let_through(session, database.disconnect_others)

    with pytest.raises(DBAPIError):
        stand.task(run, once=True)()


def test_dead_task_says_what_has_cut_it_off(stand: BrokerStand, database: Database) -> None:
    """After so many starts it is set aside, with the last error."""
    task = stand.task(write, once=True)
    with stand.alchemy.begin():
        result = task.delay_on_commit("a")
    database.execute("UPDATE celery_outbox SET deliveries = 5, error = 'the server was gone'")
    request = {"id": result.id, "celery_alchemy_row": result.id, "delivery_info": {"redelivered": True}}

    stand.result_of(task, "a", **request)

    [(error,)] = database.rows("SELECT error FROM celery_outbox WHERE died_at IS NOT NULL")
    assert error == ("it was started 5 times, and each time its process died or its database was cut: the server was gone")


@pytest.fixture
def proxy(database: Database) -> Iterator[CommitProxy]:
    """What the app reaches its database by, and what can go away."""
    with CommitProxy(database.url) as proxy:
        database.url = proxy.url
        yield proxy


@pytest.fixture
def fail(proxy: CommitProxy, stand: BrokerStand) -> Callable[[bool], Any]:
    """Make the body of a task whose retry finds no database."""

    def make(asks: bool) -> Any:
        def run(self: Any, session: Session) -> None:
            session.execute(text("SELECT 1"))
            proxy.go_away()
            raise self.retry(countdown=1) if asks else OwnError

        return run

    return make


#: Asked for by the body, or by Celery.
ASKED = pytest.mark.parametrize(("asks", "autoretry_for"), [(True, ()), (False, (OwnError,))])


@ASKED
@pytest.mark.parametrize("options", [{"once": True}, {"acks_late": True}], ids=str)
def test_retry_that_cannot_be_written_puts_the_delivery_back(
    proxy: CommitProxy, stand: BrokerStand, fail: Any, asks: bool, autoretry_for: Any, options: Any
) -> None:
    """The task's own message is still in the table."""
    task = stand.task(fail(asks), bind=True, autoretry_for=autoretry_for, **options)

    told = ended(stand, task)

    assert type(told) is PutBack, told
    assert told.requeue


@ASKED
def test_retry_of_an_acknowledged_task_is_insisted_on(
    proxy: CommitProxy,
    stand: BrokerStand,
    fail: Any,
    asks: bool,
    autoretry_for: Any,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its message is gone, so that the retry waits for the database."""
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        proxy.come_back()

    monkeypatch.setattr(trying_again, "sleep", wait)
    task = stand.task(fail(asks), bind=True, autoretry_for=autoretry_for)

    told = ended(stand, task)

    assert isinstance(told, Retry)
    assert len(waits) == 1
    assert database.rows("SELECT task_name FROM celery_outbox") == [(task.name,)]


@ASKED
def test_retry_is_given_up_when_the_database_stays_away(
    proxy: CommitProxy,
    stand: BrokerStand,
    fail: Any,
    asks: bool,
    autoretry_for: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is rejected for good then, as Celery does it."""
    monkeypatch.setattr(put_back, "INSIST_SECONDS", 0.0)

    told = ended(stand, stand.task(fail(asks), bind=True, autoretry_for=autoretry_for))

    assert isinstance(told, Reject)
    assert not told.requeue


def told_to_the_pool(stand: BrokerStand, task: Any) -> Any:
    """Deliver a task by the tracer that the worker has set on it; return its value, or the error."""
    task.__trace__ = tracer_of(stand.app, task)
    request = {"id": task.name, "task": task.name, "args": (), "kwargs": {}, "delivery_info": {"routing_key": "celery"}}
    told, info, *_ = task.__trace__(task.name, (), {}, request)
    raised = getattr(told, "exception", told) if info else told
    return getattr(raised, "exc", raised)


@pytest.fixture
def waits(proxy: CommitProxy, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note how often the database was waited for; it is back after the second time."""
    found: list[float] = []

    def wait(seconds: float) -> None:
        found.append(seconds)
        if len(found) == 2:
            proxy.come_back()

    monkeypatch.setattr(trying_again, "sleep", wait)
    return found


def test_result_is_insisted_on(proxy: CommitProxy, stand: BrokerStand, waits: list[float]) -> None:
    """A task has ended while the database was away."""

    def run() -> str:
        proxy.go_away()
        return "done"

    task = stand.task(run, acks_late=True, name="runs")

    assert told_to_the_pool(stand, task) == "done"
    assert len(waits) == 2
    assert stand.rows() == [("SUCCESS",)]


@pytest.mark.parametrize("records", [False, True], ids=["alone", "with record_failure"])
def test_death_is_insisted_on(
    proxy: CommitProxy, stand: BrokerStand, waits: list[float], database: Database, monkeypatch: pytest.MonkeyPatch, records: bool
) -> None:
    """A once task fails for good while the database is away."""

    def run(session: Session) -> None:
        proxy.go_away()
        raise OwnError

    def record(session: Session, exc: BaseException) -> None:
        session.execute(WRITE)

    task = stand.task(run, once=True, name="fails", record_failure=record if records else None)

    assert isinstance(told_to_the_pool(stand, task), OwnError)
    assert stand.rows() == [("FAILURE",)]
    [(error,)] = database.rows("SELECT error FROM celery_outbox WHERE died_at IS NOT NULL")
    assert error.startswith("OwnError")
    assert effects(stand) == (["written"] if records else [])


def test_death_of_an_async_task_is_insisted_on(
    proxy: CommitProxy, stand: BrokerStand, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event loop goes on meanwhile."""
    waited: list[float] = []

    async def run(session: AsyncSession) -> None:
        proxy.go_away()
        raise OwnError

    def wait(seconds: float) -> None:
        waited.append(seconds)
        proxy.come_back()

    monkeypatch.setattr(once, "pause", wait)
    monkeypatch.setattr(failure, "pause", wait)
    task = stand.task(run, once=True, name="fails")

    assert isinstance(told_to_the_pool(stand, task), OwnError)
    assert len(waited) == 1
    assert len(database.rows("SELECT id FROM celery_outbox WHERE died_at IS NOT NULL")) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
@pytest.mark.parametrize("options", [{"once": True}, {"acks_late": True}], ids=str)
def test_delivery_whose_end_cannot_be_written_goes_back(
    proxy: CommitProxy, stand: BrokerStand, monkeypatch: pytest.MonkeyPatch, options: Any, fails: bool
) -> None:
    """The database stays away: the pool is told so by what the tracer returns, for threads drop what it raises."""
    monkeypatch.setattr(put_back, "INSIST_SECONDS", 0.0)

    def run() -> None:
        proxy.go_away()
        if fails:
            raise OwnError

    told = told_to_the_pool(stand, stand.task(run, name="runs", **options))

    assert type(told) is PutBack, told
    assert told.requeue


def test_state_within_a_body_is_not_insisted_on(proxy: CommitProxy, stand: BrokerStand, waits: list[float]) -> None:
    """The body does not stand still for what may be written anew."""

    def run(self: Any) -> None:
        proxy.go_away()
        try:
            self.update_state(state="HALF")
        finally:
            assert waits == []
            proxy.come_back()

    task = stand.task(run, bind=True, name="runs")

    assert isinstance(told_to_the_pool(stand, task), BackendStoreError)
