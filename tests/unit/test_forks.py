"""F38, F49, F51: no connection crosses a fork; the engine is one object, and its pool fits."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from celery_alchemy import Alchemy, ForkedConnectionError
from celery_alchemy.sessions.engine import OVERFLOW, WorkerPool, set_worker_pool, worker_pool
from tests.services.databases import Database
from tests.unit.forking import in_child
from tests.unit.shop import Base, Book

SERVERS = ("postgresql", "mariadb")
DRIVERS = {"postgresql": ("psycopg", "psycopg2"), "mariadb": ("pymysql", "mysqldb")}


def connection_id(connection: Connection | Session) -> int:
    """Return the server's number of a connection."""
    bind = connection if isinstance(connection, Connection) else connection.connection()
    is_postgresql = bind.dialect.name == "postgresql"
    query = "SELECT pg_backend_pid()" if is_postgresql else "SELECT CONNECTION_ID()"
    return int(connection.execute(text(query)).scalar_one())


def ask_engine(engine: Engine) -> int:
    """Return the number of a connection of an engine."""
    with engine.connect() as connection:
        return connection_id(connection)


class Ways:
    """Ways to a connection, none of which a library would be told of; each asks for its number."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self._url = url
        self._stack = stack

    def make_engine(self, **options: Any) -> Engine:
        """Return an engine that the end of the test disposes of."""
        engine = create_engine(self._url, **options)
        self._stack.callback(engine.dispose)
        return engine

    def engine(self) -> Callable[[], int]:
        """An engine that a body uses directly."""
        engine = self.make_engine()
        return lambda: ask_engine(engine)

    def binds(self) -> Callable[[], int]:
        """The second database of a sessionmaker."""
        maker = sessionmaker(self.make_engine(), binds={Book: self.make_engine()})
        alchemy = Alchemy(bind=maker)
        return lambda: self._ask(alchemy, mapper=Book)

    def configured_later(self) -> Callable[[], int]:
        """A sessionmaker that gets its engine after the Alchemy was made."""
        maker = sessionmaker()
        alchemy = Alchemy(bind=maker)
        maker.configure(bind=self.make_engine())
        return lambda: self._ask(alchemy)

    def callable_(self) -> Callable[[], int]:
        """A callable that returns sessions."""
        maker = sessionmaker(self.make_engine())
        alchemy = Alchemy(bind=lambda: maker(info={}))
        return lambda: self._ask(alchemy)

    def flask(self) -> Callable[[], int]:
        """Flask-SQLAlchemy's engine, and its sessions."""
        flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
        app = pytest.importorskip("flask").Flask("shop")
        app.config["SQLALCHEMY_DATABASE_URI"] = self._url
        db = flask_sqlalchemy.SQLAlchemy(app)
        self._stack.enter_context(app.app_context())
        self._stack.callback(db.engine.dispose)
        alchemy = Alchemy(bind=db.session)
        return lambda: self._ask(alchemy)

    def listening(self) -> Callable[[], int]:
        """A pool with listeners, one connection, and none to spare."""
        engine = self.make_engine(pool_size=1, max_overflow=0)
        event.listen(engine, "checkout", lambda *_: None)
        return lambda: ask_engine(engine)

    def static(self) -> Callable[[], int]:
        """A pool of one connection that is never given back."""
        engine = self.make_engine(poolclass=StaticPool)
        return lambda: ask_engine(engine)

    @staticmethod
    def _ask(alchemy: Alchemy, **where: Any) -> int:
        with alchemy.session() as session:
            return connection_id(session.connection(where))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close at the end what a test has opened."""
    with ExitStack() as stack:
        yield stack


WAYS = ["engine", "binds", "configured_later", "callable_", "flask", "listening", "static"]


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("way", WAYS)
def test_no_connection_crosses_a_fork(database: Database, stack: ExitStack, way: str) -> None:
    """Two children connect by themselves, by whatever way; the parent keeps its connection."""
    ask: Callable[[], int] = getattr(Ways(database.url, stack), way)()
    before = ask()

    children = [in_child(lambda: (ask(), ask())) for _ in range(2)]

    assert [first == second for first, second in children] == [True, True]
    assert len({before, *(first for first, _ in children)}) == 3
    assert ask() == before


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("number", [0, 1])
def test_no_driver_says_goodbye_on_the_parents_socket(database: Database, stack: ExitStack, number: int) -> None:
    """The parent's connection is whole after a child has collected its garbage."""
    driver = DRIVERS[database.name][number]
    pytest.importorskip({"mysqldb": "MySQLdb"}.get(driver, driver))
    url = make_url(database.url).set(drivername=f"{make_url(database.url).get_backend_name()}+{driver}")
    engine = create_engine(url)
    stack.callback(engine.dispose)
    before = ask_engine(engine)

    def work() -> int:
        import gc

        asked = ask_engine(engine)
        engine.dispose()
        gc.collect()
        return asked

    child = in_child(work)

    assert child != before
    assert ask_engine(engine) == before


@pytest.mark.databases(*SERVERS)
def test_session_that_was_in_use_says_so_in_the_child(database: Database, stack: ExitStack) -> None:
    """Closed there, it gets a connection of the child's; the parent's transaction goes on."""
    engine = Ways(database.url, stack).make_engine(pool_size=1, max_overflow=0)
    Base.metadata.create_all(engine)
    registry = scoped_session(sessionmaker(engine))
    stack.callback(registry.remove)
    registry.add(Book(title="Emma"))
    registry.flush()
    before = connection_id(registry())

    def work() -> tuple[str, int]:
        try:
            registry.execute(text("SELECT 1"))
        except ForkedConnectionError as exc:
            error = str(exc)
        registry.remove()
        return error, connection_id(registry())

    error, child = in_child(work)
    registry.commit()

    assert "in use when process" in error
    assert child != before
    assert database.rows("SELECT title FROM book") == [("Emma",)]


@pytest.mark.databases("postgresql")
def test_pool_does_not_keep_a_lock_of_another_thread(database: Database, stack: ExitStack) -> None:
    """Nor a place: a fork may come while another thread of the parent has either."""
    engine = Ways(database.url, stack).make_engine(pool_size=1, max_overflow=0, pool_timeout=5)
    ask_engine(engine)
    pool: Any = engine.pool
    pool._overflow += 1
    with pool._overflow_lock:
        child = in_child(lambda: ask_engine(engine))
    pool._overflow -= 1

    assert isinstance(child, int)


def test_sqlite_database_in_memory_is_copied_by_the_fork(stack: ExitStack) -> None:
    """Nothing is shared there, so what the parent has put into it stays."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    stack.callback(engine.dispose)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE x (y INTEGER)")
        connection.exec_driver_sql("INSERT INTO x VALUES (7)")

    def work() -> Any:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT y FROM x").scalar()

    assert in_child(work) == 7


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("pool", [QueuePool, NullPool])
def test_child_opens_a_sqlite_file_anew(database: Database, stack: ExitStack, pool: Any) -> None:
    """SQLite forbids to carry one across: https://www.sqlite.org/howtocorrupt.html, 2.6."""
    engine = create_engine(database.url, poolclass=pool)
    stack.callback(engine.dispose)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE x (y INTEGER)")
        connection.exec_driver_sql("PRAGMA cache_size = 77")

    def work() -> Any:
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO x VALUES (7)")
            return connection.exec_driver_sql("PRAGMA cache_size").scalar()

    assert in_child(work) != 77
    assert database.rows("SELECT y FROM x") == [(7,)]


EARLIER = """
import os, sys
from sqlalchemy import create_engine, text
engine = create_engine(sys.argv[1])
query = text(sys.argv[2])
with engine.connect() as connection:
    before = connection.execute(query).scalar()
import celery_alchemy
pid = os.fork()
with engine.connect() as connection:
    after = connection.execute(query).scalar()
if pid == 0:
    os._exit(after == before)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child had its parent's connection"
with engine.connect() as connection:
    assert (before, before) == (after, connection.execute(query).scalar())
"""


@pytest.mark.databases(*SERVERS)
def test_connection_that_is_older_than_the_import_does_not_cross(database: Database) -> None:
    """A query at the import of a module that comes before this package."""
    query = "SELECT pg_backend_pid()" if database.name == "postgresql" else "SELECT CONNECTION_ID()"

    ended = subprocess.run(
        [sys.executable, "-c", EARLIER, database.url, query],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.databases("postgresql")
def test_async_engine_of_the_users_begins_anew_in_the_child(database: Database) -> None:
    """Its first event loop there uses it, with its own connections; the parent's loop goes on."""
    engine = create_async_engine(database.url)
    alchemy = Alchemy(bind=engine)
    told: list[int] = []
    event.listen(engine.sync_engine, "connect", lambda *_: told.append(1))

    async def ask() -> tuple[int, bool]:
        async with alchemy.async_session() as session:
            number = await session.run_sync(connection_id)
            return number, session.bind is engine

    loop = asyncio.new_event_loop()
    before = loop.run_until_complete(ask())
    child = in_child(lambda: (asyncio.run(ask()), len(told)))
    after = loop.run_until_complete(ask())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()

    assert before == after
    assert child[0][0] != before[0]
    assert (child[0][1], child[1]) == (True, 2)


# --- one engine for the life of an Alchemy ------------------------------------------------------


@pytest.fixture
def worker_before() -> Iterator[None]:
    """Put back which worker this process belongs to."""
    before = worker_pool()
    yield
    set_worker_pool(before)


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.parametrize("is_used", [False, True])
def test_engine_keeps_its_listeners_across_a_fork(database: Database, stack: ExitStack, is_used: bool) -> None:
    """What listens since the import, for pgvector or a token, is told of the child's connections."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    alchemy = Alchemy(app, database.url)
    engine = alchemy.engine
    stack.callback(engine.dispose)
    told: list[str] = []

    @event.listens_for(engine, "connect")
    def connected(*_: Any) -> None:
        told.append("connect")

    event.listen(engine, "do_connect", lambda *_: told.append("do_connect"))
    if is_used:
        ask_engine(engine)
    before = list(told)

    def work() -> Any:
        ask_engine(alchemy.engine)
        with alchemy.session() as session:
            connection_id(session)
            same = session.bind is engine
        return same, told[len(before) :], event.contains(engine, "connect", connected)

    assert in_child(work) == (True, ["do_connect", "connect"], True)


@pytest.mark.databases("postgresql")
@pytest.mark.usefixtures("worker_before")
@pytest.mark.parametrize(("name", "size"), [("prefork", 1), ("threads", 8), ("gevent", 8)])
def test_pool_of_an_engine_that_is_older_than_the_worker_fits(database: Database, stack: ExitStack, name: str, size: int) -> None:
    """A module has used it at its import; the worker's start sizes it, for the children too."""
    set_worker_pool(None)
    alchemy = Alchemy(bind=database.url)
    told: list[int] = []
    event.listen(alchemy.engine, "connect", lambda *_: told.append(1))
    engine = alchemy.engine
    stack.callback(engine.dispose)
    with engine.connect(), engine.connect():
        pass

    set_worker_pool(WorkerPool(name, 8))

    def shape() -> tuple[bool, int, int]:
        with engine.connect():
            pool: Any = engine.pool
            return alchemy.engine is engine, pool.size(), pool._max_overflow

    assert [shape(), in_child(shape)] == [(True, size, OVERFLOW)] * 2
    assert len(told) == (3 if size == 1 else 2)


@pytest.mark.databases("postgresql")
@pytest.mark.usefixtures("worker_before")
def test_pool_grows_with_the_worker_and_keeps_what_is_open(database: Database, stack: ExitStack) -> None:
    """F51: connections that are in use count, and the pool lends as many as tasks may run."""
    set_worker_pool(WorkerPool("gevent", 2))
    alchemy = Alchemy(bind=database.url, engine_options={"pool_timeout": 0.01})
    engine = alchemy.engine
    stack.callback(engine.dispose)
    with ExitStack() as taken:
        first = [connection_id(taken.enter_context(engine.connect())) for _ in range(2 + OVERFLOW)]
        set_worker_pool(WorkerPool("gevent", 17))
        more = [connection_id(taken.enter_context(engine.connect())) for _ in range(15)]
        pool: Any = engine.pool
        counted = pool.checkedout()
        with pytest.raises(Exception, match="QueuePool limit"):
            engine.connect()

    assert len({*first, *more}) == 17 + OVERFLOW
    assert (counted, pool.checkedout(), pool.checkedin()) == (17 + OVERFLOW, 0, 17)
    assert set(first[:2]) & {ask_engine(engine)} or ask_engine(engine) in {*first, *more}


@pytest.mark.databases("postgresql")
@pytest.mark.usefixtures("worker_before")
def test_pool_options_of_the_user_do_not_follow_the_worker(database: Database) -> None:
    """What the user has said of the pool stays."""
    set_worker_pool(None)
    sized = Alchemy(bind=database.url, engine_options={"pool_size": 3, "max_overflow": 0})
    unpooled = Alchemy(bind=database.url, engine_options={"poolclass": NullPool})
    engines = sized.engine, unpooled.engine

    set_worker_pool(WorkerPool("threads", 8))

    pool: Any = engines[0].pool
    assert (pool.size(), pool._max_overflow) == (3, 0)
    assert isinstance(engines[1].pool, NullPool)
