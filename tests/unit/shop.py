"""A shop: a stand with one table of books."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.services.databases import Database
from tests.stand import Stand


class Base(DeclarativeBase):
    """The tables of the shop."""


class Book(Base):
    """A book; its title is unique, so that a duplicate fails at the flush."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200), unique=True)


class Shop(Stand):
    """A stand whose table is the shop's."""

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(database, **options)
        Base.metadata.create_all(database.engine)

    def titles(self) -> list[str]:
        """Return the titles of the committed books in their order."""
        return [row[0] for row in self.database.rows("SELECT title FROM book ORDER BY id")]

    def waiting(self) -> int:
        """Return how many messages wait in the in-memory broker."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            return int(channel._size(self.queue))


def add_books(session: Session, titles: Iterable[str]) -> None:
    """Put books into a session and send them to the database, uncommitted."""
    session.add_all(Book(title=title) for title in titles)
    session.flush()
