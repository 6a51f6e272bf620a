"""Tenants by row: PostgreSQL shows and takes only rows of the tenant that the transaction is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, String, event, text
from sqlalchemy.orm import Session, SessionTransaction, mapped_column

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app
from tests.tenants.orders import add_tasks, current, make_models, tenant_of

_TENANT = text("current_setting('app.tenant')")


@contextmanager
def in_tenant(task: Any, session: Session) -> Iterator[None]:
    """Say for whom this runs; each transaction sets it when it begins."""
    token = current.set(tenant_of(task))
    event.listen(session, "after_begin", set_tenant)
    try:
        yield
    finally:
        event.remove(session, "after_begin", set_tenant)
        current.reset(token)


def set_tenant(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Set it for the transaction that begins; what is not set shows no row."""
    connection.execute(text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": current.get()})


app = make_app("tenants")
alchemy = Alchemy(app, database_url() or "sqlite://", outbox=True, around=in_tenant)
Base, Order, Note = make_models(tenant=lambda: mapped_column(String(40), server_default=_TENANT))
add_tasks(app, Order, Note)
