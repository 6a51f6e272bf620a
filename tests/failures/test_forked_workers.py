"""F03, F06, F38, F49 and F51 in real workers: engines from before the fork, and pools that are too small."""

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


SYNC_WAYS = ("engine", "binds", "configured", "callable", "flask")


def test_children_open_their_own_connections_by_every_way(start_worker: StartWorker, broker: Broker, database: Database) -> None:
    """Each task reads the answers to its own statements; no connection is the parent's, or of two processes."""
    start_worker("tests.apps.ways", pool="prefork", concurrency=3)
    send = broker.client.send_task
    names = [("ask", (way,)) for way in SYNC_WAYS] + [("ask.url", ()), ("ask.class", ()), ("ask.async", ())]
    parents = send("opened").get(timeout=60)

    sent = [(number, send(name, (*args, number))) for number in range(1, 7) for name, args in names]
    answers = [(number, result.get(timeout=60, interval=0.02)) for number, result in sent]

    assert len(set(parents.values())) == len(SYNC_WAYS) + 3
    assert [answer[:2] for _, answer in answers] == [[number, number + 1] for number, _ in answers]
    assert not set(parents.values()) & {answer[2] for _, answer in answers}
    processes: dict[int, set[int]] = {}
    for _, answer in answers:
        processes.setdefault(answer[2], set()).add(answer[3])
    assert [pids for pids in processes.values() if len(pids) > 1] == []
    # What listens to the URL's engine since the import, was told of each connection of the children.
    assert {answer[4] for _, answer in answers if len(answer) == 5} == {1}
    # An async pool whose loop has ended may have lost its own.
    assert set(parents.values()) - {parents["async"]} <= set(database.connections())


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize(("arguments", "grown", "wanted"), [(["--autoscale=20,3"], 0, 10), ([], 17, 15)])
def test_pool_follows_the_largest_concurrency(
    start_worker: StartWorker, broker: Broker, database: Database, arguments: list[str], grown: int, wanted: int
) -> None:
    """Tasks of gevent have a connection each, also when the worker grows while it runs."""
    worker = start_worker("tests.apps.crowd", pool="gevent", concurrency=2, arguments=arguments)
    if grown:
        replies = broker.client.control.broadcast(
            "pool_grow", {"n": grown}, destination=[worker.hostname], reply=True, timeout=30, limit=1
        )
        assert "ok" in replies[0][worker.hostname]

    sent = [broker.client.send_task("hold", (number, wanted)) for number in range(wanted)]

    assert [result.get(timeout=60) for result in sent] == [wanted] * wanted
