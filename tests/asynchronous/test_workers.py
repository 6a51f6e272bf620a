"""Async tasks in real workers: one loop for each process, many tasks on it, time limits, forks and a clean end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError

from tests.asynchronous.app import BEFORE_FORK_VARIABLE, Base
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually
from tests.workers import Pool

APP = "tests.asynchronous.app"
ASYNC = ("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg")

pytestmark = pytest.mark.brokers("redis")

Run = Callable[..., Any]


@pytest.fixture
def marks(database: Database) -> Callable[[], list[str]]:
    """The committed marks in their order; their table exists."""
    Base.metadata.create_all(database.engine)
    return lambda: [row[0] for row in database.rows("SELECT name FROM mark ORDER BY id")]


#: Each pool and each driver more than once; all pairs would take a minute more and say no more.
PAIRS = [
    ("prefork", "sqlite+aiosqlite"),
    ("prefork", "postgresql+asyncpg"),
    ("solo", "postgresql+psycopg"),
    ("threads", "sqlite+aiosqlite"),
    ("threads", "postgresql+asyncpg"),
    ("threads", "postgresql+psycopg"),
    ("prefork", "mariadb+asyncmy"),
    ("threads", "mariadb+aiomysql"),
]


@pytest.mark.parametrize(("pool", "database"), PAIRS, indirect=["database"])
def test_process_has_one_loop_for_its_whole_life(
    start_worker: StartWorker, run: Run, database: Database, marks: Callable[[], list[str]], pool: Pool
) -> None:
    """One loop, engine and connection serve task after task, a retry in between; at its end the worker closes them."""
    worker = start_worker(APP, pool=pool, concurrency=1)

    places = {tuple(run("where")) for _ in range(3)}
    retried = run("retry", "Emma")
    places |= {tuple(run("where")) for _ in range(3)}
    before = _ended_sessions(database)

    assert len(places) == 1
    assert retried == 1
    assert marks() == ["Emma 1"]
    assert worker.stop() == 0
    assert "Traceback" not in worker.log
    eventually(lambda: database.connections() == [], what="its connections are gone")
    if database.name == "postgresql":
        eventually(lambda: _ended_sessions(database)[0] > before[0], what="the server has counted them")
        assert _ended_sessions(database)[1] == before[1]


def _ended_sessions(database: Database) -> tuple[int, int]:
    """Return how many sessions PostgreSQL has counted, and how many of them were lost without a goodbye."""
    if database.name != "postgresql":
        return 0, 0
    query = "SELECT sessions, sessions_abandoned FROM pg_stat_database WHERE datname = current_database()"
    sessions, abandoned = database.rows(query)[0]
    return int(sessions), int(abandoned)


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
def test_threads_pool_runs_many_tasks_at_once_on_the_loop(
    start_worker: StartWorker, broker: Broker, marks: Callable[[], list[str]]
) -> None:
    """All of them stand in their bodies together; each goes on only when all have come."""
    count = 8
    start_worker(APP, pool="threads", concurrency=count)

    results = [broker.client.send_task("meet", (number, count)) for number in range(count)]

    assert [result.get(timeout=60, interval=0.02) for result in results] == list(range(count))
    assert sorted(marks()) == [f"met {number}" for number in range(count)]


@pytest.mark.databases(*ASYNC)
def test_time_limits_end_async_tasks(start_worker: StartWorker, run: Run, database: Database, marks: Callable[[], list[str]]) -> None:
    """The soft one cancels the body, the hard one kills its process; both are recorded, and the worker goes on."""
    start_worker(APP, pool="prefork", concurrency=1)
    before = run("where")

    with pytest.raises(SoftTimeLimitExceeded):
        run("wait.soft", "soft")
    after = run("where")
    with pytest.raises(TimeLimitExceeded):
        run("wait.hard", "hard")
    eventually(lambda: "hard: TimeLimitExceeded" in marks(), what="the hard limit is recorded")

    cancelled = ["soft: cancelled"] if database.name == "postgresql" else []
    assert marks() == [*cancelled, "soft: SoftTimeLimitExceeded", "hard: TimeLimitExceeded"]
    assert before[:3] == after[:3]
    assert run("where")[0] != before[0]
    eventually(lambda: database.transactions() == 0, what="no query of a killed process runs on")


@pytest.mark.databases(*ASYNC)
def test_coroutine_record_failure_of_a_lost_child_runs_in_the_parent(
    start_worker: StartWorker, broker: Broker, run: Run, marks: Callable[[], list[str]]
) -> None:
    """In a loop of the parent's, again and again, while new children are forked and use theirs."""
    start_worker(APP, pool="prefork", concurrency=1)

    for number in range(3):
        with pytest.raises(WorkerLostError):
            run("dies", str(number))
        run("where")

    eventually(lambda: len(marks()) == 3, what="each end is recorded")
    assert marks() == [f"{number}: WorkerLostError" for number in range(3)]


@pytest.mark.databases("postgresql+asyncpg", "postgresql+psycopg")
def test_task_that_ran_before_the_fork_leaves_the_children_alone(
    start_worker: StartWorker, broker: Broker, database: Database
) -> None:
    """The parent's loop and connections are the parent's: each child makes its own, and none of them is cut."""
    worker = start_worker(APP, pool="prefork", concurrency=2, env={BEFORE_FORK_VARIABLE: "1"})
    parents = database.connections()

    results = [broker.client.send_task("where") for _ in range(8)]
    places = {tuple(result.get(timeout=30, interval=0.02)) for result in results}

    assert len(parents) == 1
    assert worker.pid not in {place[0] for place in places}
    assert len(places) == len({place[0] for place in places})
    assert set(parents) < set(database.connections())


@pytest.mark.databases("sqlite+aiosqlite")
def test_pool_of_greenlets_is_refused_at_the_start(start_worker: StartWorker) -> None:
    """Not at the first task, and with the reason and the pools that work."""
    with pytest.raises(RuntimeError, match=r"`async def`, which the gevent pool cannot run.*--pool=threads"):
        start_worker(APP, pool="gevent")


@pytest.mark.databases("sqlite")
def test_worker_without_async_sessions_is_refused_at_the_start(start_worker: StartWorker) -> None:
    """A bind that gives no AsyncSession is noticed before the first message is taken."""
    with pytest.raises(RuntimeError, match="'function' as bind gives none"):
        start_worker("tests.asynchronous.synchronous")
