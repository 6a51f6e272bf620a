"""Tenants by schema: each transaction sets its search_path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, event, text
from sqlalchemy.orm import Session, SessionTransaction

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app
from tests.tenants.orders import add_tasks, current, make_models, tenant_of


@contextmanager
def in_tenant(task: Any, session: Session) -> Iterator[None]:
    """Say for whom this runs; each transaction sets it when it begins."""
    token = current.set(tenant_of(task))
    event.listen(session, "after_begin", set_search_path)
    try:
        yield
    finally:
        event.remove(session, "after_begin", set_search_path)
        current.reset(token)


def set_search_path(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Set it for the transaction that begins; the library's table is in no schema of it."""
    connection.execute(text("SELECT set_config('search_path', :path, true)"), {"path": current.get()})


app = make_app("tenants")
alchemy = Alchemy(app, database_url() or "sqlite://", outbox=True, around=in_tenant)
Base, Order, Note = make_models()
add_tasks(app, Order, Note)
