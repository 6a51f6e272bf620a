"""F03 and F06 in real workers: an engine that was used before the fork, and a pool that is too small."""

from __future__ import annotations

import pytest

from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database

APP = "tests.apps.own_engine"
TASKS = 60

pytestmark = [pytest.mark.databases("postgresql", "mariadb"), pytest.mark.brokers("redis")]


def test_children_leave_a_connection_of_their_parent_alone(start_worker: StartWorker, broker: Broker, database: Database) -> None:
    """Each task reads the answers to its own statements, on its process's own connection; the parent's lives on, and is reported."""
    worker = start_worker(APP, pool="prefork", concurrency=4)
    parents = set(database.connections())

    results = [broker.client.send_task("ask", (number,)) for number in range(TASKS)]
    answers = [result.get(timeout=60, interval=0.02) for result in results]

    assert len(parents) == 1
    assert [answer[:2] for answer in answers] == [[number, number + 1] for number in range(TASKS)]
    assert parents.isdisjoint({answer[2] for answer in answers})
    assert parents < set(database.connections())
    assert "were opened before the worker forked" in worker.log


def test_pool_that_is_too_small_is_reported_when_the_worker_starts(start_worker: StartWorker, database: Database) -> None:
    """With the number that would do, before the first task waits for a connection."""
    worker = start_worker(APP, pool="threads", concurrency=8)

    assert "lends at most 3 connections" in worker.log
    assert "pool_size=8" in worker.log
