"""Sessions that a user's own code makes: what a task can take for its own, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import Alchemy, CommitIgnoredError, ConfigurationError, SessionTask
from celery_alchemy.testing import no_leaks
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Base, Book

pytestmark = pytest.mark.databases("sqlite")

#: As a module of an application has it.
db = SimpleNamespace(session=None)


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    """The application's engine, on a database with the table of books."""
    engine = create_engine(database.url)
    Base.metadata.create_all(engine)
    with no_leaks():
        yield engine
    engine.dispose()


@pytest.fixture
def app() -> Iterator[Celery]:
    """A fresh app."""
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    yield app
    app.close()


def _titles(database: Database) -> list[str]:
    return [row[0] for row in database.rows("SELECT title FROM book ORDER BY id")]


def _of_module() -> Session:
    session: Session = db.session()
    return session


def _closure(registry: Any) -> Callable[[], Any]:
    return lambda: registry()  # noqa: PLW0108 - as people write it.


class _Maker:
    def __init__(self, registry: Any) -> None:
        self.registry = registry

    def __call__(self) -> Session:
        session: Session = self.registry()
        return session


CALLABLES: dict[str, Callable[[Any], Any]] = {
    "db.session": lambda registry: _of_module,
    "registry": _closure,
    "the scoped_session": lambda registry: registry.__call__,
    "its registry": _Maker,
    "its registry, in a partial": lambda registry: functools.partial(_Maker(registry)),
}


@pytest.mark.parametrize("where", ["alchemy", "session_factory"])
@pytest.mark.parametrize("kind", CALLABLES)
def test_session_that_is_in_use_is_refused(app: Celery, engine: Engine, database: Database, kind: str, where: str) -> None:
    """A nested task or an eager call would commit and detach what is the caller's."""
    registry = db.session = scoped_session(sessionmaker(engine))
    make = CALLABLES[kind](registry)
    options: dict[str, Any] = {}
    if where == "alchemy":
        Alchemy(app, make)
    else:
        members = {"abstract": True, "session_factory": staticmethod(make)}
        options["base"] = type("ShopTask", (SessionTask,), members)

    @task_of(app, **options)
    def work(session: Session) -> None:
        session.add(Book(title="of the task"))

    registry.add(Book(title="of the caller"))
    name = kind.partition(",")[0]
    with pytest.raises(ConfigurationError, match=f"in use .*{name} hands out.*Give the registry"):
        work()
    assert [book.title for book in registry().new] == ["of the caller"]
    registry.remove()

    assert _titles(database) == []


@pytest.mark.parametrize("use", ["in a transaction", "with pending objects", "with loaded objects"])
def test_each_use_of_a_session_is_seen(app: Celery, engine: Engine, use: str) -> None:
    """Also that of a request which has committed and goes on with its objects."""
    registry = scoped_session(sessionmaker(engine, expire_on_commit=False))
    Alchemy(app, _closure(registry))
    kept = Book(title="Emma")
    if use == "in a transaction":
        registry.connection()
    elif use == "with pending objects":
        registry.add(kept)
    else:
        registry.add(kept)
        registry.commit()

    @task_of(app)
    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="session that is in use"):
        work()
    registry.remove()


def test_alchemys_engine_leaves_a_session_in_use_alone(app: Celery, engine: Engine) -> None:
    """A callable is asked for its engine by a session; what is somebody else's is refused, and not closed."""
    registry = scoped_session(sessionmaker(engine))
    alchemy = Alchemy(app, _closure(registry))
    registry.add(Book(title="Emma"))

    with pytest.raises(ConfigurationError, match="in use .*registry hands out"):
        alchemy.engine  # noqa: B018
    assert len(registry.new) == 1
    registry.remove()

    assert alchemy.engine is engine


# --- commit() that does nothing ---------------------------------------------------------------------


class Polite(Session):
    """Leaves the commit to somebody else."""

    def commit(self) -> None:
        """Only flush."""
        self.flush()


@pytest.mark.parametrize("bind", ["sessionmaker", "callable"])
@pytest.mark.parametrize("once", [False, True])
def test_commit_that_does_nothing_fails_the_task(app: Celery, engine: Engine, database: Database, once: bool, bind: str) -> None:
    """It would be a SUCCESS without rows."""
    alchemy = Alchemy(app, sessionmaker(engine, class_=Polite) if bind == "sessionmaker" else lambda: Polite(engine))
    alchemy.create_tables()

    @task_of(app, once=once)
    def work(session: Session) -> None:
        session.add(Book(title="Emma"))

    with pytest.raises(CommitIgnoredError, match=r"Polite.*transaction is still open"):
        work.apply(throw=True)

    assert _titles(database) == []


def test_commit_that_does_nothing_fails_a_begin_block(app: Celery, engine: Engine, database: Database) -> None:
    """`alchemy.begin()` promises a commit too."""
    alchemy = Alchemy(app, sessionmaker(engine, class_=Polite))

    with pytest.raises(CommitIgnoredError, match=r"alchemy.begin\(\) has committed nothing"), alchemy.begin() as session:
        session.add(Book(title="Emma"))

    assert _titles(database) == []


def test_callable_that_begins_the_next_transaction_is_no_ignored_commit(app: Celery, engine: Engine, database: Database) -> None:
    """What waits for the commit may use the session, and so begin again."""
    from celery_alchemy import on_commit

    Alchemy(app, engine)

    @task_of(app)
    def work(session: Session) -> None:
        session.add(Book(title="Emma"))
        on_commit(session, lambda: session.scalars(select(Book)).all())

    work()

    assert _titles(database) == ["Emma"]


# --- autobegin=False --------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", ["sessionmaker", "registry", "callable"])
@pytest.mark.parametrize("once", [False, True])
def test_sessions_that_do_not_begin_by_themselves_work(
    app: Celery, engine: Engine, database: Database, bind: str, once: bool
) -> None:
    """The transaction of a task is the library's to begin; a body may still begin it by itself."""
    maker = sessionmaker(engine, autobegin=False)
    binds: dict[str, Any] = {
        "sessionmaker": maker,
        "registry": scoped_session(maker),
        "callable": lambda: Session(engine, autobegin=False),
    }
    alchemy = Alchemy(app, binds[bind])
    alchemy.create_tables()

    @task_of(app, once=once)
    def work(session: Session) -> None:
        session.add(Book(title="Emma"))
        assert session.scalars(select(Book.title)).all() == ["Emma"]

    @task_of(app)
    def begins(session: Session) -> None:
        with session.begin():
            session.add(Book(title="Persuasion"))
        with session.begin():
            session.add(Book(title="Sanditon"))

    work.apply(throw=True)
    begins()
    with alchemy.begin() as session:
        session.add(Book(title="Lady Susan"))

    assert _titles(database) == ["Emma", "Persuasion", "Sanditon", "Lady Susan"]
