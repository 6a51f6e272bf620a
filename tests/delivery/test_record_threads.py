"""What a worker's parent records, it records beside its main loop: no lock of anybody's stops the time limits of other tasks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.exceptions import TimeLimitExceeded
from sqlalchemy import text

from celery_alchemy import Alchemy
from celery_alchemy.sessions import fork_lock as forking
from celery_alchemy.sessions.background import Background
from celery_alchemy.worker.boot_steps import RecordStep
from celery_alchemy.worker.parent import SessionRequest
from celery_alchemy.worker.record_threads import MOST_THREADS, record_threads
from tests.conftest import StartWorker
from tests.delivery.outbox_stand import Base, OutboxStand
from tests.delivery.test_once import start
from tests.delivery.test_once_in_parent import in_parent
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

SERVERS = pytest.mark.databases("postgresql", "mariadb")


@contextmanager
def locked_row(database: Database) -> Iterator[None]:
    """Hold the lock of a row, as somebody's open transaction does."""
    database.execute("DELETE FROM effect")
    database.execute("INSERT INTO effect (name) VALUES ('locked')")
    with database.engine.connect() as connection:
        connection.execute(text("UPDATE effect SET name = 'locked' WHERE name = 'locked'"))
        yield
        connection.rollback()


@SERVERS
@pytest.mark.brokers("redis", "rabbitmq")
@pytest.mark.parametrize("name", ["slow", "slow.once", "dies"])
def test_time_limits_go_on_while_a_record_waits_for_a_lock(
    start_worker: StartWorker, database: Database, broker: Broker, name: str
) -> None:
    """Another task is ended at its own limit; the record is there when the lock is gone."""
    Base.metadata.create_all(database.engine)
    alchemy = Alchemy(broker.app("tables"), database.url)
    alchemy.create_tables()
    alchemy.engine.dispose()
    with locked_row(database):
        start_worker("tests.delivery.parent_app", pool="prefork", concurrency=2)
        broker.client.send_task(name)
        with pytest.raises(TimeLimitExceeded):
            broker.client.send_task("other").get(timeout=20, interval=0.05)
        with pytest.raises(TimeLimitExceeded):
            broker.client.send_task("other").get(timeout=20, interval=0.05)
        before = database.rows("SELECT name FROM effect")

    recorded = "WorkerLostError" if name == "dies" else "TimeLimitExceeded"
    assert before == [("locked",)]
    eventually(lambda: database.rows("SELECT name FROM effect") == [(recorded,)], what="the end is recorded")


def ends(stand: OutboxStand, how: str, record: Callable[..., None]) -> Any:
    """Make a once task whose record waits, and the request of its end; return what ends it."""

    @stand.task(name="ends", once=True, record_failure=record)
    def ends_once() -> None: ...

    sent = start(stand, ends_once)
    if how == "expired":
        sent.headers["expires"] = "2020-01-01T00:00:00+00:00"
    request, to_broker = in_parent(stand, sent, SessionRequest)
    acts = {
        "limit": lambda: request.on_timeout(soft=False, timeout=1),
        "expired": request.revoked,
    }
    return acts[how], to_broker


@SERVERS
@pytest.mark.parametrize("how", ["limit", "expired"])
def test_main_loop_does_not_wait_for_the_row_of_the_task(stand: OutboxStand, database: Database, how: str) -> None:
    """The message is acknowledged when the end is recorded, and not before."""
    act, to_broker = ends(stand, how, lambda session, exc: None)
    with database.engine.connect() as connection:
        connection.execute(text("UPDATE celery_outbox SET sends = 1"))
        began = time.monotonic()
        act()
        took = time.monotonic() - began
        while_locked = list(to_broker)
        connection.rollback()
    assert record_threads.drain(30)

    assert took < 5
    assert while_locked == []
    assert to_broker == ["acknowledged"]
    assert len(stand.outbox("died_at")) == 1
    assert None not in stand.outbox("died_at")


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("method", ["close", "stop", "terminate"])
def test_worker_that_stops_waits_for_what_is_being_recorded(stand: OutboxStand, method: str) -> None:
    """An end that the parent has seen is not lost with it."""
    may_go_on, told = threading.Event(), []

    def record(session: Any, exc: BaseException) -> None:
        may_go_on.wait(30)
        told.append(type(exc).__name__)

    act, _ = ends(stand, "limit", record)
    act()
    threading.Timer(0.2, may_go_on.set).start()
    step: Any = RecordStep.__new__(RecordStep)
    getattr(step, method)(None)

    assert told == ["TimeLimitExceeded"]


@pytest.mark.databases("postgresql")
def test_record_that_waits_for_ever_is_given_up(stand: OutboxStand, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database ends its statements; the request comes to its end, and the thread is free."""
    monkeypatch.setattr("celery_alchemy.worker.parent.RECORD_SECONDS", 1.0)
    act, to_broker = ends(stand, "limit", lambda session, exc: None)
    with database.engine.connect() as connection:
        connection.execute(text("UPDATE celery_outbox SET sends = 1"))
        act()
        ended = record_threads.drain(30)
        connection.rollback()

    assert ended
    assert to_broker == ["acknowledged"]


def test_many_records_wait_side_by_side_and_none_is_lost() -> None:
    """One that waits does not hold up the next; their number is bounded, their order is that of their ends."""
    threads, may_go_on = Background("tests", "A test", MOST_THREADS), threading.Event()
    done: list[int] = []
    for _ in range(3):
        threads.run(lambda: may_go_on.wait(30))
    for number in range(20):
        threads.run(lambda number=number: done.append(number))  # type: ignore[misc]
    threads.run(lambda: 1 / 0)

    eventually(lambda: len(done) == 20, what="the others are recorded")
    drained_early = threads.drain(0.01)
    may_go_on.set()

    assert done == list(range(20))
    assert not drained_early
    assert threads.drain(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_fork_waits_a_moment_for_a_thread_in_a_database_library_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main loop forks, and all time limits wait with it; the child is not held up by what its parent's thread held."""
    may_go_on, inside = threading.Event(), threading.Event()

    def work() -> None:
        with forking.fork_guard:
            inside.set()
            may_go_on.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        with forking.fork_guard:
            os._exit(7)
    took = time.monotonic() - began
    _, status = os.waitpid(pid, 0)
    may_go_on.set()
    thread.join(30)

    assert os.waitstatus_to_exitcode(status) == 7
    assert forking.FORK_WAIT_SECONDS * 0.9 <= took < 20


@pytest.mark.parametrize("others", [0, 1])
def test_work_is_done_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """At the interpreter's end, or on a machine without room: by the caller, or by a thread that is there; nobody waits in vain."""
    threads, may_go_on = Background("tests", "A test", MOST_THREADS), threading.Event()
    done: list[int] = []
    for _ in range(others):
        threads.run(lambda: may_go_on.wait(30))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        threads.run(lambda: done.append(1))
        may_go_on.set()
    drained = threads.drain(5)

    assert done == [1]
    assert drained
    threads.run(lambda: done.append(2))
    assert threads.drain(5)
    assert done == [1, 2]
