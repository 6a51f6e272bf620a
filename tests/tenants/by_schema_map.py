"""Tenants by schema: each transaction's statements go to the tenant's schema, by a schema_translate_map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app
from tests.tenants.orders import add_tasks, current, make_models, tenant_of


@contextmanager
def in_tenant(task: Any, session: Session) -> Iterator[None]:
    """Say for whom this runs; each transaction maps its statements when it begins."""
    token = current.set(tenant_of(task))
    event.listen(session, "after_begin", set_schema)
    try:
        yield
    finally:
        event.remove(session, "after_begin", set_schema)
        current.reset(token)


def set_schema(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Set it for the transaction that begins; tables without a schema are the tenant's."""
    connection.execution_options(schema_translate_map={None: current.get()})


app = make_app("tenants")
alchemy = Alchemy(app, database_url() or "sqlite://", outbox=True, around=in_tenant)
Base, Order, Note = make_models()
add_tasks(app, Order, Note)
