"""Results of real workers, in the database that is their broker too."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, chain, chord, group

from tests.broker.results_app import OutOfStockError
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database

pytestmark = pytest.mark.brokers("alchemy")

APP = "tests.broker.results_app"

#: The worker has both from its Alchemy.
OWN = {"broker_url": "alchemy://", "result_backend": None, "result_chord_retry_interval": 0.1}

LETTERS = "abcdefghij"


@pytest.fixture
def client(broker: Broker, database: Database) -> Celery:
    """An app that has the URL and knows no sessions."""
    database.execute("CREATE TABLE effect (name VARCHAR(100))")
    app = broker.app("results-client")
    app.conf.update(result_backend=f"alchemy+{database.url}", result_chord_retry_interval=0.1)
    return app


def effects(database: Database) -> list[Any]:
    return [row[0] for row in database.rows("SELECT name FROM effect ORDER BY name")]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_results_come_back(start_worker: StartWorker, client: Celery, database: Database, pool: Any) -> None:
    """Of one task, a chain, a group, and a chord of ten; when they are there, so are the rows."""
    start_worker(APP, pool=pool, concurrency=2, settings=OWN)
    one = client.signature("write", ("one",))
    steps = chain(client.signature("write once", ("x",)), client.signature("double"))
    parts = [client.signature("write", (letter,)) for letter in LETTERS]

    assert one.apply_async().get(timeout=30) == "one"
    assert effects(database) == ["one"]
    assert steps.apply_async().get(timeout=30) == "xx"
    assert group(parts, app=client).apply_async().get(timeout=30) == list(LETTERS)
    body = client.signature("join")
    assert chord(parts, body, app=client).apply_async().get(timeout=30) == LETTERS


def test_failures_come_back(start_worker: StartWorker, client: Celery, database: Database) -> None:
    """With their own class, their arguments and the traceback; nothing of the work stays."""
    start_worker(APP, settings=OWN)

    for name in ("fail", "fail once"):
        result = client.signature(name, ("pear",)).apply_async()
        with pytest.raises(OutOfStockError) as caught:
            result.get(timeout=30)
        assert caught.value.args == ("pear", 3)
        assert "raise OutOfStockError(name, 3)" in result.traceback
    assert effects(database) == []


def test_once_task_that_is_delivered_again_reports_its_result(start_worker: StartWorker, client: Celery, database: Database) -> None:
    """Whoever asks for the second delivery hears the first one's result, and its work is done once."""
    start_worker(APP, settings=OWN)
    first = client.signature("write once", ("a",)).apply_async()
    assert first.get(timeout=30) == "a"
    client.AsyncResult(first.id).forget()

    again = client.signature("write once", ("a",)).apply_async(task_id=first.id)

    assert again.get(timeout=30) == "a"
    assert effects(database) == ["a"]
