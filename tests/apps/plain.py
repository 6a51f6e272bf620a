"""An app of plain Celery tasks, without the library: it shows that the test harness itself works."""

from __future__ import annotations

import os

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.settings import database_url, make_app

app = make_app("plain")


@app.task(name="add")
def add(left: int, right: int) -> int:
    """Return the sum."""
    return left + right


@app.task(name="process_id")
def process_id() -> int:
    """Return the id of the process that runs the task."""
    return os.getpid()


@app.task(name="answer")
def answer() -> int:
    """Ask the test's database for 42."""
    url = database_url()
    if url is None:
        raise RuntimeError("this worker was started without a database")
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return int(connection.execute(text("SELECT 42")).scalar_one())
