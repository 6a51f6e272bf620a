"""A task that is revoked before a worker has it: its row ends, and its result says REVOKED."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.operations.dead_tasks import revive
from celery_alchemy.outbox.relay import relay_of
from tests.broker.app import LOST_SECONDS
from tests.broker.broker_stand import BrokerStand
from tests.broker.lines import Line
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

#: What is not ended of all that was sent.
OPEN = "SELECT task_id FROM celery_outbox WHERE due_at IS NOT NULL OR claim IS NOT NULL"


def add(x: int, y: int) -> int:
    """The body of a task without a session."""
    return x + y


def pay(session: Session, order: int) -> int:
    """The body of a task that is to take effect once."""
    return order


@pytest.mark.parametrize("options", [{}, {"countdown": 3600}])
def test_waiting_task_is_revoked(stand: BrokerStand, database: Database, options: dict[str, Any]) -> None:
    """Also one that is not due yet; no worker runs."""
    task = stand.task(add)
    revoked, kept = (task.apply_async((1, 2), **options) for _ in range(2))

    revoked.revoke()

    assert database.rows("SELECT task_id FROM celery_outbox") == [(kept.id,)]
    assert (revoked.state, kept.state) == ("REVOKED", "PENDING")
    with pytest.raises(TaskRevokedError, match="revoked"):
        revoked.get(timeout=1)


def test_list_of_tasks_is_revoked(stand: BrokerStand, database: Database) -> None:
    """As by a group's result; an id that nobody has sent changes nothing."""
    task = stand.task(add)
    results = [task.delay(1, number) for number in range(4)]

    stand.app.control.revoke([*(result.id for result in results[:3]), "unknown"])

    assert [result.state for result in results] == ["REVOKED", "REVOKED", "REVOKED", "PENDING"]
    assert database.rows(OPEN) == [(results[3].id,)]


def test_revoked_once_task_is_not_owed(stand: BrokerStand, database: Database) -> None:
    """It is kept as dead, and can be revived, as one that a worker has revoked."""
    task = stand.task(pay, once=True)
    with stand.alchemy.begin():
        result = task.delay_on_commit(1)

    result.revoke()

    assert database.rows(OPEN) == []
    dead = database.rows("SELECT task_id, error FROM celery_outbox WHERE died_at IS NOT NULL")
    assert dead == [(result.id, "the task was revoked")]
    assert result.state == "REVOKED"
    assert revive(stand.alchemy.engine, [result.id]) == 1


def test_revoked_twice_is_revoked(stand: BrokerStand, database: Database) -> None:
    """The second time, when the first was cut short, ends what the first has left."""
    result = stand.task(add).delay(1, 2)
    database.execute(
        "UPDATE celery_outbox SET due_at = NULL, died_at = created_at, error = 'the task was revoked'",
    )

    result.revoke()

    assert database.rows("SELECT task_id FROM celery_outbox") == []
    assert result.state == "REVOKED"


def test_message_that_nobody_can_read_is_revoked(stand: BrokerStand, database: Database) -> None:
    """Its id is a column of the row."""
    result = stand.task(add).delay(1, 2)
    database.execute("UPDATE celery_outbox SET envelope = '{broken'")

    result.revoke()

    assert database.rows("SELECT task_id FROM celery_outbox") == []
    assert result.state == "REVOKED"


def test_other_control_leaves_waiting_tasks_alone(stand: BrokerStand, database: Database) -> None:
    """What is said to named workers is for them alone; others say nothing of a waiting task."""
    result = stand.task(add).delay(1, 2)

    stand.app.control.revoke(result.id, destination=["celery@elsewhere"])
    stand.app.control.broadcast("revoke", {"task_id": result.id}, pattern="*.elsewhere", matcher="glob")
    stand.app.control.rate_limit("add", "1/s")
    stand.app.control.revoke_by_stamped_headers({"stamp": "value"})

    assert database.rows(OPEN) == [(result.id,)]


def test_ignored_result_is_not_kept(stand: BrokerStand, database: Database) -> None:
    """The row ends all the same."""
    result = stand.task(add, ignore_result=True).delay(1, 2)

    result.revoke()

    assert database.rows(OPEN) == []
    assert stand.rows() == []


@pytest.fixture
def by_url(database: Database) -> Iterator[Celery]:
    """An app that has only the URL of the broker, as Flower has."""
    app = Celery("url", set_as_current=False, broker=f"alchemy+{database.url}")
    yield app
    app.close()


def test_app_with_the_url_alone_revokes(stand: BrokerStand, by_url: Celery, database: Database) -> None:
    """The results are looked for in the same database."""
    result = stand.task(add).delay(1, 2)

    by_url.control.revoke(result.id)

    assert database.rows(OPEN) == []
    assert result.state == "REVOKED"


def test_result_goes_to_the_apps_own_backend(database: Database) -> None:
    """Where the app keeps its results elsewhere."""
    app = Celery("elsewhere", set_as_current=False, backend="cache+memory://")
    alchemy = Alchemy(app, database.url, broker=True)
    alchemy.create_tables()
    result = app.task(shared=False)(add).delay(1, 2)

    result.revoke()

    assert result.state == "REVOKED"
    assert database.rows("SELECT id FROM celery_results") == []
    app.close()
    alchemy.engine.dispose()


def test_task_that_a_worker_has_is_left_to_it(stand: BrokerStand, line: Line, database: Database) -> None:
    """The worker is told, and ends it itself."""
    result = stand.task(add).delay(1, 2)
    assert line.take("celery") is not None

    result.revoke()

    assert database.rows(OPEN) == [(result.id,)]
    assert result.state == "PENDING"


@pytest.mark.brokers("alchemy")
@pytest.mark.databases("sqlite", "postgresql")
def test_revoked_task_is_run_by_no_worker(start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path) -> None:
    """Neither by one that starts later, nor by one that was told and is busy."""
    marks = tmp_path / "marks"
    settings = {"broker_url": "alchemy://"}
    early = broker.client.send_task("wait", (str(marks), 0))
    early.revoke()
    start_worker("tests.broker.app", settings=settings)
    long = tmp_path / "long"
    broker.client.send_task("wait", (str(long), LOST_SECONDS))
    eventually(long.exists, what="the worker is busy")
    reserved = broker.client.send_task("wait", (str(marks), 0))
    later = broker.client.send_task("wait", (str(marks), 0), countdown=1)

    broker.client.control.revoke([reserved.id, later.id])

    last = broker.client.send_task("add", (1, 2))
    assert last.get(timeout=30, interval=0.02) == 3
    eventually(lambda: database.rows(OPEN) == [], what="nothing is left")
    assert not marks.exists()


@pytest.fixture
def moved(stand: BrokerStand, database: Database) -> Any:
    """An owed task that was kept for another broker, and is this one's to send."""
    task = stand.task(pay, name="pay", once=True)
    before = Celery("before", broker="memory://", backend="cache+memory://", set_as_current=False)
    alchemy = Alchemy(before, database.url, outbox=True)
    decorate: Any = before.task
    old = decorate(pay, name="pay", once=True, shared=False)
    with alchemy.begin():
        sent = old.delay_on_commit(1)
    alchemy.drain(10)
    alchemy.engine.dispose()
    before.close()
    return task.AsyncResult(sent.id)


def sent_again(stand: BrokerStand, database: Database) -> None:
    """Let the relay send what is owed to this broker."""
    database.execute("UPDATE celery_outbox SET due_at = '2020-01-01 00:00:00' WHERE due_at IS NOT NULL")
    assert relay_of(stand.alchemy).step() == 1


@pytest.mark.parametrize("is_sent", [True, False], ids=["sent", "kept"])
def test_task_that_was_kept_for_another_broker_is_revoked(stand: BrokerStand, database: Database, moved: Any, is_sent: bool) -> None:
    """The row that owes it ends too: the relay would send it again."""
    if is_sent:
        sent_again(stand, database)

    moved.revoke()

    assert database.rows(OPEN) == []
    assert database.rows("SELECT task_id, once FROM celery_outbox WHERE died_at IS NOT NULL") == [(moved.id, True)]
    assert moved.state == "REVOKED"
    assert revive(stand.alchemy.engine, [moved.id]) == 1


def test_moved_task_that_a_worker_has_is_left_to_it(stand: BrokerStand, database: Database, line: Line, moved: Any) -> None:
    """With the row that owes it, which its own transaction completes."""
    sent_again(stand, database)
    assert line.take("celery") is not None

    moved.revoke()

    assert database.rows(OPEN) == [(moved.id,)] * 2
    assert moved.state == "PENDING"


def test_revoked_task_that_is_done_stays_so(stand: BrokerStand, database: Database) -> None:
    """Its record of completion is no message that waits."""
    task = stand.task(pay, once=True)
    result = stand.result_of(task, 1, id="done")

    result.revoke()

    assert result.state == "SUCCESS"
    assert database.rows("SELECT task_id FROM celery_outbox WHERE completed_at IS NOT NULL") == [("done",)]
