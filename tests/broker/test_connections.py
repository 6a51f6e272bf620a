"""How many connections to the database a worker holds that has the database for its broker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from sqlalchemy import make_url

from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually
from tests.workers import Worker

pytestmark = [pytest.mark.brokers("alchemy"), pytest.mark.databases("postgresql", "mariadb")]

#: What is promised: one takes messages, one keeps the heart beating, one is for what the main loop asks and says.
MOST_OF_PARENT = 3

#: That of the task's session, and one while the child tells that it has sent something, or that a result is there.
MOST_OF_CHILD = 2


def held_by(process: psutil.Process, database: Database) -> int:
    """Return how many connections to a database's server a process holds."""
    port = make_url(database.url).port
    try:
        found = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return 0
    return sum(one.status == psutil.CONN_ESTABLISHED and one.raddr.port == port for one in found if one.raddr)


@contextmanager
def watched(worker: Worker, database: Database) -> Iterator[dict[int, int]]:
    """Give the most connections that the worker's parent and its children have held at once, by their process ids."""
    most: dict[int, int] = {}
    parent, is_over = psutil.Process(worker.pid), Event()

    def look() -> None:
        while not is_over.wait(0.01):
            for process in (parent, *parent.children()):
                most[process.pid] = max(most.get(process.pid, 0), held_by(process, database))

    thread = Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        is_over.set()
        thread.join()


def test_few_connections_are_held(start_worker: StartWorker, broker: Broker, database: Database) -> None:
    """While tasks run and write, results are stored, events sent and questions answered."""
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    worker = start_worker("tests.broker.app", concurrency=2, settings={"broker_url": "alchemy://", "worker_send_task_events": True})
    with watched(worker, database) as most:
        sent: list[Any] = [broker.client.send_task("write", (f"effect {number}",)) for number in range(40)]
        sent += [broker.client.send_task("add", (number, 1)) for number in range(40)]
        assert eventually(lambda: broker.client.control.ping(timeout=1.0))
        for result in sent:
            result.get(timeout=60, interval=0.02)

    of_parent = most.pop(worker.pid)
    assert 1 < of_parent <= MOST_OF_PARENT
    assert most
    assert max(most.values()) <= MOST_OF_CHILD
