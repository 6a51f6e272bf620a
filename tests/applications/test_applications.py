"""Applications whose code says `db.session`: their tasks' writes are committed, sent from and done once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError

from celery_alchemy.databases import tables
from tests.applications.module_shop import Base
from tests.conftest import StartWorker
from tests.services.databases import Database
from tests.waiting import eventually

FOLDER = "tests.applications"
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _tables(database: Database) -> None:
    # The tables of all these applications are the same.
    Base.metadata.create_all(database.engine)
    tables.metadata.create_all(database.engine)


def _orders(database: Database) -> list[tuple[str, str]]:
    rows = database.rows("SELECT item, state FROM orders ORDER BY id")
    return [(row[0], row[1]) for row in rows]


def _notes(database: Database) -> list[str]:
    return [row[0] for row in database.rows("SELECT text FROM note ORDER BY id")]


def _handed_over(database: Database) -> bool:
    return database.scalar("SELECT count(*) FROM celery_outbox WHERE body IS NOT NULL") == 0


def _sell(database: Database, run: Run) -> None:
    """One order of each ending: taken and charged, refused, removed and taken again."""
    order_id = run("order", "tea")
    eventually(lambda: _orders(database) == [("tea", "charged")], what="the order is charged")
    assert _notes(database) == [f"charging {order_id}", f"charged {order_id}"]
    eventually(lambda: _handed_over(database), what="nothing is owed")

    with pytest.raises(LookupError):
        run("refuse", "sand")
    assert _orders(database) == [("tea", "charged")]
    assert _notes(database)[2:] == ["sand: LookupError"]

    run("remove", "milk")
    assert [item for item, _ in _orders(database)] == ["tea", "milk"]


@pytest.mark.databases("postgresql")
@pytest.mark.brokers("redis")
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
@pytest.mark.parametrize("app", ["flask_shop", "subclass_shop", "module_shop"])
def test_application_sells(database: Database, start_worker: StartWorker, run: Run, app: str, pool: Any) -> None:
    """With the outbox and `once`, in every pool."""
    start_worker(f"{FOLDER}.{app}", pool=pool, concurrency=2)

    _sell(database, run)


@pytest.mark.databases("sqlite", "mariadb")
@pytest.mark.brokers("redis")
@pytest.mark.parametrize("app", ["flask_shop", "module_shop"])
def test_application_sells_on_other_databases(database: Database, start_worker: StartWorker, run: Run, app: str) -> None:
    """The nested task writes while the outer one has only read."""
    start_worker(f"{FOLDER}.{app}", pool="prefork", concurrency=1)

    _sell(database, run)


@pytest.mark.databases("postgresql")
@pytest.mark.brokers("redis")
@pytest.mark.parametrize("app", ["flask_shop", "subclass_shop", "module_shop"])
def test_lost_child_is_recorded_by_the_applications_models(database: Database, start_worker: StartWorker, run: Run, app: str) -> None:
    """In the worker's parent, where the task's class gives the application context too."""
    settings = {"worker_lost_wait": 0.5}
    start_worker(f"{FOLDER}.{app}", pool="prefork", concurrency=1, settings=settings)

    with pytest.raises(WorkerLostError):
        run("die", "tea")

    eventually(lambda: _notes(database) == ["tea: WorkerLostError"], what="it is recorded")
    assert _orders(database) == []


@pytest.mark.databases("postgresql")
@pytest.mark.brokers("redis")
def test_application_context_of_a_helper_takes_nothing_back(database: Database, start_worker: StartWorker, run: Run) -> None:
    """Its end removes the session of its own scope, not that of the task."""
    start_worker(f"{FOLDER}.flask_shop", pool="threads", concurrency=1)

    assert run("context", "tea") == "flask_shop"

    assert _orders(database) == [("tea", "new")]
