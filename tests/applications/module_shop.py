"""A service whose module has a scoped_session of its own, which everything in it uses."""

from __future__ import annotations

import os
import signal
from typing import Any

from sqlalchemy import String, create_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app

engine = create_engine(database_url() or "sqlite://")
session = scoped_session(sessionmaker(engine))
app = make_app("module_shop")
alchemy = Alchemy(app, session, outbox=True)
# celery-types knows no options of ours.
task: Any = app.task


class Base(DeclarativeBase):
    """All tables."""


class Order(Base):
    """What a customer wants."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(20), default="new")


class Note(Base):
    """A line in the journal."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(100))


def create(item: str) -> Order:
    """Make an order that has its id."""
    order = Order(item=item)
    session.add(order)
    session.flush()
    return order


def write(text: str) -> None:
    """Write a line with whatever is done now."""
    session.add(Note(text=text))


@task(name="order", once=True)
def order(item: str) -> int:
    """Take an order, and have it charged when it is committed."""
    taken = create(item)
    charge.delay_on_commit(taken.id)
    return taken.id


@task(name="charge", once=True)
def charge(injected: Session, order_id: int) -> None:
    """Charge an order; its journal is written by a task of its own inside of this one."""
    assert session() is injected
    note(f"charging {order_id}")
    write(f"charged {order_id}")
    session.get_one(Order, order_id).state = "charged"


@task(name="note")
def note(text: str) -> None:
    """Write a line, whatever becomes of the caller."""
    write(text)


def failed(injected: Session, exc: Exception, item: str) -> None:
    """Say that there is no such order."""
    assert session() is injected
    write(f"{item}: {type(exc).__name__}")


@task(name="refuse", record_failure=failed)
def refuse(item: str) -> None:
    """Fail after the order was taken."""
    create(item)
    raise LookupError(item)


@task(name="die", record_failure=failed)
def die(item: str) -> None:
    """Lose the worker's child."""
    create(item)
    os.kill(os.getpid(), signal.SIGKILL)


@task(name="remove")
def remove(item: str) -> None:
    """Take the first order back by `remove()`, and a second one after it."""
    create(f"no {item}")
    session.remove()
    create(item)
