"""Shared tasks of a Flask-SQLAlchemy application; they know neither Flask's nor Celery's app."""

from __future__ import annotations

import os
import signal
from typing import Any, cast

from celery import shared_task
from flask import current_app
from sqlalchemy.orm import Session

from tests.applications.flask_models import Note, Order, db

# celery-types knows no options of ours.
shared: Any = shared_task


@shared(name="order", once=True)
def order(item: str) -> int:
    """Take an order, and have it charged when it is committed."""
    taken = Order.create(item)
    charge.delay_on_commit(taken.id)
    return taken.id


@shared(name="charge", once=True, bind=True)
def charge(self: Any, session: Session, order_id: int) -> None:
    """Charge an order; its journal is written by a task of its own inside of this one."""
    assert db.session() is session is self.session
    note(f"charging {order_id}")
    assert db.session() is session
    Note.write(f"charged {order_id}")
    session.get_one(Order, order_id).state = "charged"


@shared(name="note")
def note(text: str) -> None:
    """Write a line, whatever becomes of the caller."""
    Note.write(text)


def failed(session: Session, exc: Exception, item: str, *more: Any) -> None:
    """Say that there is no such order."""
    assert db.session() is session
    Note.write(f"{item}: {type(exc).__name__}")


@shared(name="refuse", record_failure=failed)
def refuse(item: str) -> None:
    """Fail after the order was taken."""
    Order.create(item)
    raise LookupError(item)


@shared(name="die", record_failure=failed)
def die(item: str) -> None:
    """Lose the worker's child."""
    Order.create(item)
    os.kill(os.getpid(), signal.SIGKILL)


@shared(name="remove")
def remove(item: str) -> None:
    """Take the first order back by `remove()`, and a second one after it."""
    Order.create(f"no {item}")
    db.session.remove()
    Order.create(item)


@shared(name="context")
def context(item: str) -> str:
    """Use an application context inside of the task's own, as a helper that renders a template does."""
    Order.create(item)
    app = cast("Any", current_app)._get_current_object()
    with app.app_context():
        return str(current_app.name)
