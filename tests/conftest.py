"""Fixtures of all tests: a database, a broker and real workers, on every server that this machine has."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import celery.app.base  # noqa: F401 - registers Celery's own shared tasks.
import pytest
from celery import _state
from sqlalchemy.orm import Session, scoped_session

from celery_alchemy.outbox import hand_over
from celery_alchemy.sessions.engine import set_worker_pool, worker_pool
from tests.services import brokers as broker_services
from tests.services import databases as database_services
from tests.services.availability import Missing, in_ci
from tests.services.brokers import Broker, Brokers
from tests.services.databases import Database, Databases
from tests.services.opened import Connections
from tests.workers import Pool as WorkerPool
from tests.workers import Worker

# Celery gives a task made by @app.task to every app of the process that is finalized later. What other test modules made must
# not turn up in a test's own app.
_CELERYS_OWN = frozenset(_state._on_app_finalizers)

if not hasattr(Session, "get_one"):

    def _get_one(session: Any, entity: Any, ident: Any) -> Any:
        found = session.get(entity, ident)
        assert found is not None
        return found

    # SQLAlchemy before 2.0.22: the library does not use it, the tests are written with it.
    for kind in (Session, scoped_session):
        kind.get_one = _get_one

#: Where whole workers die and time has to pass.
_LONGEST = ("tests/crash/", "tests/soak/", "tests/steps/test_workers.py")

WORKERS = pytest.StashKey[list[Worker]]()
_DATABASES = Databases()
_BROKERS = Brokers()


class StartWorker(Protocol):
    """Starts a worker on the broker and database of the test; keyword arguments are those of `Worker`."""

    def __call__(self, app: str, *, pool: WorkerPool = "prefork", concurrency: int = 1, **options: Any) -> Worker:
        """Return the started worker."""
        ...


@pytest.fixture(autouse=True)
def no_shared_tasks() -> Iterator[None]:
    """Keep the tasks of one test's app out of the next one's."""
    _state._on_app_finalizers.intersection_update(_CELERYS_OWN)
    yield
    _state._on_app_finalizers.intersection_update(_CELERYS_OWN)


@pytest.fixture(autouse=True)
def no_error_is_handled() -> None:
    """Find a test before this one that has left the thread handling an error for ever."""
    assert sys.exc_info()[1] is None


@pytest.fixture(autouse=True)
def worker_pool_is_forgotten() -> Iterator[None]:
    """Let no test's engines have the size that another one's worker has."""
    before = worker_pool()
    yield
    set_worker_pool(before)


@pytest.fixture(autouse=True)
def pools_are_emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Close what the pools of a test's engines still hold, as a process does that ends.

    From 3.13 on Python warns of each SQLite connection that is collected before it was closed.
    """
    if request.node.get_closest_marker("empties_its_pools"):
        yield
        return
    with Connections().remembered() as opened:
        yield
        # Else it still holds a connection, or takes one of a pool that is new.
        hand_over.wait_for_all(10)
    opened.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, though they have few tests: nothing waits for them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that asks for `database` or `broker` on all of them or on those its marker names."""
    _parametrize(metafunc, "database", "databases", database_services.NAMES)
    _parametrize(metafunc, "broker", "brokers", broker_services.NAMES)


def _parametrize(metafunc: pytest.Metafunc, fixture: str, marker: str, names: tuple[str, ...]) -> None:
    if fixture not in metafunc.fixturenames:
        return
    # A test that pairs them itself: @pytest.mark.parametrize(("database", "broker"), [...], indirect=True)
    for mark in metafunc.definition.iter_markers("parametrize"):
        argnames = mark.args[0] if mark.args else mark.kwargs["argnames"]
        listed = argnames.split(",") if isinstance(argnames, str) else argnames
        if fixture in [name.strip() for name in listed]:
            return
    chosen = metafunc.definition.get_closest_marker(marker)
    metafunc.parametrize(fixture, chosen.args if chosen else names, indirect=True)


def pytest_report_header() -> list[str]:
    """Say at the top which servers the tests will use."""
    searches = [_DATABASES.server(name) for name in ("postgresql", "mariadb")]
    searches += [_BROKERS.server(name) for name in ("redis", "rabbitmq")]
    return [
        f"{server.name}: missing, its tests {'fail' if in_ci() and server.is_wanted else 'are skipped'}: {server.reason}"
        if isinstance(server, Missing)
        else f"{server.name}: found ({server.origin})"
        for server in searches
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the logs of a failed test's workers in its report."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        for worker in item.stash.get(WORKERS, []):
            report.sections.append((f"log of {worker!r}", worker.log[-20_000:]))
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session", autouse=True)
def _drop_databases() -> Iterator[None]:
    yield
    _DATABASES.close()


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of the parametrised kind; see the marker `databases`."""
    database = _DATABASES.open(request.param, tmp_path)
    database.clear()
    yield database
    database.clear()


@pytest.fixture
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """An empty broker of the parametrised kind; see the marker `brokers`."""
    broker = _BROKERS.open(request.param, tmp_path)
    yield broker
    broker.close()


@pytest.fixture
def start_worker(request: pytest.FixtureRequest, broker: Broker, tmp_path: Path) -> Iterator[StartWorker]:
    """Start real workers; when the test ends they are killed with all their children.

    A test that is about a worker's shutdown stops it itself.
    """
    workers = request.node.stash.setdefault(WORKERS, [])
    database = request.getfixturevalue("database") if "database" in request.fixturenames else None

    def start(app: str, *, pool: WorkerPool = "prefork", concurrency: int = 1, **options: Any) -> Worker:
        options.setdefault("database", database)
        worker = Worker(app, broker, folder=tmp_path, pool=pool, concurrency=concurrency, **options)
        workers.append(worker)
        worker.start()
        return worker

    yield start
    for worker in workers:
        if "COVERAGE_PROCESS_CONFIG" in os.environ:
            # What a process has covered is written when it is asked to end.
            worker.stop()
        # A warm shutdown takes Celery seconds, which a suite of hundreds of workers does not have.
        worker.kill()


@pytest.fixture
def run(broker: Broker) -> Callable[..., Any]:
    """Send a task by name and return its result: `run("add", 1, 2)`; raises what the task raised."""

    def send(name: str, *args: Any, timeout: float = 30.0, **kwargs: Any) -> Any:
        result = broker.client.send_task(name, args, kwargs)
        return result.get(timeout=timeout, interval=0.02)

    return send
