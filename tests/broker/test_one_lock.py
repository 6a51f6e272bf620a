"""SQLite's one lock: what is told beside a task that holds it waits in a thread, and not in the task or the main loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from sqlalchemy.orm import Session

from celery_alchemy.broker.telling import drain_told
from celery_alchemy.databases.tables import metadata
from tests.broker.broker_stand import BrokerStand, write
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

pytestmark = pytest.mark.databases("sqlite")

ACTS: dict[str, Callable[[BrokerStand], object]] = {
    "revoke": lambda stand: stand.app.control.revoke("no such task"),
    "rate limit": lambda stand: stand.app.control.rate_limit("add", "1/m"),
    "forget": lambda stand: stand.app.AsyncResult("no such task").forget(),
    "forget a group": lambda stand: stand.app.GroupResult("no such group", []).delete(),
}


@pytest.mark.parametrize("act", ACTS)
def test_task_that_has_written_does_not_wait_for_its_own_lock(stand: BrokerStand, database: Database, act: str) -> None:
    """It would for thirty seconds, and fail."""
    took: list[float] = []

    def work(session: Session) -> None:
        write(session, "work")
        began = time.monotonic()
        ACTS[act](stand)
        took.append(time.monotonic() - began)

    result = stand.result_of(stand.task(work, name="work"))
    drain_told()

    assert result.state == "SUCCESS"
    assert took[0] < 5
    assert database.rows("SELECT name FROM effect") == [("work",)]


def test_what_a_task_revokes_is_revoked_after_its_commit(stand: BrokerStand, database: Database) -> None:
    """No worker runs; the thread waits for the lock."""
    sent = stand.task(write, name="other").delay("other")

    def work(session: Session) -> None:
        write(session, "work")
        sent.revoke()

    stand.result_of(stand.task(work, name="work"))

    eventually(lambda: sent.state == "REVOKED", what="it is revoked")
    drain_told()
    assert database.rows("SELECT task_id FROM celery_outbox WHERE due_at IS NOT NULL") == []


@pytest.mark.brokers("alchemy")
def test_time_limits_go_on_while_a_task_holds_the_lock(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """The main loop has events to send meanwhile."""
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    metadata.create_all(database.engine)
    limited, gate = tmp_path / "limited", tmp_path / "gate"
    client = broker.client
    client.send_task("write and wait", (str(gate),))
    client.send_task("limited", (str(limited),))
    for _ in range(7):
        client.send_task("tell", (0.5,))
    settings = {"worker_send_task_events": True}

    start_worker("tests.broker.app", concurrency=3, settings={**settings, "broker_url": "alchemy://", "result_backend": None})
    eventually(lambda: limited.exists() and limited.read_text(), what="the limited task has begun", timeout=20)
    pid = int(limited.read_text())

    try:
        eventually(lambda: not psutil.pid_exists(pid), what="it is killed at its limit of two seconds", timeout=8)
        assert database.rows("SELECT name FROM effect") == []
    finally:
        with suppress(OSError):
            os.close(os.open(gate, os.O_CREAT))
    eventually(lambda: database.rows("SELECT name FROM effect") == [("written",)], what="the lock is given back")
