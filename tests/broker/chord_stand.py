"""A stand of chords: their parts, their bodies, and the order in which these are run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Task, group
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.broker.broker_stand import BrokerStand, write
from tests.services.databases import Database
from tests.stand import Ended, Sent

WAITING = (
    "SELECT id, body, envelope FROM celery_outbox"
    " WHERE queue = :queue AND completed_at IS NULL AND died_at IS NULL ORDER BY created_at"
)


class OutOfStockError(Exception):
    """An error of an application."""


class ChordStand(BrokerStand):
    """A stand with the tasks of the tests' chords."""

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(database, **options)
        self.ran: list[str] = []
        self.errors: list[tuple[Any, ...]] = []
        self._seen: set[str] = set()
        self._make_parts()
        self._make_odd_parts()
        self._make_bodies()

    def _make_parts(self) -> None:
        def part(session: Session, name: str) -> str:
            write(session, name)
            return name

        def plain(name: str) -> str:
            return name

        def read(session: Session, name: str) -> str:
            session.execute(text("SELECT 1"))
            return name

        def double(session: Session, name: str) -> str:
            write(session, name)
            return name * 2

        self.task(part, name="session")
        self.task(part, name="once", once=True)
        self.task(part, name="ignored", ignore_result=True)
        self.task(plain, name="plain", base=Task)
        self.task(plain, name="plain ignored", base=Task, ignore_result=True)
        self.task(read, name="read only", read_only=True)
        self.task(double, name="double")

    def _make_odd_parts(self) -> None:
        sign = self.sign

        def replaced(self: Any, session: Session, name: str) -> Any:
            write(session, "lost")
            return self.replace(sign("session", name))

        def replaced_by_two(self: Any, name: str) -> Any:
            return self.replace(group(sign("session", name), sign("session", name * 2)))

        def adding(self: Any, session: Session, name: str) -> str:
            self.add_to_chord(sign("session", name + "+"))
            return write(session, name)[-1]

        def fail(session: Session, name: str) -> None:
            write(session, name)
            raise OutOfStockError(name)

        def flaky(self: Any, session: Session, name: str) -> str:
            if self.request.retries == 0:
                raise self.retry(exc=OutOfStockError(), countdown=0)
            return write(session, name)[-1]

        self.task(replaced, name="replaced", bind=True)
        self.task(replaced_by_two, name="replaced by two", bind=True)
        self.task(adding, name="adding", bind=True)
        self.task(fail, name="fail")
        self.task(flaky, name="flaky", bind=True)

    def _make_bodies(self) -> None:
        def collect(parts: Any) -> Any:
            return parts

        def collect_once(session: Session, parts: Any) -> Any:
            write(session, "body")
            return parts

        def note_error(request: Any, exc: BaseException, traceback: Any) -> None:
            self.errors.append((type(exc).__name__, str(exc)))

        self.task(collect, name="collect")
        self.task(collect_once, name="collect once", once=True)
        self.task(note_error, name="note error")

    def sign(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature of a task."""
        return self.app.tasks[name].s(*args).set(**options)

    def parts(self, letters: str, name: str = "session") -> list[Any]:
        """Return a part for each letter."""
        return [self.sign(name, letter) for letter in letters]

    def sent(self, queue: str | None = None) -> list[Sent]:
        """Return the messages that no worker has, and delete those that no transaction ends.

        They are read from their rows, and not taken: a test delivers them again, and together.
        """
        queue = queue or self.queue
        found = []
        for key, body, envelope in self.database.rows(WAITING, queue=queue):
            if key in self._seen:
                continue
            self._seen.add(key)
            self.database.execute("DELETE FROM celery_outbox WHERE id = :id AND once = :no", id=key, no=False)
            headers, info = json.loads(envelope)["headers"], {"exchange": "", "routing_key": queue}
            found.append(Sent(bytes(body), "application/json", "utf-8", headers, {}, info))
        return found

    def deliver(self, sent: Sent, **request: Any) -> Ended:
        """Run a message in the tracer that workers run it in."""
        self.ran.append(sent.task)
        return super().deliver(sent, **request)

    def bodies(self) -> int:
        """Return how often a body has run."""
        return sum(name.startswith("collect") for name in self.ran)


@pytest.fixture
def chords(database: Database) -> ChordStand:
    """An app on a database that counts its chords."""
    return ChordStand(database)
