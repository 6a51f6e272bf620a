"""A soft time limit that breaks into one of the library's own statements is the error of the task, and costs no connection."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import SessionTask, released
from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.services.databases import Database
from tests.waiting import eventually

# psycopg2 waits in C: a signal is seen when its statement has ended.
SERVERS = ("postgresql", "mariadb")
#: One connection: a slot that is not given back is missed by the next task.
ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


@contextmanager
def locked(database: Database, table: str) -> Iterator[None]:
    """Lock all rows of a table; the soft limit breaks into the first statement that waits for them, and then they are free."""
    broken_in = threading.Event()

    def raise_limit(number: int, frame: Any) -> None:
        broken_in.set()
        raise SoftTimeLimitExceeded

    def strike(holder: Connection) -> None:
        eventually(lambda: database.waiting_for_a_lock() > 0, what="a statement waits for the lock")
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)
        broken_in.wait(20)
        holder.rollback()

    before = signal.signal(signal.SIGUSR1, raise_limit)
    with database.engine.connect() as holder:
        holder.execute(text(f"SELECT * FROM {table} FOR UPDATE"))
        striker = threading.Thread(target=strike, args=(holder,))
        striker.start()
        try:
            yield
        finally:
            striker.join()
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.databases(*SERVERS)
def test_limit_while_a_start_is_counted_is_reported(make_stand: MakeStand) -> None:
    """The task failed by its limit, not by what the driver says to a rollback in mid-statement; it stays owed, and runs then."""
    stand = make_stand(engine_options=ONE)

    @stand.task(name="charge", once=True)
    def charge(session: Session) -> str:
        session.add(Effect(name="charged"))
        return "done"

    sent = _sent(stand, charge)
    with locked(stand.database, "celery_outbox"):
        interrupted = stand.deliver(sent)
    again = stand.deliver(sent)

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert again.value == "done"
    assert stand.effects() == ["charged"]


@pytest.mark.databases("postgresql+asyncpg", "postgresql+psycopg")
def test_limit_while_the_start_of_an_async_task_is_counted_is_reported(make_stand: MakeStand) -> None:
    """The coroutine is cancelled in the middle of the statement."""
    stand = make_stand(engine_options=ONE)

    @stand.task(name="charge", once=True)
    async def charge(session: AsyncSession) -> str:
        session.add(Effect(name="charged"))
        return "done"

    sent = _sent(stand, charge)
    with locked(stand.database, "celery_outbox"):
        interrupted = stand.deliver(sent)
    again = stand.deliver(sent)

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert again.value == "done"


@pytest.mark.databases(*SERVERS)
def test_limit_while_the_completion_is_recorded_is_reported(make_stand: MakeStand) -> None:
    """Nothing is committed, and the task is dead by its limit."""
    stand = make_stand(engine_options=ONE)

    @stand.task(name="charge", once=True)
    def charge(session: Session) -> None:
        session.add(Effect(name="charged"))
        stack.enter(session)

    stack = _LockedLater(stand.database, "celery_outbox")
    sent = _sent(stand, charge)
    with stack:
        interrupted = stand.deliver(sent)

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert stand.effects() == []
    assert "SoftTimeLimitExceeded" in str(stand.deliver(sent).value)


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("once", [False, True])
def test_limit_in_the_flush_of_the_commit_is_reported(make_stand: MakeStand, once: bool) -> None:
    """SQLAlchemy rolls back after a flush that failed; what the driver says to that is not the task's error."""
    stand = make_stand(engine_options=ONE)
    stand.database.execute("INSERT INTO effect (name) VALUES ('old')")

    @stand.task(name="rename", once=once, transient_retries=2)
    def rename(session: Session) -> None:
        session.get_one(Effect, 1).name = "new"

    with locked(stand.database, "effect"):
        interrupted = stand.deliver(_sent(stand, rename))

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert stand.effects() == ["old"]
    assert _next_works(stand)


@pytest.mark.databases(*SERVERS)
def test_limit_inside_of_a_savepoint_is_reported(make_stand: MakeStand) -> None:
    """The block goes back to its SAVEPOINT, on a connection in mid-statement."""
    stand = make_stand(engine_options=ONE)
    stand.database.execute("INSERT INTO effect (name) VALUES ('old')")

    @stand.task(name="rename")
    def rename(session: Session) -> None:
        with session.begin_nested():
            session.execute(text("UPDATE effect SET name = 'new'"))

    with locked(stand.database, "effect"):
        interrupted = stand.deliver(_sent(stand, rename))

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert _next_works(stand)


@pytest.mark.databases(*SERVERS)
def test_limit_in_the_flush_of_released_is_reported(make_stand: MakeStand) -> None:
    """Also by `released(session, commit=True)`, and the connection is dropped."""
    stand = make_stand(engine_options=ONE)
    stand.database.execute("INSERT INTO effect (name) VALUES ('old')")

    @stand.task(name="rename")
    def rename(session: Session) -> None:
        session.get_one(Effect, 1).name = "new"
        with released(session, commit=True):
            raise AssertionError("not reached")

    with locked(stand.database, "effect"):
        interrupted = stand.deliver(_sent(stand, rename))

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert _next_works(stand)


class _LockedLater:
    """Locks a table in the middle of a body, when the start of its task is committed."""

    def __init__(self, database: Database, table: str) -> None:
        self._locked = locked(database, table)
        self._is_locked = False

    def __enter__(self) -> None:
        return None

    def enter(self, session: Session) -> None:
        """Lock it now."""
        session.flush()
        self._locked.__enter__()
        self._is_locked = True

    def __exit__(self, *error: object) -> None:
        if self._is_locked:
            self._locked.__exit__(None, None, None)


def _sent(stand: OutboxStand, task: Any) -> Any:
    with stand.alchemy.begin():
        task.delay_on_commit()
    [sent] = stand.sent()
    return sent


def _next_works(stand: OutboxStand) -> bool:
    @stand.task(name="next", bind=True)
    def ask(self: SessionTask) -> int:
        return int(self.session.execute(text("SELECT 42")).scalar_one())

    return bool(stand.deliver(_sent(stand, ask)).value == 42)
