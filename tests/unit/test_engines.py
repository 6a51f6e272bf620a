"""One engine for each process, made after the fork, with a pool that fits the worker's."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext import asyncio as asyncio_of_sqlalchemy
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool

from celery_alchemy import Alchemy, ConfigurationError
from celery_alchemy import engine as engines
from celery_alchemy.engine import OVERFLOW, WorkerPool, pool_findings, set_worker_pool, worker_pool
from tests.services.databases import Database
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop

SERVERS = ("postgresql", "mariadb")


@pytest.fixture
def in_worker() -> Iterator[Callable[[str, int], None]]:
    """Let this process belong to a worker of that pool and concurrency."""
    before = worker_pool()
    yield lambda name, concurrency: set_worker_pool(WorkerPool(name, concurrency))
    set_worker_pool(before)


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize(
    ("pool", "concurrency", "size"),
    [("prefork", 8, 1), ("solo", 1, 1), ("threads", 8, 8), ("gevent", 100, 100), ("eventlet", 20, 20)],
)
def test_pool_fits_the_workers(
    database: Database, in_worker: Callable[[str, int], None], pool: str, concurrency: int, size: int
) -> None:
    """One connection for each task that runs at once in the process, and a few for tasks inside tasks."""
    in_worker(pool, concurrency)

    engine = Alchemy(bind=database.url).engine

    assert isinstance(engine.pool, QueuePool)
    assert (engine.pool.size(), engine.pool._max_overflow, engine.pool._pre_ping) == (size, OVERFLOW, True)


@pytest.mark.databases(*SERVERS)
def test_connections_are_checked_before_use(make_shop: MakeShop) -> None:
    """A connection that the server has cut between two tasks is replaced, and no task sees it."""
    shop = make_shop()

    @shop.task()
    def work(session: Session) -> int:
        return session.execute(text("SELECT 42")).scalar_one()

    first = work()
    cut = shop.database.disconnect_others()

    assert (first, cut, work()) == (42, 1, 42)


@pytest.mark.databases("postgresql")
def test_users_engine_options_win(database: Database, in_worker: Callable[[str, int], None]) -> None:
    """What the user says about the pool is what is made."""
    in_worker("prefork", 4)

    sized = Alchemy(bind=database.url, engine_options={"pool_size": 3, "max_overflow": 0, "pool_pre_ping": False})
    unpooled = Alchemy(bind=database.url, engine_options={"poolclass": NullPool})
    pool: Any = sized.engine.pool

    assert (pool.size(), pool._max_overflow, pool._pre_ping) == (3, 0, False)
    assert isinstance(unpooled.engine.pool, NullPool)


@pytest.mark.databases("sqlite")
def test_sqlite_is_set_up_for_several_processes(shop: Shop) -> None:
    """Write-ahead log, a busy time-out, foreign keys, and transactions that take the write lock at their begin."""
    with shop.alchemy.engine.begin() as connection:
        pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "busy_timeout", "foreign_keys")]
        locked = shop.database.transactions()

    assert pragmas == ["wal", 30_000, 1]
    assert locked == 1


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_sqlite_in_memory_works(url: str, in_worker: Callable[[str, int], None]) -> None:
    """A memory database keeps SQLAlchemy's own pool for it, in a worker too."""
    in_worker("solo", 1)
    engine = Alchemy(bind=url).engine

    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE x (y INTEGER)")
    with engine.begin() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM x").scalar()

    assert count == 0


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("whose", ["own", "foreign"])
def test_forked_child_leaves_the_parents_connection_alone(database: Database, whose: str) -> None:
    """The child connects by itself; the parent's connection is still the same afterwards, and in use."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    alchemy = Alchemy(app, database.url if whose == "own" else create_engine(database.url))
    before = _connection_id(alchemy.engine, database)

    childs = _in_child(lambda: _connection_id(alchemy.engine, database))

    assert childs not in (before, None)
    assert _connection_id(alchemy.engine, database) == before
    alchemy.engine.dispose()


@pytest.mark.databases("postgresql")
def test_forked_child_makes_its_own_engine(database: Database) -> None:
    """The engine that Alchemy made in the parent is not used in the child."""
    alchemy = Alchemy(bind=database.url)
    parents = id(alchemy.engine)

    assert _in_child(lambda: id(alchemy.engine) != parents and id(alchemy.engine) == id(alchemy.engine)) is True


def test_engine_is_made_once(database: Database) -> None:
    """Every use in a process gives the same engine."""
    alchemy = Alchemy(bind=database.url)

    assert alchemy.engine is alchemy.engine


@pytest.mark.parametrize("kind", ["engine", "async engine"])
def test_engines_are_made_by_what_stands_in_sqlalchemy_at_the_time(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Tracers, such as OpenTelemetry's instrumentation, put their own there after this package was imported."""
    alchemy = Alchemy(bind="sqlite://")
    made: list[Any] = []

    def traced(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1]

    if kind == "engine":
        monkeypatch.setattr(sqlalchemy, "create_engine", traced(sqlalchemy.create_engine))
        engine = alchemy.engine
        assert made == [engine]
    else:
        source = alchemy.async_source
        monkeypatch.setattr(asyncio_of_sqlalchemy, "create_async_engine", traced(asyncio_of_sqlalchemy.create_async_engine))

        async def use() -> None:
            async with alchemy.async_session() as session:
                await session.execute(text("SELECT 1"))
            await made[0].dispose()

        asyncio.run(use())
        assert source is alchemy.async_source
        assert len(made) == 1


def test_engine_that_cannot_be_renewed_keeps_no_other_from_it(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """After a fork every engine is renewed, also after one that raised; the failure is logged."""
    broken, sound = create_engine(database.url), create_engine(database.url)
    first, second = Alchemy(bind=broken), Alchemy(bind=sound)
    pools = [sound.pool]

    def refuse(close: bool = True) -> None:
        raise OSError("no")

    broken.dispose = refuse  # type: ignore[method-assign]
    engines._after_fork_in_child()

    assert sound.pool is not pools[0]
    assert "could not be renewed" in caplog.text
    assert (first.engine, second.engine) == (broken, sound)


@pytest.mark.databases("postgresql")
def test_small_pool_is_reported_with_the_fix(database: Database) -> None:
    """A user's engine that lends fewer connections than tasks run at once, named without its password."""
    url = database.engine.url.set(password="secret")
    engine = create_engine(url, pool_size=2, max_overflow=1)

    (finding,) = pool_findings(engine, WorkerPool("threads", 8))

    assert "at most 3 connections" in finding
    assert "8 tasks at once" in finding
    assert "pool_size=8" in finding
    assert "secret" not in finding
    assert pool_findings(engine, WorkerPool("prefork", 8)) == []
    assert pool_findings(create_engine(url, pool_size=8), WorkerPool("threads", 8)) == []
    assert pool_findings(create_engine(url, pool_size=2, max_overflow=-1), WorkerPool("threads", 8)) == []


@pytest.mark.databases("postgresql")
def test_connection_opened_before_the_fork_is_reported_with_the_fix(database: Database) -> None:
    """A connection that import-time code has opened stays open and unused in the parent."""
    engine = create_engine(database.url)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))

    (finding,) = pool_findings(engine, WorkerPool("prefork", 2))
    elsewhere = pool_findings(engine, WorkerPool("threads", 2))
    engine.dispose()

    assert "1 connection(s)" in finding
    assert "engine.dispose()" in finding
    assert elsewhere == []
    assert pool_findings(engine, WorkerPool("prefork", 2)) == []


@pytest.mark.databases("sqlite")
def test_callable_without_an_engine_says_so(database: Database) -> None:
    """`alchemy.engine` of sessions that are bound to none."""
    with pytest.raises(ConfigurationError, match="not bound to one"):
        Alchemy(bind=lambda: Session()).engine  # noqa: B018, PLW0108 - a class is refused, a callable is not.


def _connection_id(engine: Engine, database: Database) -> Any:
    query = "SELECT pg_backend_pid()" if database.name == "postgresql" else "SELECT CONNECTION_ID()"
    with engine.connect() as connection:
        return connection.execute(text(query)).scalar()


def _in_child(work: Callable[[], Any]) -> Any:
    """Run a function in a forked child and return its result, None if it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = None
        try:
            result = work()
        finally:
            os.write(writing, pickle.dumps(result))
            # As Celery's children end: without the parent's exit handlers.
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    return result
