"""Real workers on the database as their broker: tasks run, and lost workers are noticed."""

from __future__ import annotations

import os
import signal
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from celery.worker.control import Panel

from tests.broker.app import LOST_SECONDS
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually
from tests.workers import Worker

pytestmark = pytest.mark.brokers("alchemy")

POOLS = ["prefork", "threads", "solo", "gevent"]
#: What a test gives a worker beyond the time after which another one counts as lost.
GRACE_SECONDS = 10.0
#: What is promised.
PROMISED_SECONDS = 5.0
#: How often a worker is killed on each database; more where the promise is measured.
KILLS = int(os.environ.get("TEST_KILLS", "1"))

#: A worker whose Alchemy is the broker has its URL from there.
OWN = {"broker_url": "alchemy://"}


@pytest.fixture
def effects(database: Database) -> Any:
    """The table that tasks write into; returns what is committed."""
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    return lambda: [row[0] for row in database.rows("SELECT name FROM effect ORDER BY name")]


def begun(marks: Path) -> int:
    return len(marks.read_text().splitlines()) if marks.exists() else 0


def nothing_waits(database: Database) -> None:
    query = "SELECT id FROM celery_outbox WHERE completed_at IS NULL AND died_at IS NULL"
    eventually(lambda: database.rows(query) == [], what="no message waits")


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_run_and_their_messages_are_gone(
    start_worker: StartWorker, broker: Broker, database: Database, effects: Any, pool: Any
) -> None:
    """In every pool, in the order of the sending as far as there is one."""
    start_worker("tests.broker.app", pool=pool, concurrency=2, settings=OWN)

    results = [broker.client.send_task("add", (number, 1)) for number in range(20)]
    broker.client.send_task("write", ("written",))

    assert [result.get(timeout=30, interval=0.02) for result in results] == list(range(1, 21))
    eventually(lambda: effects() == ["written"])
    nothing_waits(database)


@pytest.mark.databases("postgresql")
def test_countdown_and_expiry_are_kept(start_worker: StartWorker, broker: Broker, database: Database) -> None:
    """A task runs when it is due, one that is taken too late is revoked."""
    late = broker.client.send_task("add", (1, 1), expires=0.5)
    eventually(
        lambda: database.rows("SELECT 1 WHERE clock_timestamp() > (SELECT max(created_at) FROM celery_outbox) + interval '1 s'")
    )
    start_worker("tests.broker.app", settings=OWN)

    soon = broker.client.send_task("add", (2, 2), countdown=1)

    assert soon.get(timeout=20, interval=0.02) == 4
    eventually(lambda: late.state == "REVOKED")
    nothing_waits(database)


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("pool", POOLS)
def test_task_knows_its_eta(start_worker: StartWorker, broker: Broker, pool: Any) -> None:
    """The worker does not ask its own clock about it: it runs the task at once, also where that clock is slow."""
    start_worker("tests.broker.app", pool=pool, settings=OWN)
    eta = datetime.now(timezone.utc).replace(microsecond=0)

    result = broker.client.send_task("eta", eta=eta)

    assert datetime.fromisoformat(result.get(timeout=20, interval=0.02)) == eta


def test_remote_control_is_answered(start_worker: StartWorker, broker: Broker) -> None:
    """`inspect` reaches the worker, and `control` gives it another queue."""
    worker = start_worker("tests.broker.app", settings=OWN)
    control = broker.client.control
    other = broker.queue("other")

    assert eventually(lambda: control.ping(timeout=1.0)) == [{worker.hostname: {"ok": "pong"}}]
    control.add_consumer(other, reply=True, timeout=2.0)
    result = broker.client.send_task("add", (1, 2), queue=other)

    assert result.get(timeout=20, interval=0.02) == 3


@pytest.mark.databases("postgresql", "sqlite")
def test_every_question_of_inspect_is_answered(start_worker: StartWorker, broker: Broker) -> None:
    """All that `celery inspect` can ask, but for what asks for another package, of which `conf` shows the URLs."""
    worker = start_worker("tests.broker.app", settings=OWN)
    needs_package = {"memsample", "memdump", "objgraph"}
    arguments: dict[str, Any] = {"query_task": {"ids": ["1"]}, "hello": {"from_node": "celery@other"}}
    eventually(lambda: broker.client.control.ping(timeout=1.0), what="the worker listens")
    questions = {name for name, known in Panel.meta.items() if known.type == "inspect"} - needs_package

    answers = {
        question: broker.client.control.broadcast(question, arguments.get(question, {}), reply=True, timeout=10, limit=1)[0][
            worker.hostname
        ]
        for question in questions
    }

    assert {"active", "conf", "registered", "report", "scheduled", "stats"} <= questions
    assert {question: answer for question, answer in answers.items() if "error" in answer} == {}
    assert answers["conf"]["broker_url"] == "alchemy://"


@pytest.mark.databases("postgresql", "sqlite")
def test_events_are_heard(start_worker: StartWorker, broker: Broker) -> None:
    """As by `celery events --dump` and Flower."""
    start_worker("tests.broker.app", settings={**OWN, "worker_send_task_events": True})
    heard: list[str] = []

    with broker.client.connection_for_read() as connection:
        receiver = broker.client.events.Receiver(connection, handlers={"*": lambda event: heard.append(event["type"])})
        with receiver.consumer_context() as (own_connection, *_):

            def has_come() -> bool:
                # A worker asks once a second whether anybody reads.
                broker.client.send_task("add", (1, 2))
                try:
                    while True:
                        own_connection.drain_events(timeout=0.2)
                except TimeoutError:
                    return {"task-received", "task-started", "task-succeeded"} <= set(heard)

            eventually(has_come, what="the events of a task were heard")


@pytest.mark.parametrize("time", range(KILLS))
def test_killed_workers_task_runs_again(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path, record_property: Any, time: int
) -> None:
    """Another worker notices in time, and takes what was not acknowledged."""
    marks = tmp_path / "marks"
    first = start_worker("tests.broker.app", settings=OWN)
    broker.client.send_task("wait", (str(marks), 60))
    eventually(lambda: begun(marks) == 1)
    start_worker("tests.broker.app", settings=OWN)

    first.kill()
    killed_at = monotonic()

    eventually(lambda: begun(marks) == 2, timeout=LOST_SECONDS + PROMISED_SECONDS)
    record_property("seconds", monotonic() - killed_at)


def test_once_task_of_a_killed_worker_is_done_once(
    start_worker: StartWorker, broker: Broker, database: Database, effects: Any, tmp_path: Path
) -> None:
    """Its COMMIT is its acknowledgement, and the row of it stays as the record."""
    start_worker("tests.broker.app", settings=OWN)
    result = broker.client.send_task("write once", ("paid", str(tmp_path / "marks")))
    eventually((tmp_path / "marks").exists)

    start_worker("tests.broker.app", settings=OWN)

    assert result.get(timeout=LOST_SECONDS + GRACE_SECONDS + 20, interval=0.02) == "paid"
    assert effects() == ["paid"]
    nothing_waits(database)


def test_worker_that_was_paused_gives_up_what_it_had(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """Another one has run it meanwhile; the first connects again and goes on with new messages."""
    if database.name == "sqlite":
        pytest.skip("on SQLite a paused worker keeps the lock that shows its life")
    marks = tmp_path / "marks"
    first = start_worker("tests.broker.app", settings=OWN)
    broker.client.send_task("wait", (str(marks), 3))
    eventually(lambda: begun(marks) == 1)
    first.send_signal(signal.SIGSTOP)
    second = start_worker("tests.broker.app", settings=OWN)
    eventually(lambda: begun(marks) == 2, timeout=LOST_SECONDS + GRACE_SECONDS)

    first.send_signal(signal.SIGCONT)

    first.wait_for_log("ClaimsLostError(2.0)")
    second.stop()
    assert broker.client.send_task("add", (1, 2)).get(timeout=20, interval=0.02) == 3


@pytest.mark.databases("postgresql")
def test_message_that_kills_its_workers_is_set_aside(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """After three workers it is kept with the reason, and the next one lives."""
    marks = tmp_path / "marks"
    broker.client.send_task("kill the worker", (str(marks),))
    workers: list[Worker] = []
    for count in range(1, 4):
        workers.append(start_worker("tests.broker.app", settings=OWN))
        eventually(lambda count=count: begun(marks) == count, timeout=LOST_SECONDS + GRACE_SECONDS)  # type: ignore[misc]

    last = start_worker("tests.broker.app", settings=OWN)

    [(error,)] = eventually(lambda: database.rows("SELECT error FROM celery_outbox WHERE died_at IS NOT NULL"))
    assert "begun 3 times by workers that were lost" in error
    assert last.alive()
    assert begun(marks) == 3


@pytest.mark.databases("postgresql")
def test_task_that_ends_its_process_at_once_is_set_aside(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """Its first start may be too short to be counted, those after it are."""
    marks = tmp_path / "marks"
    broker.client.send_task("end the process", (str(marks),))
    died = "SELECT error FROM celery_outbox WHERE died_at IS NOT NULL"

    for count in range(1, 5):
        worker = start_worker("tests.broker.app", pool="threads", settings=OWN)
        eventually(
            lambda count=count: begun(marks) == count or database.rows(died),  # type: ignore[misc]
            timeout=LOST_SECONDS + GRACE_SECONDS,
        )
        if begun(marks) == count:
            worker.wait()
    start_worker("tests.broker.app", pool="threads", settings=OWN)

    [(error,)] = eventually(lambda: database.rows(died), timeout=LOST_SECONDS + GRACE_SECONDS)
    assert "begun 3 times by workers that were lost" in error
    assert begun(marks) in (3, 4)


@pytest.mark.databases("postgresql", "sqlite")
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_only_what_had_begun_counts_as_a_start(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path, pool: Any
) -> None:
    """A worker is killed that had reserved more than it ran, with `acks_late` or without."""
    marks = tmp_path / "marks"
    worker = start_worker("tests.broker.app", pool=pool, settings=OWN)
    begun_one = broker.client.send_task("wait", (str(marks), 60))
    eventually(lambda: begun(marks) == 1)
    reserved = [broker.client.send_task(*call) for call in (("wait", (str(marks), 0)), ("add", (1, 2)))]
    counted = "SELECT task_id, deliveries FROM celery_outbox WHERE claim IS NOT NULL"
    expected = {begun_one.id: 1, **{result.id: 0 for result in reserved}}
    eventually(lambda: dict(database.rows(counted)) == expected, what="one has begun, two are reserved")  # type: ignore[arg-type]

    worker.kill()
    start_worker("tests.broker.app", queues=[broker.queue("other")], settings=OWN)

    released = "SELECT task_id, deliveries FROM celery_outbox WHERE claim IS NULL"
    eventually(
        lambda: dict(database.rows(released)) == expected,  # type: ignore[arg-type]
        timeout=LOST_SECONDS + GRACE_SECONDS,
        what="all are released, and the one that had begun is counted",
    )


@pytest.mark.databases("postgresql")
def test_start_that_was_given_back_does_not_count(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """The worker was told to end, and has said goodbye: nothing died."""
    marks = tmp_path / "marks"
    worker = start_worker("tests.broker.app", settings=OWN)
    broker.client.send_task("wait", (str(marks), 60))
    counted = "SELECT deliveries FROM celery_outbox"
    eventually(lambda: database.rows(counted) == [(1,)], what="it has begun")

    worker.send_signal(signal.SIGQUIT)
    worker.wait()

    assert database.rows("SELECT deliveries, claim FROM celery_outbox") == [(0, None)]


@pytest.mark.databases("sqlite")
def test_long_write_transaction_does_not_make_a_worker_lost(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """Its heartbeats wait for the database's lock; that of its file shows that it lives."""
    marks = tmp_path / "marks"
    start_worker("tests.broker.app", settings=OWN)
    broker.client.send_task("wait", (str(marks), 4 * LOST_SECONDS))
    eventually(lambda: begun(marks) == 1)
    database.execute("UPDATE celery_workers SET expires_at = '2020-01-01 00:00:00.000000'")

    start_worker("tests.broker.app", settings=OWN)

    nothing_waits(database)
    assert begun(marks) == 1


@pytest.mark.databases("postgresql", "mariadb")
def test_database_that_is_cut_is_waited_for(start_worker: StartWorker, broker: Broker, database: Database) -> None:
    """Connections are renewed, and each message is delivered once."""
    worker = start_worker("tests.broker.app", pool="threads", settings=OWN)
    assert broker.client.send_task("add", (1, 1)).get(timeout=20, interval=0.02) == 2

    for number in range(3):
        database.disconnect_others()
        broker.client.close()
        result = broker.client.send_task("add", (number, 1))
        assert result.get(timeout=20, interval=0.02) == number + 1

    assert worker.alive()
    nothing_waits(database)


def test_warm_shutdown_gives_back_what_has_not_begun(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """Its row is gone, and what it had reserved waits for others at once."""
    marks = tmp_path / "marks"
    worker = start_worker("tests.broker.app", settings=OWN)
    for _ in range(4):
        broker.client.send_task("wait", (str(marks), 2))
    # Celery gives back what its main process has not seen begin, while the child goes on with it.
    eventually(lambda: database.rows("SELECT id FROM celery_outbox WHERE deliveries = 1") != [])

    assert worker.stop() == 0

    assert database.rows("SELECT id FROM celery_workers") == []
    free = database.rows("SELECT id FROM celery_outbox WHERE claim IS NULL AND due_at IS NOT NULL")
    assert len(free) == 4 - begun(marks)
    assert not list(Path(os.fspath(tmp_path)).glob("*.lock"))
