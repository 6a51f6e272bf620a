"""A library: a stand whose rows have every kind of primary key."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from contextlib import ExitStack
from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy.testing import Run, SentTask, captured
from tests.services.databases import Database
from tests.stand import Stand


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


class Library(Stand):
    """A stand whose tables are the library's; the testing kit captures what it sends, and runs it."""

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(database, settings={"task_ignore_result": True}, **options)
        Base.metadata.create_all(database.engine)
        ForeignBase.metadata.create_all(database.engine)
        self._stack = ExitStack()
        self._captured = self._stack.enter_context(captured(self.alchemy))

    def close(self) -> None:
        """Capture no more, and close every connection."""
        self._stack.close()
        super().close()

    def stored(self, *rows: Any) -> None:
        """Commit rows; they stay usable afterwards, detached."""
        with Session(self.database.engine, expire_on_commit=False) as session, session.begin():
            session.add_all(rows)

    def messages(self) -> list[SentTask]:
        """Take what was sent and has not been run."""
        taken = list(self._captured)
        self._captured.clear()
        return taken

    def run(self) -> list[Run]:
        """Run all messages, and those that they lead to."""
        return self._captured.run(propagate=False)
