"""A running worker for each combination of pool, database and broker, through which all endings go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult

from tests.broker.lines import database_broker
from tests.conformance.app import SIGNS_VARIABLE, create_tables
from tests.conftest import WORKERS
from tests.services.brokers import Broker, Brokers
from tests.services.databases import Database, Databases
from tests.waiting import eventually
from tests.workers import Pool, Worker

_DATABASES = Databases()
_BROKERS = Brokers()

#: How many tasks run at once.
CONCURRENCY: dict[Pool, int] = {"prefork": 1, "solo": 1, "threads": 4, "gevent": 4, "eventlet": 4}


class RunningWorker:
    """One running worker with its database and broker.

    Attributes:
        pool: The worker's pool.
        database: What its tasks write into.
        broker: Where its messages come from.
        worker: The processes.
    """

    def __init__(self, pool: Pool, database: Database, broker: Broker, folder: Path) -> None:
        self.pool = pool
        self.database = database
        self.broker = broker
        self._signs = folder / "signs"
        self._signs.mkdir()
        self._keys = 0
        self.worker = Worker(
            "tests.conformance.app",
            broker,
            folder=folder,
            database=database,
            pool=pool,
            concurrency=CONCURRENCY[pool],
            # Without an event loop (the file-system broker) a lost child is otherwise noticed after ten seconds.
            settings={"worker_lost_wait": 0.5},
            env={SIGNS_VARIABLE: str(self._signs)},
            arguments=("--prefetch-multiplier", "1"),
        )

    def key(self) -> str:
        """Return a key that no task has written yet."""
        self._keys += 1
        return f"key-{self._keys}"

    def send(self, name: str, *args: Any) -> AsyncResult[Any]:
        """Send a task by its name."""
        return self.broker.client.send_task(name, args)

    def run(self, name: str, *args: Any) -> Any:
        """Send a task, wait for its end and return its result."""
        return self.send(name, *args).get(timeout=30, interval=0.02)

    def wait_for_sign(self, name: str) -> None:
        """Wait until a worker has told of something that leaves no result."""
        eventually((self._signs / name).exists, timeout=30, what=f"{name} was signed")

    def marks(self, key: str) -> dict[str, str]:
        """Return the committed marks of a key: what follows it in their own keys, and their notes."""
        rows = self.database.rows("SELECT name, note FROM mark")
        return {own.removeprefix(key): note for own, note in rows if own == key or own.startswith(f"{key}:")}


class RunningWorkers:
    """Keeps one running worker at a time: the tests come ordered by combination."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._combination: object = None
        self._running: RunningWorker | None = None

    def at(self, combination: tuple[Pool, str, str]) -> RunningWorker:
        """Return the worker of a combination; one that a failed test has left dead is started anew."""
        if self._running is None or self._combination != combination or not self._running.worker.alive():
            self.close()
            pool, database_name, broker_name = combination
            folder = self._folders.mktemp("running")
            database = _DATABASES.open(database_name, folder)
            database.clear()
            create_tables(database.engine)
            broker = database_broker(database, folder) if broker_name == "alchemy" else _BROKERS.open(broker_name, folder)
            self._combination, self._running = combination, RunningWorker(pool, database, broker, folder)
            self._running.worker.start()
        return self._running

    def close(self) -> None:
        """End the current worker and clear what it used."""
        if self._running is None:
            return
        if "COVERAGE_PROCESS_CONFIG" in os.environ:
            # What a process has covered is written when it is asked to end.
            self._running.worker.stop()
        self._running.worker.kill()
        self._running.broker.close()
        self._running = None


@pytest.fixture(scope="module")
def running_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorkers]:
    """All running workers of a module, one after the other."""
    running_workers = RunningWorkers(tmp_path_factory)
    yield running_workers
    running_workers.close()
    _DATABASES.close()


@pytest.fixture
def running(request: pytest.FixtureRequest, running_workers: RunningWorkers) -> RunningWorker:
    """The running worker of the test's combination of pool, database and broker."""
    return running_workers.at(request.param)


@pytest.fixture(autouse=True)
def _show_log(request: pytest.FixtureRequest) -> None:
    if "running" in request.fixturenames:
        request.node.stash[WORKERS] = [request.getfixturevalue("running").worker]
