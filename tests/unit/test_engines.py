"""One engine for each Alchemy, with a pool that fits the worker's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext import asyncio as asyncio_of_sqlalchemy
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool

from celery_alchemy import Alchemy, ConfigurationError
from celery_alchemy.sessions.engine import OVERFLOW, WorkerPool, pool_findings
from tests.services.databases import Database
from tests.unit.conftest import MakeShop
from tests.unit.forking import in_child
from tests.unit.shop import Shop

SERVERS = ("postgresql", "mariadb")


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


@pytest.mark.databases("sqlite")
def test_sqlite_transaction_begins_between_two_of_a_process_that_writes_without_a_pause(database: Database) -> None:
    """SQLite's own waits, of up to 100 ms, would miss most of the gaps."""
    engine = Alchemy(bind=database.url).engine
    engine.connect().close()
    has_begun, has_ended = threading.Event(), threading.Event()

    def write_on_and_on() -> None:
        writer = sqlite3.connect(str(engine.url.database), isolation_level=None)
        while not has_ended.is_set():
            writer.execute("BEGIN IMMEDIATE")
            has_begun.set()
            time.sleep(0.05)
            writer.execute("COMMIT")
            time.sleep(0.002)
        writer.close()

    thread = threading.Thread(target=write_on_and_on)
    thread.start()
    assert has_begun.wait(10)
    began = time.monotonic()
    try:
        for _ in range(10):
            with engine.begin():
                pass
            time.sleep(0.01)
    finally:
        has_ended.set()
        thread.join()

    assert time.monotonic() - began < 5


class Strike:
    """Raises at an instruction of the functions that begin a transaction on SQLite."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.happened = False

    def __call__(self, frame: FrameType, kind: str, _: object) -> Any:
        if frame.f_code.co_name in ("_begin_in_turn", "_wait_again") and not self.happened:
            frame.f_trace_opcodes = True
            self.left -= kind == "opcode"
            if self.left == 0:
                self.happened = True
                raise LookupError
        return self


def busy_time_outs_after_strikes(engine: Engine) -> Iterator[tuple[int, int]]:
    """Return after a strike at each instruction what a connection of the pool has, in AUTOCOMMIT and when it has begun."""
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    query = "PRAGMA busy_timeout"
    # CPython 3.12 traces instructions if this was so in any frame when the tracing begins.
    sys._getframe().f_trace_opcodes = True
    strike = Strike(1)
    for number in itertools.count(2):
        sys.settrace(strike)
        with contextlib.suppress(LookupError), engine.begin():
            pass
        sys.settrace(None)
        if not strike.happened:
            return
        with alone.connect() as connection:
            first = connection.exec_driver_sql(query).scalar_one()
        with engine.begin() as connection:
            yield first, connection.exec_driver_sql(query).scalar_one()
        strike = Strike(number)


@pytest.mark.databases("sqlite")
def test_sqlite_connection_keeps_its_busy_time_out_whatever_strikes_as_it_begins(database: Database) -> None:
    """A soft time limit may be raised by a signal at any instruction."""
    engine = Alchemy(bind=database.url, engine_options={"pool_size": 1, "max_overflow": 0}).engine

    # A trace function that raises may leave its thread handling an error for ever.
    found = in_child(lambda: list(busy_time_outs_after_strikes(engine)))

    assert len(found) > 50
    assert set(found) == {(30_000, 30_000)}


@pytest.mark.databases("sqlite", "sqlite+aiosqlite")
def test_sqlite_says_after_its_busy_time_out_that_it_is_locked(database: Database, busy: Callable[..., threading.Thread]) -> None:
    """Not after twice as long."""
    # Older versions of SQLAlchemy keep no connection of aiosqlite to a file.
    pooled = {"poolclass": AsyncAdaptedQueuePool} if "aiosqlite" in database.url else {}
    alchemy = Alchemy(bind=database.url, engine_options=pooled)

    async def begin() -> float:
        async with alchemy.async_session() as session:
            await (await session.connection()).exec_driver_sql("PRAGMA busy_timeout = 1000")
            await session.rollback()
            holder, began = busy(3.0), time.monotonic()
            with pytest.raises(OperationalError, match="locked"):
                await session.connection()
            took = time.monotonic() - began
        holder.join()
        return took

    if pooled:
        took = asyncio.run(begin())
    else:
        with alchemy.engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.execute("PRAGMA busy_timeout = 1000")
            holder, began = busy(3.0), time.monotonic()
            with pytest.raises(OperationalError, match="locked"):
                connection.begin()
            took = time.monotonic() - began
            holder.join()

    assert 1.0 <= took < 1.8


@pytest.fixture
def busy(database: Database) -> Callable[..., threading.Thread]:
    """Have another connection hold the lock for a moment."""

    def hold(seconds: float = 0.3) -> threading.Thread:
        has_lock = threading.Event()

        def work() -> None:
            with database.engine.connect() as connection:
                connection.exec_driver_sql("UPDATE x SET y = 1 WHERE y = 2")
                has_lock.set()
                time.sleep(seconds)
                connection.rollback()

        thread = threading.Thread(target=work)
        thread.start()
        has_lock.wait(10)
        return thread

    database.execute("CREATE TABLE x (y INTEGER)")
    database.execute("INSERT INTO x VALUES (7)")
    return hold


@pytest.mark.databases("sqlite")
def test_sqlite_connection_that_reads_waits_for_the_lock_too(database: Database, busy: Callable[[], threading.Thread]) -> None:
    """SQLite itself tells it at once that the database is locked."""
    engine = Alchemy(bind=database.url).engine
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        reading = driver.execute("SELECT y FROM x UNION ALL SELECT 8")
        reading.fetchone()
        holder = busy()

        with connection.begin():
            connection.exec_driver_sql("UPDATE x SET y = 9")

        reading.close()
        holder.join()
    assert database.rows("SELECT y FROM x") == [(9,)]


@pytest.mark.databases("sqlite+aiosqlite")
def test_loop_goes_on_while_a_connection_that_reads_waits_for_the_lock(
    database: Database, busy: Callable[[], threading.Thread]
) -> None:
    """As for a plain engine."""
    alchemy = Alchemy(bind=database.url)

    async def main() -> int:
        async with alchemy.async_session() as session:
            engine: Any = session.bind
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.01)

        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            reading = await raw.driver_connection.execute("SELECT y FROM x UNION ALL SELECT 8")
            await reading.fetchone()
            holder = busy()
            counting = asyncio.create_task(count())
            async with connection.begin():
                await connection.exec_driver_sql("UPDATE x SET y = 9")
            counting.cancel()
            await reading.close()
        holder.join()
        await engine.dispose()
        return turns

    assert asyncio.run(main()) > 5
    assert database.rows("SELECT y FROM x") == [(9,)]


AUTOCOMMIT: dict[str, dict[str, Any]] = {
    "engine": {"isolation_level": "AUTOCOMMIT"},
    "execution options": {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
    "connection": {},
    "connection of the recipe": {"connect_args": {"isolation_level": None}},
}


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("way", AUTOCOMMIT)
def test_sqlite_in_autocommit_keeps_what_it_writes_and_waits_for_nobody(database: Database, way: str) -> None:
    """As with an engine of SQLAlchemy; what begins a transaction on the same connection afterwards can be rolled back."""
    engine = Alchemy(bind=database.url, engine_options=AUTOCOMMIT[way]).engine
    database.execute("CREATE TABLE x (y INTEGER)")
    options = {} if way in ("engine", "execution options") else {"isolation_level": "AUTOCOMMIT"}

    with engine.connect().execution_options(**options) as alone:
        alone.exec_driver_sql("INSERT INTO x VALUES (1)")
    with database.engine.begin() as writer, engine.connect().execution_options(**options) as alone:
        writer.exec_driver_sql("INSERT INTO x VALUES (2)")
        seen = alone.exec_driver_sql("SELECT y FROM x").all()
    if options:
        with engine.connect() as connection:
            connection.exec_driver_sql("INSERT INTO x VALUES (3)")

    assert seen == [(1,)]
    assert database.rows("SELECT y FROM x ORDER BY y") == [(1,), (2,)]


@pytest.mark.databases("sqlite+aiosqlite")
def test_async_sqlite_in_autocommit_keeps_what_it_writes(database: Database) -> None:
    """As the sync one."""
    alchemy = Alchemy(bind=database.url)

    async def write() -> None:
        async with alchemy.async_session() as session:
            engine = session.bind
        assert isinstance(engine, AsyncEngine)
        async with engine.connect() as alone:
            await alone.execution_options(isolation_level="AUTOCOMMIT")
            await alone.execute(text("CREATE TABLE x (y INTEGER)"))
            await alone.execute(text("INSERT INTO x VALUES (1)"))
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO x VALUES (2)"))
        await engine.dispose()

    asyncio.run(write())

    assert database.rows("SELECT y FROM x") == [(1,)]


@pytest.mark.databases("sqlite+aiosqlite")
def test_async_sqlite_works_in_a_worker(database: Database, in_worker: Callable[[str, int], None]) -> None:
    """Also where SQLAlchemy has no pool of a size for it, before 2.0.38."""
    in_worker("threads", 4)
    alchemy = Alchemy(bind=database.url)

    async def read() -> int:
        async with alchemy.async_session() as session:
            engine = session.bind
            value: int = (await session.execute(text("SELECT 42"))).scalar_one()
        assert isinstance(engine, AsyncEngine)
        await engine.dispose()
        return value

    assert asyncio.run(read()) == 42


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

    childs = in_child(lambda: _connection_id(alchemy.engine, database))

    assert childs not in (before, None)
    assert _connection_id(alchemy.engine, database) == before
    alchemy.engine.dispose()


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


@pytest.mark.empties_its_pools
# The collector finalizes what ends together in any order: a driver may warn of a connection right before the pool closes it.
@pytest.mark.filterwarnings("ignore:.* was deleted while still open:ResourceWarning")
@pytest.mark.databases("postgresql", "mariadb", "sqlite")
def test_connections_of_an_engine_that_is_gone_are_closed(database: Database) -> None:
    """F74: it goes with its Alchemy, unless somebody keeps it; Python 3.13 warns of what is open then."""
    alchemy = Alchemy(Celery("shop", broker="memory://", set_as_current=False), database.url)
    engine: Engine | None = alchemy.engine
    closed: list[int] = []
    event.listen(alchemy.engine, "close", lambda *_: closed.append(1))
    with alchemy.engine.connect(), alchemy.engine.connect():
        pass

    del alchemy
    gc.collect()
    while_engine_is_kept = len(closed)
    assert engine is not None
    engine = None
    gc.collect()

    assert (while_engine_is_kept, len(closed)) == (0, 2)


AT_THE_END = """
import sys
from sqlalchemy import event
from celery_alchemy import Alchemy
alchemy = Alchemy(bind=sys.argv[1])
event.listen(alchemy.engine, "close", lambda *_: print("closed"))
with alchemy.session() as session:
    session.connection()
print("used")
"""


@pytest.mark.databases("postgresql", "sqlite")
def test_connections_are_closed_at_the_end_of_the_process(database: Database) -> None:
    """In order, and not by the interpreter's clearing of modules."""
    ended = subprocess.run([sys.executable, "-c", AT_THE_END, database.url], capture_output=True, check=False, text=True, timeout=60)

    assert (ended.stdout.split(), ended.stderr) == (["used", "closed"], "")


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
