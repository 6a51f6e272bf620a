"""The test harness keeps its own promises: real workers on every broker and pool, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from threading import Thread
from typing import Any

import psutil
import pytest
from sqlalchemy import create_engine, text

from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually
from tests.workers import Pool

Run = Callable[..., Any]


@pytest.mark.databases("sqlite")
def test_worker_answers_on_every_broker(start_worker: StartWorker, run: Run, broker: Broker, database: Database) -> None:
    """A prefork worker runs a task and its result comes back, whatever the broker."""
    worker = start_worker("tests.apps.plain")

    assert run("add", 19, 23) == 42
    assert run("process_id") in worker.child_pids()
    assert broker.pending() == 0


@pytest.mark.brokers("filesystem")
def test_worker_reaches_the_database_of_its_test(start_worker: StartWorker, run: Run, database: Database) -> None:
    """The URL that the test has is the one that the worker's tasks connect to."""
    start_worker("tests.apps.plain", pool="solo")

    assert run("answer") == 42


@pytest.mark.brokers("redis")
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent", "eventlet"])
def test_worker_answers_in_every_pool(start_worker: StartWorker, run: Run, pool: Pool) -> None:
    """Each of Celery's pools runs a task."""
    worker = start_worker("tests.apps.plain", pool=pool, concurrency=2)

    assert run("add", 1, 2) == 3
    assert len(worker.child_pids()) == (2 if pool == "prefork" else 0)


@pytest.mark.brokers("filesystem")
def test_killed_worker_leaves_no_process_behind(start_worker: StartWorker) -> None:
    """SIGKILL of the main process alone orphans the children; stopping the worker ends them too."""
    worker = start_worker("tests.apps.plain", concurrency=2)
    pids = [worker.pid, *worker.child_pids()]

    worker.send_signal(signal.SIGKILL)
    code = worker.stop()

    assert code == -signal.SIGKILL
    assert len(pids) == 3
    eventually(lambda: not any(_is_up(pid) for pid in pids), what="all three processes are gone")


@pytest.mark.brokers("filesystem")
def test_stopped_worker_can_start_again(start_worker: StartWorker, run: Run) -> None:
    """A warm shutdown ends with code 0 and the same worker takes tasks again after a new start."""
    worker = start_worker("tests.apps.plain", pool="solo")

    code = worker.stop()
    worker.start()

    assert code == 0
    assert run("add", 2, 2) == 4


@pytest.mark.brokers("filesystem")
def test_worker_that_cannot_start_shows_its_log(start_worker: StartWorker) -> None:
    """An app module that does not exist fails at once, with Celery's own words."""
    with pytest.raises(RuntimeError, match=r"tests\.apps\.nowhere was not found"):
        start_worker("tests.apps.nowhere")


def test_database_counts_open_transactions_of_others(database: Database) -> None:
    """A transaction that writes is seen while it is open, and no longer."""
    database.execute("CREATE TABLE book (id INTEGER PRIMARY KEY)")
    engine = create_engine(database.url)

    with engine.connect() as connection:
        connection.execute(text("INSERT INTO book VALUES (1)"))
        during = database.transactions()
        connection.commit()
    engine.dispose()

    assert during == 1
    assert eventually(lambda: database.transactions() == 0)
    assert database.rows("SELECT id FROM book") == [(1,)]


def test_who_asks_often_sees_that_a_transaction_has_ended(database: Database) -> None:
    """The count is of now, though it was asked for a moment ago: MariaDB's table of transactions is a copy."""
    database.execute("CREATE TABLE book (id INTEGER PRIMARY KEY)")
    engine = create_engine(database.url)

    with engine.connect() as connection:
        connection.execute(text("INSERT INTO book VALUES (1)"))
        during = database.transactions()
        connection.rollback()
        assert eventually(lambda: database.transactions() == 0, timeout=2, interval=0.001)
    engine.dispose()

    assert during == 1


@pytest.mark.databases("postgresql", "mariadb")
def test_database_counts_the_statements_that_wait_for_a_lock(database: Database) -> None:
    """None before one waits, one while it waits, and none after it has what it wanted."""
    database.execute("CREATE TABLE book (id INTEGER PRIMARY KEY)")
    database.execute("INSERT INTO book VALUES (1)")
    engine = create_engine(database.url)

    before = database.waiting_for_a_lock()
    with engine.connect() as holder:
        holder.execute(text("UPDATE book SET id = 2"))
        waiting = Thread(target=database.execute, args=("UPDATE book SET id = 3",))
        waiting.start()
        during = eventually(database.waiting_for_a_lock, interval=0.001)
        holder.rollback()
    waiting.join()
    engine.dispose()

    assert (before, during, database.waiting_for_a_lock()) == (0, 1, 0)


@pytest.mark.databases("postgresql", "postgresql+psycopg2", "mariadb")
def test_database_cuts_the_connections_of_others(database: Database) -> None:
    """The next statement on a cut connection fails, and the server no longer lists it."""
    engine = create_engine(database.url)
    connection = engine.connect()
    connection.execute(text("SELECT 1"))

    cut = database.disconnect_others()

    assert cut == 1
    assert eventually(lambda: database.connections() == [])
    with pytest.raises(Exception, match=r"terminat|closed|Lost|gone away"):
        connection.execute(text("SELECT 1"))
    connection.close()
    engine.dispose()


def test_database_is_empty_at_the_start_of_each_test(database: Database) -> None:
    """A table of the test before, of the same name, is gone."""
    database.execute("CREATE TABLE book (id INTEGER PRIMARY KEY)")

    assert database.scalar("SELECT count(*) FROM book") == 0


def test_eventually_says_what_it_waited_for_and_saw() -> None:
    """The failure of a wait names the promise and the last value."""
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the queue is empty; last seen: 0"):
        eventually(lambda: 0, timeout=0.05, what="the queue is empty")


def _is_up(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and os.getpgid(pid) > 0
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
