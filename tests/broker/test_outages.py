"""Real workers whose database is cut while tasks run: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Queue
from sqlalchemy import NullPool, create_engine, event, text

from tests.broker.lines import Line
from tests.conftest import StartWorker
from tests.delivery.proxy import CommitProxy
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually
from tests.workers import Pool

pytestmark = pytest.mark.brokers("alchemy")

#: A worker whose Alchemy is the broker has its URL from there.
OWN = {"broker_url": "alchemy://"}


@pytest.fixture
def proxy(database: Database, broker: Broker) -> Iterator[CommitProxy]:
    """What workers reach the database by; the test's own client goes past it."""
    direct = database.url
    with CommitProxy(direct) as proxy:
        database.url = proxy.url
        yield proxy
        database.url = direct


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_once_tasks_of_an_outage_run_again(
    start_worker: StartWorker,
    proxy: CommitProxy,
    broker: Broker,
    database: Database,
    tmp_path: Path,
    pool: Pool,
) -> None:
    """One is cut off in mid-body, the next cannot even be begun; both are done when it is over."""
    marks, gate = tmp_path / "marks", tmp_path / "gate"
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    worker = start_worker("tests.broker.app", pool=pool, settings=OWN)
    results = [broker.client.send_task("write at the gate", (name, str(marks), str(gate))) for name in ("first", "second")]
    eventually(marks.exists, what="the first one has begun")
    reserved = "SELECT id FROM celery_outbox WHERE claim IS NOT NULL"
    eventually(lambda: len(database.rows(reserved)) == 2, what="the second one is reserved")

    proxy.go_away()
    gate.touch()
    worker.wait_for_log("Messages cannot be taken now")
    eventually(lambda: worker.log.count("reject requeue=True") == 2, what="both have been put back")
    proxy.come_back()

    values = [result.get(timeout=60, interval=0.02) for result in results]
    assert values == ["first", "second"]
    assert sorted(database.rows("SELECT name FROM effect")) == [("first",), ("second",)]
    unfinished = "SELECT id FROM celery_outbox WHERE completed_at IS NULL"
    eventually(lambda: database.rows(unfinished) == [], what="no message waits, and none is dead")


@pytest.mark.databases("postgresql")
def test_worker_goes_on_after_its_database_has_only_read(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """As after a failover, or with a full disk: what runs goes back to its queue meanwhile."""
    marks, gate = tmp_path / "marks", tmp_path / "gate"
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    worker = start_worker("tests.broker.app", settings=OWN)
    result = broker.client.send_task("write at the gate", ("first", str(marks), str(gate)))
    eventually(marks.exists, what="it has begun")
    name = database.engine.url.database

    database.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    database.disconnect_others()
    worker.wait_for_log("in a read-only transaction")
    gate.touch()
    worker.wait_for_log("reject requeue=True")
    server = create_engine(database.engine.url.set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with server.connect() as connection:
        connection.execute(text(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'))

    assert result.get(timeout=60, interval=0.02) == "first"
    assert broker.client.send_task("add", (1, 2)).get(timeout=60, interval=0.02) == 3


@pytest.mark.databases("postgresql")
def test_connection_that_only_reads_is_not_taken_with_again(line: Line) -> None:
    """A worker that got one on a server that is a standby now would take nothing, for ever."""
    jobs = Queue("jobs")
    line.send(jobs)
    home = line.channel.connection.home
    standby: list[object] = []

    def connect(driver_connection: Any, record: object) -> None:
        if "taker" in threading.current_thread().name and not standby:
            standby.append(driver_connection)
            driver_connection.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
            driver_connection.commit()

    # The engine that takes has the listeners of this one.
    event.listen(home.engine(), "connect", connect)
    with line.consuming(jobs) as heard:
        assert heard.wait_for(1, timeout=15)
    assert len(standby) == 1


def test_message_that_is_cut_off_is_due_later_each_time(line: Line, database: Database) -> None:
    """Its row says why it went back."""
    jobs = Queue("jobs")
    line.send(jobs)
    database.execute("UPDATE celery_outbox SET failures = 3")
    message: Any = line.take(jobs)

    message.channel.deliveries.put_off(message.delivery_tag, "the server was gone")
    message.reject(requeue=True)

    query = "SELECT error, failures FROM celery_outbox WHERE claim IS NULL"
    assert eventually(lambda: database.rows(query)) == [("the server was gone", 4)]
    assert line.take(jobs) is None
    # Sixteen seconds: measured by the clock that the database keeps.
    late = {
        "sqlite": "strftime('%s', due_at) - strftime('%s', 'now')",
        "postgresql": "extract(epoch FROM due_at - clock_timestamp())",
        "mariadb": "timestampdiff(second, utc_timestamp(), due_at)",
    }[database.name]
    [(seconds,)] = database.rows(f"SELECT {late} FROM celery_outbox")
    assert 5 < float(seconds) <= 16


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_worker_goes_on_after_tasks_that_ended_in_an_outage(
    start_worker: StartWorker, proxy: CommitProxy, broker: Broker, database: Database, tmp_path: Path, pool: Pool
) -> None:
    """Their results are written when it is over, and what was sent later is done: none keeps a place of the worker's."""
    marks, gate = tmp_path / "marks", tmp_path / "gate"
    client = broker.app("results-client")
    client.conf.result_backend = broker.settings["broker_url"]
    settings = {**OWN, "result_backend": None}
    worker = start_worker("tests.broker.app", pool=pool, settings=settings, arguments=["--prefetch-multiplier=1"])
    [ended, fails] = [client.send_task(name, (str(marks), str(gate))) for name in ("end at the gate", "fail at the gate")]
    eventually(marks.exists, what="the first one has begun")

    proxy.go_away()
    gate.touch()
    worker.wait_for_log("waits for the database")
    proxy.come_back()

    assert ended.get(timeout=30, interval=0.02) == "ended"
    with pytest.raises(ValueError, match="gate"):
        fails.get(timeout=30, interval=0.02)
    assert client.send_task("add", (1, 2)).get(timeout=30, interval=0.02) == 3
    [(error,)] = database.rows("SELECT error FROM celery_outbox WHERE died_at IS NOT NULL")
    assert error == "ValueError: at the gate"
