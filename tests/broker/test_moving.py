"""What the outbox kept for another broker is taken along when the database becomes the broker."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, enqueue
from tests.broker.test_workers import OWN
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually


@pytest.mark.brokers("alchemy")
def test_what_waits_for_another_broker_runs_on_this_one(start_worker: StartWorker, broker: Broker, database: Database) -> None:
    """Messages that nobody could hand over, and owed tasks whose messages the other broker has lost."""
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    before = Celery("before", broker="redis://localhost:1", set_as_current=False)
    before.conf.task_default_queue = broker.client.conf.task_default_queue
    alchemy = Alchemy(before, database.url, outbox=True)
    task: Any = before.task

    @task(name="write", shared=False)
    def write(session: Session, name: str) -> None: ...

    @task(name="write once", shared=False, once=True)
    def write_once(session: Session, name: str, marks: str) -> str: ...

    with alchemy.begin() as session:
        enqueue(session, write.s("plain"))
        owed = enqueue(session, write_once.s("owed", "/"))
        later = enqueue(session, write_once.s("later", "/"), countdown=3)
    assert not alchemy.drain()
    # As if it had been handed over, and the other broker had been emptied.
    database.execute(f"UPDATE celery_outbox SET sends = 1, error = NULL WHERE task_id = '{owed.id}'")

    start_worker("tests.broker.app", settings=OWN)

    names = "SELECT name FROM effect ORDER BY name"
    eventually(lambda: database.rows(names) == [("later",), ("owed",), ("plain",)], timeout=40)
    assert broker.client.AsyncResult(owed.id).get(timeout=10) == "owed"
    assert broker.client.AsyncResult(later.id).get(timeout=10) == "later"
    waiting = "SELECT id FROM celery_outbox WHERE completed_at IS NULL"
    eventually(lambda: database.rows(waiting) == [], what="nothing is left")
