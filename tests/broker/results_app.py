"""The app of the tests of results: its database is its broker and its result backend."""

from __future__ import annotations

import time
from typing import Any

from celery import Celery
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app


class OutOfStockError(Exception):
    """An error of an application."""


#: Seconds without a heartbeat after which a worker of these tests counts as lost.
LOST_SECONDS = 4.0


def make(app: Celery, url: str) -> Alchemy:
    """Give an app the database for its broker, and the tasks of the tests."""
    alchemy = Alchemy(app, url, broker=True, worker_lost_after=LOST_SECONDS)
    task: Any = app.task

    @task(name="write", shared=False)
    def write(session: Session, name: str) -> str:
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
        return name

    @task(name="write once", shared=False, once=True)
    def write_once(session: Session, name: str) -> str:
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
        return name

    @task(name="double", shared=False)
    def double(session: Session, value: str) -> str:
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": value})
        return value * 2

    @task(name="join", shared=False)
    def join(parts: list[str]) -> str:
        return "".join(sorted(parts))

    @task(name="count once", shared=False, once=True)
    def count_once(session: Session, parts: list[str]) -> int:
        session.execute(text("INSERT INTO effect (name) VALUES ('body')"))
        return len(set(parts))

    @task(name="fail", shared=False)
    def fail(session: Session, name: str) -> None:
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
        raise OutOfStockError(name, 3)

    @task(name="fail once", shared=False, once=True)
    def fail_once(session: Session, name: str) -> None:
        raise OutOfStockError(name, 3)

    def slow(session: Session, name: str) -> None:
        """Hold the locks of what it has written until it is killed at its time limit."""
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
        time.sleep(60)

    task(name="slow", shared=False, time_limit=2)(slow)
    task(name="slow once", shared=False, once=True, time_limit=2)(slow)

    @task(name="note error", shared=False)
    def note_error(request: Any, exc: BaseException, traceback: object) -> None:
        with alchemy.begin() as session:
            session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": type(exc).__name__})

    return alchemy


_url = database_url()
if _url is not None:
    app = make_app("results-tests")
    make(app, _url)
