"""A shop: one Celery app, one Alchemy and one table of books, in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer
from celery.utils import uuid
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy
from tests.services.databases import Database


class Base(DeclarativeBase):
    """The tables of the shop."""


class Book(Base):
    """A book; its title is unique, so that a duplicate fails at the flush."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200), unique=True)


@dataclass(frozen=True)
class Traced:
    """What Celery's tracer made of a request, and in how many seconds."""

    state: str
    value: Any
    runtime_seconds: float


def task_of(app: Celery, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function as a task of one app; it keeps no type, for the tests call it in every way.

    Not shared: Celery would make it a task of the apps of all later tests too.
    """
    decorate: Any = app.task
    decorator: Callable[[Callable[..., Any]], Any] = decorate(shared=False, **options)
    return decorator


class Shop:
    """An app whose tasks have sessions of one database.

    Attributes:
        app: The Celery app, on the in-memory broker.
        alchemy: What gives its tasks their sessions.
        database: The same database as the tests see it: only what is committed.
    """

    def __init__(self, database: Database, **options: Any) -> None:
        self.database = database
        self.app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(task_store_eager_result=False, task_publish_retry=False)
        self.alchemy = Alchemy(self.app, database.url, **options)
        Base.metadata.create_all(database.engine)

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """Make a task of this app; see `task_of`."""
        return task_of(self.app, **options)

    def titles(self) -> list[str]:
        """Return the titles of the committed books in their order."""
        return [row[0] for row in self.database.rows("SELECT title FROM book ORDER BY id")]

    def checked_out(self) -> int:
        """Return how many connections of the tasks' pool are lent out now."""
        return int(self.alchemy.engine.pool.checkedout())  # type: ignore[attr-defined]

    def trace(self, task: Any, *args: Any, request: dict[str, Any] | None = None, **kwargs: Any) -> Traced:
        """Run a task in the tracer that workers run it in, and return its state and result.

        SystemExit and other BaseExceptions come through as they do in a worker.
        """
        task_id = uuid()
        described = {
            "id": task_id,
            "args": args,
            "kwargs": kwargs,
            "delivery_info": {"routing_key": "celery"},
            "retries": 0,
            "is_eager": False,
            **(request or {}),
        }
        tracer = build_tracer(task.name, task, app=self.app)
        started = monotonic()
        traced = tracer(task_id, args, kwargs, described)
        seconds = monotonic() - started
        if traced.info is not None:
            return Traced(traced.info.state, traced.info.retval, seconds)
        return Traced("SUCCESS", traced.retval, seconds)

    def waiting(self) -> int:
        """Return how many messages wait in the in-memory broker."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            return int(channel._size("celery"))


def add_books(session: Session, titles: Iterable[str]) -> None:
    """Put books into a session and send them to the database, uncommitted."""
    session.add_all(Book(title=title) for title in titles)
    session.flush()
