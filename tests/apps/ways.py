"""An app that has queried its database at its import, by every way to a session that a library is not told of."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import flask
import flask_sqlalchemy
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from celery_alchemy import Alchemy, SessionTask
from tests.settings import database_url, make_app
from tests.stand import task_of
from tests.unit.shop import Book

app = make_app("ways")
url = database_url() or "sqlite:///ways.db"
alchemy = Alchemy(app, url)
listening: list[int] = []


@event.listens_for(alchemy.engine, "connect")
def _connected(connection: Any, record: Any) -> None:
    listening.append(os.getpid())


def _make_engine() -> Engine:
    return create_engine(url)


direct = _make_engine()
bound = sessionmaker(_make_engine(), binds={Book: _make_engine()})
configured: sessionmaker[Session] = sessionmaker()
configured.configure(bind=_make_engine())
called = sessionmaker(_make_engine())
in_class = sessionmaker(_make_engine())
flask_app = flask.Flask("ways")
flask_app.config["SQLALCHEMY_DATABASE_URI"] = url
db = flask_sqlalchemy.SQLAlchemy(flask_app)
bound_alchemy = Alchemy(bind=bound)
configured_alchemy = Alchemy(bind=configured)
called_alchemy = Alchemy(bind=lambda: called(info={}))
flask_alchemy = Alchemy(bind=db.session)
async_engine = create_async_engine(url.replace("pymysql", "aiomysql"))
async_alchemy = Alchemy(bind=async_engine)


def numbers_of(execute: Callable[[Any], Any], number: int) -> list[int]:
    """Ask the server twice for what only this request knows, and for the connection's own number."""
    is_postgresql = url.startswith("postgresql")
    own = "pg_backend_pid()" if is_postgresql else "CONNECTION_ID()"
    queries = (f"SELECT {int(number)}", f"SELECT {int(number)} + 1", f"SELECT {own}")
    return [int(execute(text(query)).scalar_one()) for query in queries]


def by_engine(number: int) -> list[int]:
    """Ask by an engine that a body uses directly."""
    with direct.connect() as connection:
        return numbers_of(connection.execute, number)


def by_sessions(make: Callable[[], Session], number: int, **where: Any) -> list[int]:
    """Ask by a session."""
    with make() as session:
        return numbers_of(lambda query: session.execute(query, bind_arguments=where), number)


def by_flask(number: int) -> list[int]:
    """Ask by Flask-SQLAlchemy's session."""
    with flask_app.app_context():
        return numbers_of(db.session.execute, number)


async def by_async(number: int) -> list[int]:
    """Ask by an AsyncSession."""
    async with AsyncSession(async_engine) as session:
        return await session.run_sync(lambda sync: numbers_of(sync.execute, number))


WAYS: dict[str, Callable[[int], list[int]]] = {
    "engine": by_engine,
    "binds": lambda number: by_sessions(bound, number, mapper=Book),
    "configured": lambda number: by_sessions(configured, number),
    "callable": lambda number: by_sessions(called, number),
    "flask": by_flask,
}
# In the worker's parent, and not where a test looks at the names.
opened = {} if database_url() is None else {way: ask(0)[2] for way, ask in WAYS.items()}
if database_url() is not None:
    opened["class"] = by_sessions(in_class, 0)[2]
    with alchemy.session() as own:
        opened["url"] = numbers_of(own.execute, 0)[2]
    # A pool that is not disposed of, as after asyncio.run() of a module that knows no better.
    opened["async"] = asyncio.run(by_async(0))[2]


@task_of(app, name="opened")
def opened_by_parent() -> dict[str, int]:
    """Return the numbers of the connections that the parent has opened."""
    return opened


@task_of(app, name="ask")
def ask_by(way: str, number: int) -> list[int]:
    """Ask by one of the ways; behind it the process's own number."""
    return [*WAYS[way](number), os.getpid()]


@task_of(app, name="ask.url")
def ask_url(session: Session, number: int) -> list[int]:
    """Ask by the session of an Alchemy with a URL; at last, how many connections its listener was told of here."""
    return [*numbers_of(session.execute, number), os.getpid(), listening.count(os.getpid())]


class InClass(SessionTask):
    """A task class with its own sessions."""

    session_factory = in_class


@task_of(app, name="ask.class", base=InClass, bind=True)
def ask_class(self: Any, number: int) -> list[int]:
    """Ask by the session of a task class."""
    return [*numbers_of(self.session.execute, number), os.getpid()]


@task_of(app, name="ask.async")
async def ask_async(number: int) -> list[int]:
    """Ask by a user's async engine."""
    return [*await by_async(number), os.getpid()]
