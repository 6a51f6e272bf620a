"""The database as Celery's result backend: what is written, when, and by whom."""

from __future__ import annotations

from typing import Any

import pytest
from kombu.exceptions import EncodeError
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy.requests.event_loop import process_loop
from tests.broker.broker_stand import BrokerStand, write
from tests.services.databases import Database


class OutOfStockError(Exception):
    """An error of an application."""


def test_own_commit_writes_the_success(stand: BrokerStand, database: Database) -> None:
    """The tracer finds it done, and writes no second time."""
    task, writes = stand.task(write), stand.writes()

    result = stand.result_of(task, "a")

    assert (result.state, result.get()) == ("SUCCESS", "wrote a")
    assert result.date_done.tzinfo is not None
    assert writes == ["INSERT"]
    assert database.rows("SELECT name FROM effect") == [("a",)]


def test_commit_that_fails_leaves_no_success(stand: BrokerStand, database: Database) -> None:
    """The result and the rows go together: the failure is written by the tracer."""

    def refuse(session: Session) -> str:
        write(session, "a")

        @event.listens_for(session, "before_commit")
        def fail(session: Session) -> None:
            raise OutOfStockError("the commit is refused")

        return "done"

    result = stand.result_of(stand.task(refuse))

    assert result.state == "FAILURE"
    assert isinstance(result.result, OutOfStockError)
    assert database.rows("SELECT name FROM effect") == []


def test_result_that_cannot_be_kept_rolls_back(stand: BrokerStand, database: Database) -> None:
    """A SUCCESS without its value would be none."""

    def unkept(session: Session) -> object:
        write(session, "a")
        return object()

    result = stand.result_of(stand.task(unkept))

    assert result.state == "FAILURE"
    assert isinstance(result.result, EncodeError)
    assert database.rows("SELECT name FROM effect") == []


def test_once_task_reports_its_result_at_each_delivery(stand: BrokerStand, database: Database) -> None:
    """The second delivery writes nothing new."""
    task, writes = stand.task(write, once=True), stand.writes()
    first = stand.result_of(task, "a")

    again = stand.result_of(task, "a", id=first.id)

    assert (first.get(), again.get()) == ("wrote a", "wrote a")
    assert stand.rows() == [("SUCCESS",)]
    assert database.rows("SELECT name FROM effect") == [("a",)]
    assert writes[0] == "INSERT"


def test_result_is_written_again_where_callbacks_came_after_it(stand: BrokerStand) -> None:
    """They are sent after the COMMIT of a plain task; its children are known then."""
    task = stand.task(write)

    result = stand.result_of(task, "a", callbacks=[task.s()])

    assert result.get() == "wrote a"
    assert len(result.children) == 1
    assert stand.rows() == [("SUCCESS",)]


def test_once_task_writes_its_children_in_its_own_commit(stand: BrokerStand) -> None:
    """Its callbacks are sent in the same transaction."""
    task, writes = stand.task(write, once=True), stand.writes()

    result = stand.result_of(task, "a", callbacks=[task.s()])

    assert len(result.children) == 1
    assert writes == ["INSERT"]


def test_ignored_result_is_not_written(stand: BrokerStand) -> None:
    """By the task or by the one call."""
    stand.result_of(stand.task(write, ignore_result=True, name="ignoring"), "a")
    stand.result_of(stand.task(write), "b", ignore_result=True)

    assert stand.rows() == []


def test_read_only_task_has_a_result(stand: BrokerStand) -> None:
    """Its transaction must not write: the tracer does."""

    def count(session: Session) -> int:
        return int(session.execute(text("SELECT count(*) FROM effect")).scalar_one())

    assert stand.result_of(stand.task(count, read_only=True)).get() == 0


def test_task_without_session_has_a_result(stand: BrokerStand) -> None:
    """The tracer writes it."""

    def add(x: int, y: int) -> int:
        return x + y

    assert stand.result_of(stand.task(add), 1, 2).get() == 3


def test_failure_has_its_traceback_and_its_own_class(stand: BrokerStand, database: Database) -> None:
    """What the body raised comes back; its work does not stay."""

    def fail(session: Session) -> None:
        write(session, "a")
        raise OutOfStockError("none left", 3)

    result = stand.result_of(stand.task(fail))

    with pytest.raises(OutOfStockError) as caught:
        result.get()
    assert caught.value.args == ("none left", 3)
    assert 'raise OutOfStockError("none left", 3)' in result.traceback
    assert database.rows("SELECT name FROM effect") == []


def test_retry_is_a_state_and_its_success_replaces_it(stand: BrokerStand) -> None:
    """A success that is there is replaced by nothing."""

    def flaky(self: Any, session: Session, name: str) -> str:
        if self.request.retries == 0:
            raise self.retry(exc=OutOfStockError(), countdown=0)
        return write(session, name)

    task = stand.task(flaky, bind=True)
    result = stand.result_of(task, "a", retries=0)
    assert stand.rows() == [("RETRY",)]

    stand.result_of(task, "a", id=result.id, retries=1)
    stand.app.backend.mark_as_failure(result.id, OutOfStockError())

    assert stand.app.AsyncResult(result.id).get() == "wrote a"


def test_state_of_the_users_is_seen(stand: BrokerStand) -> None:
    """On SQLite it comes with the task's transaction, which has the only lock."""
    seen: list[Any] = []

    def report(self: Any, session: Session) -> None:
        self.update_state(state="HALF WAY", meta={"done": 5})
        write(session, "a")
        self.update_state(state="NEARLY", meta={"done": 9})
        seen.append(stand.app.AsyncResult(self.request.id).info)

    result = stand.result_of(stand.task(report, bind=True))

    assert seen == [{"done": 5} if stand.database.name == "sqlite" else {"done": 9}]
    assert result.state == "SUCCESS"


def test_started_is_tracked(stand: BrokerStand) -> None:
    """As on every other backend."""
    seen: list[str] = []

    def look(self: Any) -> None:
        seen.append(stand.app.AsyncResult(self.request.id).state)

    stand.result_of(stand.task(look, bind=True, track_started=True))

    assert seen == ["STARTED"]


def test_extended_result_has_name_arguments_and_queue(database: Database) -> None:
    """With `result_extended`; the same in the task's own commit as in the tracer's."""
    stand = BrokerStand(database, settings={"result_extended": True})

    result = stand.result_of(stand.task(write, name="write"), "a", hostname="here")

    assert (result.name, result.args, result.kwargs) == ("write", ["a"], {})
    assert (result.worker, result.retries, result.queue) == ("here", 0, "celery")


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("once", [False, True])
def test_async_task_writes_its_success_in_its_own_commit(stand: BrokerStand, database: Database, once: bool) -> None:
    """By the connection of its AsyncSession."""

    async def write_async(session: AsyncSession, name: str) -> str:
        await session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
        return f"wrote {name}"

    writes = stand.writes()
    result = stand.result_of(stand.task(write_async, once=once), "a")

    assert result.get() == "wrote a"
    assert database.rows("SELECT name FROM effect") == [("a",)]
    # The sync engine, which the tracer writes by, was not asked.
    assert writes == []
    process_loop.close()
