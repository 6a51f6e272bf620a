"""Real workers that are killed at random, again and again, pay for each step once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from celery_alchemy import Alchemy
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.steps.paying import pay_and_kill


@pytest.mark.brokers("redis", "rabbitmq")
@pytest.mark.databases("postgresql", "mariadb", "sqlite")
def test_killed_workers_pay_for_each_step_once(start_worker: Any, broker: Broker, database: Database, tmp_path: Path) -> None:
    """What was paid for twice was so where the kill fell between the payment and its COMMIT."""
    _pay(start_worker, broker, database, tmp_path, "ingest", owed=broker.name == "redis")


@pytest.mark.brokers("redis")
@pytest.mark.databases("postgresql+asyncpg", "mariadb+asyncmy", "sqlite+aiosqlite")
def test_killed_workers_pay_for_each_step_of_an_async_task_once(
    start_worker: Any, broker: Broker, database: Database, tmp_path: Path
) -> None:
    """As for a plain task."""
    _pay(start_worker, broker, database, tmp_path, "ingest.async", owed=False)


def _pay(start_worker: Any, broker: Broker, database: Database, folder: Path, name: str, *, owed: bool) -> None:
    def send() -> None:
        if owed:
            _send_through_outbox(broker, database, name)
        else:
            broker.client.send_task(name, ("report",))

    pay_and_kill(lambda env: start_worker("tests.steps.worker_app", database=database, env=env), send, database, folder, whole=False)


def _send_through_outbox(broker: Broker, database: Database, name: str) -> None:
    """Send as a web process does, which knows the task by its name and options."""
    app: Any = broker.app("sender")
    alchemy = Alchemy(app, database.url, outbox=True)
    task = app.task(name=name, once=True, shared=False)(_known_by_name)
    with alchemy.begin():
        task.delay_on_commit("report")
    if alchemy.outbox is not None:
        alchemy.outbox.publisher.close()
    alchemy.engine.dispose()
    app.close()


def _known_by_name(document: str) -> None:
    raise NotImplementedError("This process only sends it.")
