"""A stand whose database is its broker and result backend."""

from __future__ import annotations

from typing import Any

from celery.result import AsyncResult
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from celery_alchemy.broker.homes import BrokerHome, home_for
from tests.services.databases import Database
from tests.stand import Stand


class BrokerStand(Stand):
    """A stand whose database is its broker and result backend too; its tasks may send past their transactions."""

    def __init__(self, database: Database, **options: Any) -> None:
        database.execute("CREATE TABLE effect (name VARCHAR(100))")
        super().__init__(database, broker=True, **{"publish_in_transaction": "allow", **options})
        self.alchemy.create_tables()

    @property
    def home(self) -> BrokerHome:
        """The database as the broker."""
        return home_for("", self.app.conf.broker_transport_options)

    def result_of(self, task: Any, *args: Any, **request: Any) -> AsyncResult[Any]:
        """Run a task in the tracer that workers run it in, and return its result."""
        return self.app.AsyncResult(self.trace(task, *args, request=request).id)

    def rows(self, columns: str = "status") -> list[tuple[Any, ...]]:
        """Return what is committed of the results."""
        return self.database.rows(f"SELECT {columns} FROM celery_results ORDER BY id")

    def writes(self) -> list[str]:
        """Return the statements of results from now on, in the order of their execution."""
        found: list[str] = []

        def note(connection: Any, cursor: Any, statement: str, *args: Any) -> None:
            if "celery_results" in statement and not statement.startswith("SELECT"):
                found.append(statement.split(maxsplit=1)[0])

        event.listen(self.alchemy.engine, "before_cursor_execute", note)
        return found


def write(session: Session, name: str) -> str:
    """The body of a task: write a row, and return a text."""
    session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
    return f"wrote {name}"
