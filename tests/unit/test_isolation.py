"""isolation_level and read_only hold in every transaction of a task, however its session comes about, or the task is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from celery_alchemy import Alchemy, ConfigurationError, SessionTask, released
from celery_alchemy.requests.event_loop import process_loop
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.conftest import MakeShop
from tests.unit.shop import Base, Book, Shop

_LEVEL = {"postgresql": "SHOW transaction_isolation", "mariadb": "SELECT @@tx_isolation"}
SERVERS = ("postgresql", "mariadb")


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


class RoutingSession(Session):
    """Chooses its engine by itself, as for read replicas."""

    primary: Engine

    def get_bind(self, mapper: Any = None, **kwargs: Any) -> Engine:
        """Return the primary, whatever is asked."""
        return self.primary


def _flask(engine: Engine) -> Any:
    # Not among the oldest packages of `make minimum`.
    flask, flask_sqlalchemy = pytest.importorskip("flask"), pytest.importorskip("flask_sqlalchemy")
    app = flask.Flask("shop")
    app.config["SQLALCHEMY_ENGINES"] = {"default": engine.url}
    app.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    db = flask_sqlalchemy.SQLAlchemy(app)
    context = app.app_context()
    context.push()
    return db.session, lambda: (db.engine.dispose(), context.pop())


def _sharded(engine: Engine) -> Any:
    return sessionmaker(
        class_=ShardedSession,
        shards={"one": engine},
        shard_chooser=lambda *_, **__: "one",
        identity_chooser=lambda *_, **__: ["one"],
        execute_chooser=lambda *_: ["one"],
    )


def _routing(engine: Engine) -> Any:
    return sessionmaker(class_=type("Routing", (RoutingSession,), {"primary": engine}))


#: Ways in which sessions come about, each from an engine.
BINDS: dict[str, Callable[[Engine], Any]] = {
    "engine": lambda engine: engine,
    "sessionmaker": sessionmaker,
    "binds": lambda engine: sessionmaker(binds={Base: engine}),
    "routing": _routing,
    "sharded": _sharded,
    "callable": lambda engine: lambda: Session(engine),
    "callable of a routing class": lambda engine: _routing(engine).__call__,
    "flask": _flask,
}


@pytest.fixture(params=list(BINDS))
def bound_app(request: pytest.FixtureRequest, database: Database) -> Iterator[Celery]:
    """An app whose sessions come about in one of these ways."""
    engine = create_engine(database.url, pool_size=1, max_overflow=0)
    Base.metadata.create_all(engine)
    bind = BINDS[request.param](engine)
    bind, close = bind if isinstance(bind, tuple) else (bind, lambda: None)
    app = Celery("bound", broker="memory://", set_as_current=False)
    Alchemy(app, bind)
    yield app
    close()
    engine.dispose()


@pytest.mark.databases(*SERVERS)
def test_level_holds_in_every_transaction(bound_app: Celery, database: Database) -> None:
    """In the first one, after a commit, after a rollback and after `released`; the next task on the connection has its own."""
    query = text(_LEVEL[database.name])

    def level(session: Session) -> str:
        session.query(Book).all()
        connection = session.connection(bind_arguments={"mapper": Book.__mapper__})
        return str(connection.execute(query).scalar_one()).upper().replace("-", " ")

    @task_of(bound_app, name="strict", isolation_level="SERIALIZABLE")
    def strict(session: Session) -> list[str]:
        levels = [level(session)]
        session.commit()
        levels.append(level(session))
        session.rollback()
        levels.append(level(session))
        with released(session):
            levels.append(level(session))
        return [*levels, level(session)]

    @task_of(bound_app, name="plain")
    def plain(session: Session) -> str:
        return level(session)

    before, within, after = plain(), strict(), plain()

    assert within == ["SERIALIZABLE"] * 5
    assert before == after != "SERIALIZABLE"


@pytest.mark.databases("postgresql", "mariadb", "sqlite")
def test_read_only_holds_in_every_transaction(bound_app: Celery, database: Database) -> None:
    """The database refuses a write, also in a later transaction; the next task may write."""

    @task_of(bound_app, name="report", read_only=True)
    def report(session: Session, commit_first: bool) -> None:
        session.query(Book).all()
        if commit_first:
            session.commit()
        session.add(Book(title="refused"))
        session.flush()

    @task_of(bound_app, name="add")
    def add(session: Session) -> None:
        session.add(Book(title="Emma"))

    for commit_first in (False, True):
        with pytest.raises(DBAPIError, match=r"read.?only|READ ONLY|query_only"):
            report(commit_first)
    add()

    assert database.rows("SELECT title FROM book") == [("Emma",)]


@pytest.mark.databases(*SERVERS)
def test_level_holds_in_a_once_body_whose_start_has_committed(make_shop: MakeShop) -> None:
    """Its start and its body are two transactions of one session."""
    engine = create_engine(make_shop().database.url)
    app = Celery("once", broker="memory://", backend="cache+memory://", set_as_current=False)
    alchemy = Alchemy(app, lambda: Session(engine))
    shop = make_shop()
    shop.alchemy.create_tables()

    @task_of(app, name="strict", once=True, isolation_level="SERIALIZABLE")
    def strict(session: Session) -> str:
        return str(session.execute(text(_LEVEL[shop.database.name])).scalar_one())

    level = strict.apply().get()
    alchemy.engine.dispose()

    assert level.upper() == "SERIALIZABLE"


@pytest.mark.databases("postgresql+asyncpg", "postgresql+psycopg")
@pytest.mark.parametrize("form", ["engine", "sessionmaker", "routing"])
def test_level_holds_for_async_tasks(database: Database, form: str) -> None:
    """Also where the sync session class chooses the engine, and after `released`."""
    engine = create_async_engine(database.url, poolclass=NullPool)
    routing = type("Routing", (RoutingSession,), {"primary": engine.sync_engine})
    binds: dict[str, Any] = {
        "engine": engine,
        "sessionmaker": async_sessionmaker(engine),
        "routing": async_sessionmaker(sync_session_class=routing),
    }
    app = Celery("async", broker="memory://", set_as_current=False)
    Alchemy(app, binds[form])

    @task_of(app, name="strict", isolation_level="SERIALIZABLE")
    async def strict(session: AsyncSession) -> list[str]:
        query = text(_LEVEL["postgresql"])
        levels = [(await session.execute(query)).scalar_one()]
        async with released(session):
            levels.append((await session.execute(query)).scalar_one())
        return levels

    levels = strict()
    asyncio.run(engine.dispose())

    assert levels == ["serializable"] * 2


class TestRefused:
    """What cannot have the level is refused before the body's first statement, or when the task is made."""

    @pytest.mark.databases("postgresql")
    def test_session_in_a_callers_connection(self, shop: Shop) -> None:
        """Its transaction began with another level, which cannot be changed."""
        with shop.alchemy.engine.connect() as connection:
            connection.begin()
            app = Celery("joined", broker="memory://", set_as_current=False)
            Alchemy(app, lambda: Session(connection))

            @task_of(app, name="strict", isolation_level="SERIALIZABLE")
            def strict(session: Session) -> None:
                session.execute(text("SELECT 1"))

            with pytest.raises(ConfigurationError, match=r"'SERIALIZABLE', and this connection of its session has READ COMMITTED"):
                strict()

    @pytest.mark.databases("postgresql")
    def test_connection_of_the_right_level_is_not(self, shop: Shop) -> None:
        """Who gives the connection may have set it."""
        with shop.alchemy.engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            connection.begin()
            app = Celery("joined", broker="memory://", set_as_current=False)
            Alchemy(app, lambda: Session(connection))

            @task_of(app, name="strict", isolation_level="SERIALIZABLE")
            def strict(session: Session) -> int:
                return int(session.execute(text("SELECT 1")).scalar_one())

            assert strict() == 1

    @pytest.mark.databases("sqlite", "postgresql", "mariadb")
    @pytest.mark.parametrize("options", [{"once": True}, {"transient_retries": 1}, {"read_only": True}])
    def test_autocommit_of_a_bind_that_shows_it(self, database: Database, options: dict[str, Any]) -> None:
        """When the task is made, or when the Alchemy is tied to an app that has it."""
        urls: list[dict[str, Any]] = [
            {"bind": database.url, "engine_options": {"isolation_level": "AUTOCOMMIT"}},
            {"bind": create_engine(database.url, isolation_level="AUTOCOMMIT")},
            {"bind": sessionmaker(create_engine(database.url).execution_options(isolation_level="AUTOCOMMIT"))},
        ]
        for given in urls:
            first, later = (Celery(name, broker="memory://", set_as_current=False) for name in ("first", "later"))
            Alchemy(first, **given)
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                task_of(first, lazy=False, **options)(_work)
            task_of(later, lazy=False, base=SessionTask, **options)(_work)
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                Alchemy(later, **given)

    @pytest.mark.databases("sqlite", "postgresql", "mariadb")
    @pytest.mark.parametrize("options", [{"transient_retries": 1}, {"read_only": True}])
    def test_autocommit_that_shows_at_the_first_use(self, database: Database, options: dict[str, Any]) -> None:
        """Before the body's first statement, which would not be rolled back."""
        engine = create_engine(database.url, isolation_level="AUTOCOMMIT")
        app = Celery("late", broker="memory://", set_as_current=False)
        Alchemy(app, lambda: Session(engine))
        Base.metadata.create_all(engine)

        @task_of(app, name="write", **options)
        def write(session: Session) -> None:
            session.execute(text("INSERT INTO book (title) VALUES ('Emma')"))

        with pytest.raises(ConfigurationError, match=rf"The task has {next(iter(options))}, and .* AUTOCOMMIT"):
            write()
        engine.dispose()

        assert database.rows("SELECT title FROM book") == []

    @pytest.mark.databases("postgresql")
    def test_autocommit_that_a_listener_has_set(self, database: Database) -> None:
        """By the driver's own attribute."""
        engine = create_engine(database.url)
        event.listen(engine, "connect", lambda connection, record: setattr(connection, "autocommit", True))
        app = Celery("listener", broker="memory://", set_as_current=False)
        Alchemy(app, engine)

        @task_of(app, name="write", read_only=True)
        def write(session: Session) -> None:
            session.execute(text("CREATE TABLE book (title text)"))

        with pytest.raises(ConfigurationError, match="read_only, and"):
            write()
        engine.dispose()

    def test_level_that_the_database_does_not_have(self) -> None:
        """It names those that there are."""
        app = Celery("unknown", broker="memory://", set_as_current=False)
        Alchemy(app, "sqlite://")

        with pytest.raises(ConfigurationError, match="'SERIALIZABLE'"):
            task_of(app, lazy=False, isolation_level="SNAPSHOT")(_work)


@pytest.mark.databases("sqlite")
def test_unknown_level_of_a_bind_that_shows_nothing_is_the_databases_own_error(shop: Shop) -> None:
    """SQLAlchemy names the levels that there are, before the first statement."""
    app = Celery("unknown", broker="memory://", set_as_current=False)
    Alchemy(app, lambda: Session(shop.alchemy.engine))

    @task_of(app, isolation_level="SNAPSHOT")
    def work(session: Session) -> None:
        session.connection()

    with pytest.raises(Exception, match="SERIALIZABLE"):
        work()


def _work(session: Session) -> None: ...
