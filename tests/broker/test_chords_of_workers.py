"""Chords of real workers: many parts, and workers that are killed in the midst of them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from celery import Celery, chord
from celery.exceptions import ChordError

from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

pytestmark = pytest.mark.brokers("alchemy")

APP = "tests.broker.results_app"

#: The worker has both from its Alchemy.
OWN = {"broker_url": "alchemy://", "result_backend": None}

#: A thousand show that the work does not grow with the square of the parts.
PARTS = int(os.environ.get("TEST_CHORD_PARTS", "50"))


@pytest.fixture
def client(broker: Broker, database: Database) -> Celery:
    """An app that has the URL and knows no sessions."""
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    app = broker.app("chords-client")
    app.conf.update(result_backend=f"alchemy+{database.url}")
    return app


def send(client: Celery, number: int, part: str) -> Any:
    parts = [client.signature(part, (f"{n:04}",)) for n in range(number)]
    return chord(parts, client.signature("count once"), app=client).apply_async()


def effects(database: Database) -> int:
    return int(database.scalar("SELECT count(*) FROM effect"))


def test_chord_of_many_parts_ends(start_worker: StartWorker, client: Celery, database: Database) -> None:
    """On each database, with two children that end parts at the same time."""
    start_worker(APP, concurrency=2, settings=OWN)

    result = send(client, PARTS, "write")

    assert result.get(timeout=150) == PARTS
    assert effects(database) == PARTS + 1
    assert database.rows("SELECT task_name FROM celery_outbox WHERE task_name = 'celery.chord_unlock'") == []


def test_chord_ends_though_its_workers_are_killed(start_worker: StartWorker, client: Celery, database: Database) -> None:
    """A child, and then all of a worker: the body runs once, with all results."""
    first = start_worker(APP, concurrency=2, settings=OWN)

    result = send(client, 100, "write once")
    eventually(lambda: effects(database) >= 10, what="parts have ended", timeout=60)
    os.kill(first.child_pids()[0], signal.SIGKILL)
    eventually(lambda: effects(database) >= 40, what="more parts have ended", timeout=60)
    first.kill()
    start_worker(APP, concurrency=2, settings=OWN)

    assert result.get(timeout=120) == 100
    assert database.rows("SELECT count(*), count(DISTINCT name) FROM effect") == [(101, 101)]


@pytest.mark.databases("sqlite", "postgresql")
def test_part_that_has_expired_fails_the_body(start_worker: StartWorker, client: Celery, database: Database) -> None:
    """The worker's main process says so, for no child has had it."""
    parts = [client.signature("write", ("a",)), client.signature("write", ("b",)).set(expires=0.001)]
    result = chord(parts, client.signature("count once"), app=client).apply_async()

    start_worker(APP, settings=OWN)

    with pytest.raises(ChordError, match="TaskRevokedError"):
        result.get(timeout=60, follow_parents=False)
    assert database.rows("SELECT name FROM effect") == [("a",)]


@pytest.mark.parametrize("part", ["slow", "slow once"])
def test_part_at_its_hard_time_limit_fails_the_body_once(
    start_worker: StartWorker, client: Celery, database: Database, part: str
) -> None:
    """The pool tells of it twice; on SQLite nobody waits for the lock of the task that is killed."""
    start_worker(APP, concurrency=2, settings=OWN)
    body = client.signature("count once").on_error(client.signature("note error"))
    parts = [client.signature(name, (name,)) for name in (part, "write")]

    results = [chord(parts, body, app=client).apply_async() for _ in range(2)]

    for result in results:
        with pytest.raises(ChordError, match="TimeLimitExceeded"):
            result.get(timeout=25, follow_parents=False)
    # What comes twice comes at once.
    time.sleep(1)
    assert sorted(name for (name,) in database.rows("SELECT name FROM effect")) == ["ChordError"] * 2 + ["write"] * 2
