"""What a session adds to a task, counted and not timed: calls, statements and connections.

The microseconds are measured by ``benchmarks/overhead.py``; these counts are what they come from, and are the same on every machine.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.trace import build_tracer
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy
from tests.services.databases import Database

REQUEST = {"id": "5cc5d0f2", "delivery_info": {}, "retries": 0, "is_eager": False, "timelimit": [None, None]}
# Enough requests for every cache on the way, of SQLAlchemy's statements too, to be filled.
WARM_UP = 5


class Base(DeclarativeBase):
    """The tables of these tests."""


class Book(Base):
    """A book."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Measured:
    """What is measured: tasks that do the same in several ways, each way on an engine of its own.

    No stand: a call of a tracer that is built beforehand is all that may be counted.
    """

    def __init__(self, database: Database) -> None:
        self.app = Celery("cost", broker="memory://", set_as_current=False)
        self.app.conf.update(task_ignore_result=True)
        self.engine = create_engine(database.url)
        Base.metadata.create_all(self.engine)
        with Session(self.engine) as session:
            session.add(Book(id=1, title="Emma"))
            session.commit()
        self.alchemy = Alchemy(self.app, self.engine)
        self.by_hand = create_engine(database.url)

    def tracer(self, body: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        """Return a call of Celery's tracer with a task made of this body, after it has been called a few times."""
        name = f"task{len(self.app._tasks)}"
        decorate: Any = self.app.task
        decorate(name=name, shared=False, **options)(body)
        trace = build_tracer(name, self.app.tasks[name], app=self.app)

        def call() -> Any:
            outcome = trace("5cc5d0f2", (), {}, REQUEST)
            assert outcome.info is None, outcome.info
            return outcome.retval

        for _ in range(WARM_UP):
            call()
        return call

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.by_hand.dispose()


@pytest.fixture
def measured(database: Database) -> Any:
    """The tasks, on the test's database."""
    measured = Measured(database)
    yield measured
    measured.close()


def calls_of(call: Callable[[], Any]) -> int:
    """Return how many Python functions are called."""
    counted = 0

    def count(frame: FrameType, what: str, argument: object) -> None:
        nonlocal counted
        counted += what == "call"

    before = sys.getprofile()
    # What other tests have left is collected at any time, and calls functions.
    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
        gc.enable()
    return counted


def traffic_of(engine: Engine, call: Callable[[], Any]) -> Counter[str]:
    """Return the connections, statements, commits and rollbacks that a call costs an engine."""
    seen: Counter[str] = Counter()

    def connected(*details: Any) -> None:
        seen["checkout"] += 1

    def executed(connection: Any, cursor: Any, statement: str, *details: Any) -> None:
        seen[statement] += 1

    def committed(connection: Any) -> None:
        seen["COMMIT"] += 1

    def rolled_back(connection: Any) -> None:
        seen["ROLLBACK"] += 1

    listeners: list[tuple[Any, str, Callable[..., None]]] = [
        (engine.pool, "checkout", connected),
        (engine, "before_cursor_execute", executed),
        (engine, "commit", committed),
        (engine, "rollback", rolled_back),
    ]
    for listened in listeners:
        event.listen(*listened)
    try:
        call()
    finally:
        for listened in listeners:
            event.remove(*listened)
    return seen


def untouched(session: Session) -> int:
    """Return before the session is used."""
    return 1


def touched(session: Session) -> int:
    """Load one object."""
    return session.get_one(Book, 1).id


def nothing() -> int:
    """Do nothing."""
    return 1


@pytest.mark.databases("sqlite", "postgresql")
def test_untouched_session_opens_no_connection(measured: Measured) -> None:
    """A task that never uses its session asks neither the pool nor the database for anything."""
    call = measured.tracer(untouched)

    assert traffic_of(measured.engine, call) == Counter()


@pytest.mark.databases("sqlite", "postgresql")
def test_used_session_sends_what_one_by_hand_sends(measured: Measured) -> None:
    """One checkout, the same statements and one COMMIT: the library adds none of its own."""

    def by_hand() -> int:
        with Session(measured.by_hand, expire_on_commit=False) as session:
            number = touched(session)
            session.commit()
            return number

    ours = traffic_of(measured.engine, measured.tracer(touched))

    assert ours == traffic_of(measured.by_hand, measured.tracer(by_hand, base=Task))
    assert ours["checkout"] == ours["COMMIT"] == 1
    assert ours["ROLLBACK"] == 0


@pytest.mark.databases("sqlite")
def test_untouched_session_costs_few_calls(measured: Measured) -> None:
    """A plain task's body is one call; with a session that is not used at most five are added to it."""
    plain = calls_of(measured.tracer(nothing, base=Task))

    assert calls_of(measured.tracer(untouched)) - plain <= 5


@pytest.mark.databases("sqlite")
def test_task_without_session_costs_few_calls(measured: Measured) -> None:
    """A task of the default class that asks for no session pays two calls, the wrapper's and its unit of work's."""
    plain = calls_of(measured.tracer(nothing, base=Task))

    assert calls_of(measured.tracer(nothing)) - plain <= 2


@pytest.mark.databases("sqlite")
def test_used_session_costs_few_calls_more_than_by_hand(measured: Measured) -> None:
    """Opening, watching, committing and closing a session adds at most 28 calls to what the same work costs by hand.

    By itself it is 26; other tests switch on what both are counted with.
    """

    def by_hand() -> int:
        with Session(measured.by_hand, expire_on_commit=False) as session:
            number = touched(session)
            session.commit()
            return number

    ours = calls_of(measured.tracer(touched))

    assert ours - calls_of(measured.tracer(by_hand, base=Task)) <= 28


@pytest.mark.databases("sqlite")
def test_session_is_made_ready_when_the_last_request_used_it(measured: Measured) -> None:
    """A task that used its session gets the next one made, one that did not gets it deferred; both may be wrong once."""
    uses = True
    kinds = []

    def sometimes(session: Session) -> None:
        kinds.append(type(session).__dict__.get("__getattr__") is None)
        if uses:
            touched(session)

    call = measured.tracer(sometimes)
    uses = False
    call()
    call()

    assert kinds[-WARM_UP - 2 :] == [False, *[True] * WARM_UP, False]


@pytest.mark.databases("sqlite")
def test_session_made_in_vain_holds_nothing(measured: Measured) -> None:
    """The request whose session was made ready and not used opens no connection either."""
    uses = True

    def sometimes(session: Session) -> None:
        if uses:
            touched(session)

    call = measured.tracer(sometimes)
    uses = False

    assert traffic_of(measured.engine, call) == Counter()
