"""An app with an engine of the user's own, which has a connection already when the worker forks, as after a query at import time."""

from __future__ import annotations

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app
from tests.stand import task_of

app = make_app("own-engine")
engine = create_engine(database_url() or "sqlite:///own.db", pool_size=2, max_overflow=1)
alchemy = Alchemy(app, engine)
with engine.connect() as opened:
    opened.execute(text("SELECT 1"))


@task_of(app, name="ask")
def ask(session: Session, number: int) -> tuple[int, int, int]:
    """Ask the server twice for what only this request knows, and for the connection's own number."""
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    first = session.scalar(text(f"SELECT {int(number)}"))
    second = session.scalar(text(f"SELECT {int(number)} + 1"))
    connection = session.scalar(text("SELECT pg_backend_pid()" if is_postgresql else "SELECT CONNECTION_ID()"))
    return int(first or 0), int(second or 0), int(connection or 0)
