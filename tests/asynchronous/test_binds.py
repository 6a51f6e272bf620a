"""Where AsyncSessions come from: each kind of bind, one engine for each loop, and what is refused when a task is made."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, SessionParameterError
from celery_alchemy.requests.event_loop import process_loop
from celery_alchemy.requests.registry import home_of
from celery_alchemy.sessions.engine import set_worker_pool
from celery_alchemy.worker.boot_steps import SessionStep
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Base, Book
from tests.waiting import eventually

pytestmark = pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg")


class OwnAsyncSession(AsyncSession):
    """A user's subclass of AsyncSession."""


class OwnSession(Session):
    """A user's subclass of Session, for the sync half."""


@pytest.fixture
def app(database: Database) -> Iterator[Celery]:
    """An app without an Alchemy, on a database with the table of books."""
    Base.metadata.create_all(database.engine)
    app = Celery("binds", broker="memory://", backend="cache+memory://", set_as_current=False)
    # The memory broker is the whole process's.
    _waiting(app)
    yield app
    home = home_of(app)
    engine = None if home is None else home.source.engine()
    if engine is not None:
        engine.dispose()
    app.close()


BINDS: dict[str, Callable[[str], Any]] = {
    "URL": lambda url: url,
    "AsyncEngine": create_async_engine,
    "async_sessionmaker": lambda url: async_sessionmaker(create_async_engine(url), class_=OwnAsyncSession),
}


@pytest.mark.parametrize("kind", BINDS)
def test_each_kind_of_bind_gives_async_sessions(app: Celery, database: Database, kind: str) -> None:
    """And synchronous tasks of the same app get Sessions on the same database."""
    Alchemy(app, BINDS[kind](database.url))

    @task_of(app)
    async def add(session: AsyncSession, title: str) -> str:
        session.add(Book(title=title))
        return type(session).__name__

    @task_of(app)
    def titles(session: Session) -> list[str]:
        return list(session.scalars(select(Book.title)))

    assert add("Emma") == ("OwnAsyncSession" if kind == "async_sessionmaker" else "AsyncSession")
    assert titles() == ["Emma"]


@pytest.mark.parametrize("kind", ["URL", "AsyncEngine", "plain async_sessionmaker"])
def test_async_session_is_of_the_class_of_the_annotation(app: Celery, database: Database, kind: str) -> None:
    """A subclass has methods of its own, such as SQLModel's `exec()`."""
    binds = {**BINDS, "plain async_sessionmaker": lambda url: async_sessionmaker(create_async_engine(url))}
    Alchemy(app, binds[kind](database.url))

    @task_of(app, bind=True)
    async def add(self: Any, session: OwnAsyncSession, title: str) -> tuple[str, str]:
        session.add(Book(title=title))
        return type(session).__name__, type(self.session).__name__

    assert add("Emma") == ("OwnAsyncSession", "OwnAsyncSession")


def test_url_of_the_settings_gives_async_sessions(app: Celery, database: Database) -> None:
    """`sqlalchemy_url` may name the synchronous driver; an async one that is installed is taken for async tasks."""
    app.conf.sqlalchemy_url = database.engine.url.render_as_string(hide_password=False)
    Alchemy(app)

    @task_of(app)
    async def add(session: AsyncSession, title: str) -> bool:
        session.add(Book(title=title))
        return session.get_bind().dialect.is_async

    assert add("Emma") is True
    assert database.rows("SELECT title FROM book") == [("Emma",)]


@pytest.mark.databases("sqlite+aiosqlite")
def test_sync_half_of_the_users_sessionmaker_is_kept(app: Celery, database: Database) -> None:
    """`sync_session_class` and the other options of an async_sessionmaker hold in a task."""
    maker = async_sessionmaker(create_async_engine(database.url), sync_session_class=OwnSession, info={"user": "own"})
    Alchemy(app, maker)

    @task_of(app)
    async def look(session: AsyncSession) -> tuple[bool, Any]:
        return isinstance(session.sync_session, OwnSession), session.info["user"]

    assert look() == (True, "own")


@pytest.mark.databases("postgresql+asyncpg")
def test_users_engine_serves_two_loops(app: Celery, database: Database) -> None:
    """A web process that also runs tasks has two loops: the second gets a pool of its own, with the engine's listeners."""
    engine = create_async_engine(database.url, pool_size=1, max_overflow=0)
    begun: list[str] = []
    event.listen(engine.sync_engine, "begin", lambda connection: begun.append("begin"))
    Alchemy(app, engine)

    @task_of(app)
    async def look(session: AsyncSession) -> tuple[int, Any]:
        pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        bind: Any = session.bind
        return pid, bind.pool.size()

    async def main() -> tuple[Any, Any, Any]:
        mine = await look()
        others = await asyncio.to_thread(look)
        begun_before = len(begun)
        return mine, others, (begun_before, await look())

    mine, others, (begun_before, again) = asyncio.run(main())

    assert mine == again
    assert mine[0] != others[0]
    assert mine[1] == others[1] == 1
    assert begun_before == 2


@pytest.mark.databases("sqlite+aiosqlite")
def test_engine_is_that_of_the_running_loop(app: Celery, database: Database) -> None:
    """`async_session()` in a loop of the user's own, and a task in the process's, do not share a pool."""
    alchemy = Alchemy(app, database.url)

    @task_of(app)
    async def pool(session: AsyncSession) -> int:
        return id(session.get_bind().engine.pool)

    async def main() -> int:
        async with alchemy.async_session() as session:
            session.add(Book(title="Emma"))
            await session.commit()
            return id(session.get_bind().engine.pool)

    own = asyncio.run(main())

    assert pool() == pool() != own
    assert database.rows("SELECT title FROM book") == [("Emma",)]


@pytest.mark.databases("sqlite+aiosqlite")
def test_async_session_is_at_hand_inside_its_block(app: Celery, database: Database) -> None:
    """`delay_on_commit` finds it; after the block, what was not committed is rolled back."""
    alchemy = Alchemy(app, database.url)

    @task_of(app)
    def note(title: str) -> None: ...

    async def main() -> int:
        async with alchemy.async_session() as session:
            session.add(Book(title="Emma"))
            note.delay_on_commit("Emma")
            waiting = _waiting(app)
            await session.commit()
            session.add(Book(title="Persuasion"))
            await session.flush()
            return waiting

    before = asyncio.run(main())

    assert (before, _waiting(app)) == (0, 1)
    assert database.rows("SELECT title FROM book") == [("Emma",)]


def _waiting(app: Celery) -> int:
    """Take everything out of the app's queue and return how much it was."""
    with app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        channel.queue_declare("celery")
        return int(channel.queue_purge("celery") or 0)


@pytest.mark.databases("sqlite+aiosqlite")
def test_isolation_level_of_an_async_task_is_used(app: Celery, database: Database) -> None:
    """Also by sessions that choose their engine by the class that they are asked for."""
    engine = create_async_engine(database.url)
    bound: Any = async_sessionmaker(engine)
    unbound: Any = async_sessionmaker(binds={Book: engine})

    async def level(session: AsyncSession) -> str:
        return str(await (await session.connection()).get_isolation_level())

    Alchemy(app, bound)
    assert task_of(app, isolation_level="READ UNCOMMITTED")(level)() == "READ UNCOMMITTED"

    async def level_of_book(session: AsyncSession) -> str:
        return str(await (await session.connection(bind_arguments={"mapper": Book})).get_isolation_level())

    other = Celery("other", set_as_current=False)
    Alchemy(other, unbound)
    assert task_of(other, isolation_level="READ UNCOMMITTED")(level_of_book)() == "READ UNCOMMITTED"


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.parametrize("kind", ["sessionmaker", "callable"])
def test_bind_without_async_sessions_is_refused(app: Celery, database: Database, kind: str) -> None:
    """The error names what was given, and what gives AsyncSessions."""
    maker = sessionmaker(create_engine(database.engine.url))
    bind: Any = maker if kind == "sessionmaker" else functools.partial(maker)
    Alchemy(app, bind)

    @task_of(app)
    async def look(session: AsyncSession) -> None: ...

    with pytest.raises(ConfigurationError, match="Give Alchemy a URL, an AsyncEngine or an async_sessionmaker"):
        look()


@pytest.mark.databases("sqlite+aiosqlite")
def test_session_of_the_wrong_kind_is_refused_when_the_task_is_made(app: Celery, database: Database) -> None:
    """Both ways, also in an Annotated or optional annotation, and before anything is sent."""
    Alchemy(app, database.url)

    async def blocks(session: Session) -> None: ...

    async def blocks_too(session: Annotated[Session | None, "main"] = None) -> None: ...

    def cannot_await(session: AsyncSession) -> None: ...

    for body, reason in (
        (blocks, "would block the event loop"),
        (blocks_too, "would block the event loop"),
        (cannot_await, "which it cannot await"),
    ):
        with pytest.raises(SessionParameterError, match=reason):
            task_of(app)(body).name  # noqa: B018 - Celery makes a task when it is first looked at.


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_worker_of_greenlets_refuses_async_tasks(app: Celery, database: Database, pool: str) -> None:
    """Either of them, by its name in the message."""
    Alchemy(app, database.url)

    @task_of(app, name="look")
    async def look(session: AsyncSession) -> None: ...

    app.finalize()

    with pytest.raises(SystemExit, match=f"task 'look' is an `async def`, which the {pool} pool cannot run"):
        SessionStep(_Worker(app, pool))


class _Worker:
    """What a bootstep is told of its worker."""

    concurrency = 4

    def __init__(self, app: Celery, pool: str) -> None:
        self.app = app
        self.pool_cls = f"celery.concurrency.{pool}:TaskPool"


@pytest.fixture(autouse=True)
def _forget_worker_pool() -> Iterator[None]:
    yield
    set_worker_pool(None)


@pytest.mark.databases("postgresql+asyncpg", "postgresql+psycopg")
def test_closing_the_loop_closes_its_connections(app: Celery, database: Database) -> None:
    """And cancels what runs in it; the next task starts another loop."""
    Alchemy(app, database.url)
    left: list[asyncio.Task[None]] = []

    @task_of(app)
    async def look(session: AsyncSession) -> Any:
        left.append(asyncio.ensure_future(asyncio.sleep(60)))
        await session.execute(text("SELECT 1"))
        return asyncio.get_running_loop()

    loop = look()
    assert len(database.connections()) == 1
    process_loop.close()

    eventually(lambda: database.connections() == [], what="the server has seen its connections close")
    assert left[0].cancelled()
    assert loop.is_closed()
    assert look() is not loop


@pytest.mark.databases("postgresql+asyncpg")
def test_loop_closed_without_notice_leaves_no_engine_behind(app: Celery, database: Database) -> None:
    """Its engine is forgotten when the next loop asks for one."""
    alchemy = Alchemy(app, database.url)
    engines: list[AsyncEngine] = []

    async def use() -> None:
        async with alchemy.async_session() as session:
            bind: Any = session.bind
            engines.append(bind)

    for _ in range(2):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use())
        loop.close()

    source: Any = alchemy.async_source
    assert engines[0] is not engines[1]
    assert list(source._engine.__self__._engines.values()) == [engines[1]]
