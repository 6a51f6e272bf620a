"""The ways to give a Celery task a session that ``overhead.py`` compares, each written as its own documentation shows it.

Annotations are evaluated here, not kept as text: injectors read them, and each contender imports its integration for itself,
because Celery's signals and SQLAlchemy's listeners are of the whole process.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any

from celery import Celery, Task
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

Act = Callable[[Any], int]
Contender = Callable[[Celery, URL, str, Act], Any]


class Base(DeclarativeBase):
    """The tables of the benchmark."""


class Book(Base):
    """One row, which is read."""

    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Line(Base):
    """Many rows, which are written."""

    __tablename__ = "line"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


# --- what a task does with its session, and the same with a commit for those who leave that to the body ----------------------


def untouched(session: Any) -> int:
    """Leave the session alone."""
    return 1


def select(session: Session) -> int:
    """Load one object."""
    return session.get_one(Book, 1).id


def select_commit(session: Session) -> int:
    """Load one object and commit."""
    number = session.get_one(Book, 1).id
    session.commit()
    return number


def insert(session: Session) -> int:
    """Add one object."""
    session.add(Line(text="a line"))
    return 1


def insert_commit(session: Session) -> int:
    """Add one object and commit."""
    session.add(Line(text="a line"))
    session.commit()
    return 1


#: By work: what a task does that is committed by its integration, and what it does where the body commits.
ACTS: dict[str, tuple[Act, Act]] = {
    "untouched": (untouched, untouched),
    "select": (select, select_commit),
    "insert": (insert, insert_commit),
}


def engine_for(url: URL) -> Engine:
    """Return an engine as every contender gets it: its own, so that nobody's hooks are on another's."""
    engine = create_engine(url)
    without_fsync(engine)
    return engine


def without_fsync(engine: Engine) -> None:
    """Take the disk out of what is measured (PostgreSQL's URL does the same for the server)."""
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection: Any, record: Any) -> None:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")


# --- the contenders ------------------------------------------------------------------------------------------------------


def plain(app: Celery, url: URL, name: str, act: Act) -> Any:
    """A task without a session."""

    @app.task(name=name, base=Task)
    def body(number: int) -> int:
        return act(None)

    return body


def hand_written(app: Celery, url: URL, name: str, act: Act) -> Any:
    """A with-block in the body."""
    engine = engine_for(url)

    @app.task(name=name, base=Task)
    def body(number: int) -> int:
        with Session(engine) as session:
            return act(session)

    return body


def hand_written_sessionmaker(app: Celery, url: URL, name: str, act: Act) -> Any:
    """A with-block in the body, from a sessionmaker with the option that celery-alchemy's sessions have."""
    maker = sessionmaker(engine_for(url), expire_on_commit=False)

    @app.task(name=name, base=Task)
    def body(number: int) -> int:
        with maker() as session:
            return act(session)

    return body


def before_start(app: Celery, url: URL, name: str, act: Act) -> Any:
    """A base class that opens the session in before_start and closes it in after_return."""
    maker = sessionmaker(engine_for(url), expire_on_commit=False)

    class DatabaseTask(Task):
        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            self.db = maker()

        def after_return(self, *details: Any) -> None:
            self.db.close()

    @app.task(name=name, base=DatabaseTask, bind=True)
    def body(self: Any, number: int) -> int:
        return act(self.db)

    return body


def dishka(app: Celery, url: URL, name: str, act: Act) -> Any:
    """The provider opens a session for each request; DishkaTask injects it."""
    from dishka import FromDishka
    from dishka.integrations.celery import DishkaTask

    _set_up_dishka(app, url)

    @app.task(name=name, base=DishkaTask)
    def body(number: int, session: FromDishka[Session]) -> int:
        return act(session)

    return body


@cache
def _set_up_dishka(app: Celery, url: URL) -> None:
    from dishka import Provider, Scope, make_container
    from dishka.integrations.celery import setup_dishka

    maker = sessionmaker(engine_for(url), expire_on_commit=False)

    def open_session() -> Iterator[Session]:
        with maker() as session:
            yield session

    provider = Provider(scope=Scope.REQUEST)
    provider.provide(open_session)
    setup_dishka(make_container(provider), app)


def modern_di(app: Celery, url: URL, name: str, act: Act) -> Any:
    """A factory of request scope with a finalizer; DITask injects it."""
    from modern_di_celery import DITask, FromDI

    provider = _set_up_modern_di(app, url)

    @app.task(name=name, base=DITask)
    def body(number: int, session: Annotated[Session, FromDI(provider)]) -> int:
        return act(session)

    return body


@cache
def _set_up_modern_di(app: Celery, url: URL) -> Any:
    from modern_di import Container, Group, Scope, providers
    from modern_di_celery import setup_di

    maker = sessionmaker(engine_for(url), expire_on_commit=False)

    def open_session() -> Session:
        return maker()

    def close_session(session: Session) -> None:
        session.close()

    class Dependencies(Group):
        session = providers.Factory(open_session, scope=Scope.REQUEST, cache=providers.CacheSettings(finalizer=close_session))

    setup_di(app, Container(groups=[Dependencies])).open()
    return Dependencies.session


def wireup(app: Celery, url: URL, name: str, act: Act) -> Any:
    """A generator of scoped lifetime; signals open and close the scope."""
    from wireup import Injected
    from wireup.integration.celery import inject

    _set_up_wireup(app, url)

    @app.task(name=name)
    @inject
    def body(number: int, session: Injected[Session]) -> int:
        return act(session)

    return body


@cache
def _set_up_wireup(app: Celery, url: URL) -> None:
    from wireup import create_sync_container, injectable
    from wireup.integration.celery import setup

    maker = sessionmaker(engine_for(url), expire_on_commit=False)

    @injectable(lifetime="scoped")
    def open_session() -> Iterator[Session]:
        with maker() as session:
            yield session

    setup(create_sync_container(injectables=[open_session]), app)


def flask(app: Celery, url: URL, name: str, act: Act) -> Any:
    """Flask's pattern: an application context around each task, and Flask-SQLAlchemy's scoped session."""
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    flask_app = Flask(name)
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = url
    db = SQLAlchemy(flask_app, session_options={"expire_on_commit": False})
    with flask_app.app_context():
        without_fsync(db.engine)

    class FlaskTask(Task):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with flask_app.app_context():
                return self.run(*args, **kwargs)

    @app.task(name=name, base=FlaskTask)
    def body(number: int) -> int:
        return act(db.session)

    return body


def injected(app: Celery, url: URL, name: str, act: Act) -> Any:
    """celery-alchemy, with the session as a parameter."""
    _set_up_celery_alchemy(app, url)

    @app.task(name=name)
    def body(session: Session, number: int) -> int:
        return act(session)

    return body


def self_session(app: Celery, url: URL, name: str, act: Act) -> Any:
    """celery-alchemy, with self.session."""
    _set_up_celery_alchemy(app, url)
    if act is untouched:

        @app.task(name=name, bind=True)
        def body(self: Any, number: int) -> int:
            return act(None)
    else:

        @app.task(name=name, bind=True)
        def body(self: Any, number: int) -> int:
            return act(self.session)

    return body


@cache
def _set_up_celery_alchemy(app: Celery, url: URL) -> None:
    from celery_alchemy import Alchemy

    Alchemy(app, engine_for(url))
