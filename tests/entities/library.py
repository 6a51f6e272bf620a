"""A library: rows with every kind of primary key, and the way of a message from a caller to a task's body."""

from __future__ import annotations

import datetime as dt
import enum
import json
import uuid
from queue import Empty
from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.services.databases import Database
from tests.unit.shop import Shop, Traced


class Base(DeclarativeBase):
    """The tables of the library."""


class Work(Base):
    """What one can borrow; a novel is one."""

    __tablename__ = "work"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    title: Mapped[str] = mapped_column(String(200))

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "work"}  # noqa: RUF012 - SQLAlchemy's way.


class Novel(Work):
    """A work of a subclass, in the same table."""

    __mapper_args__ = {"polymorphic_identity": "novel"}  # noqa: RUF012 - SQLAlchemy's way.


class Copy(Base):
    """A row whose key has two parts."""

    __tablename__ = "copy"

    shelf: Mapped[str] = mapped_column(String(20), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Reader(Base):
    """A row with a UUID as its key."""

    __tablename__ = "reader"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)


class Opening(Base):
    """A row with a date as its key."""

    __tablename__ = "opening"

    day: Mapped[dt.date] = mapped_column(primary_key=True)


class Genre(enum.Enum):
    """Kinds of novels."""

    COMEDY = "funny"
    CRIME = "grim"


class Section(Base):
    """A row with an enum as its key."""

    __tablename__ = "section"

    genre: Mapped[Genre] = mapped_column(primary_key=True)


class ForeignBase(DeclarativeBase):
    """Tables that are not the library's."""


class Secret(ForeignBase):
    """A row that no task of the library takes."""

    __tablename__ = "secret"

    id: Mapped[int] = mapped_column(primary_key=True)


class Library(Shop):
    """A shop whose tables are the library's."""

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(database, **options)
        self.app.conf.task_ignore_result = True
        Base.metadata.create_all(database.engine)
        ForeignBase.metadata.create_all(database.engine)
        self.messages()  # The memory broker is the process's: another test may have left something in it.

    def stored(self, *rows: Any) -> None:
        """Commit rows; they stay usable afterwards, detached."""
        with Session(self.database.engine, expire_on_commit=False) as session, session.begin():
            session.add_all(rows)

    def messages(self) -> list[Any]:
        """Take the messages from the broker."""
        taken: list[Any] = []
        with self.app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
            while True:
                try:
                    message = queue.get_nowait()
                except Empty:
                    return taken
                message.ack()
                taken.append(message)

    def deliver(self) -> list[Traced]:
        """Run all messages, and those that they lead to, in the tracer that workers run them in."""
        ended: list[Traced] = []
        while messages := self.messages():
            for message in messages:
                args, kwargs, embedded = json.loads(message.body)
                task = self.app.tasks[message.headers["task"]]
                ended.append(self.trace(task, *args, request={**message.headers, **embedded}, **kwargs))
        return ended
