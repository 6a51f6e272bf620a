"""Models of a Flask-SQLAlchemy application: they say `db.session`, as such models do."""

from __future__ import annotations

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables."""


db = SQLAlchemy(model_class=Base)


class Order(Base):
    """What a customer wants."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(20), default="new")

    @classmethod
    def create(cls, item: str) -> Order:
        """Make an order that has its id."""
        order = cls(item=item)
        db.session.add(order)
        db.session.flush()
        return order


class Note(Base):
    """A line in the journal."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(100))

    @classmethod
    def write(cls, text: str) -> None:
        """Write a line with whatever is done now."""
        db.session.add(cls(text=text))
