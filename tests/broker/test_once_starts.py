"""The starts of a `once` task whose message is a row: taking it says the first one, and costs no statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kombu import Queue
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy.databases import LoneStatement
from celery_alchemy.outbox import lone_statement
from celery_alchemy.outbox.lone_statement import Answer
from tests.broker.broker_stand import BrokerStand
from tests.stand import Crash, Sent


@contextmanager
def lone_statements() -> Iterator[list[str]]:
    """Note which statements are sent by themselves."""
    found: list[str] = []
    execute = lone_statement._execute

    def note(connection: Any, dialect: Any, statement: LoneStatement, *rest: Any) -> Answer:
        found.append("SELECT" if statement.is_select else "UPDATE")
        return execute(connection, dialect, statement, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lone_statement, "_execute", note)
        yield found


@contextmanager
def worker(stand: BrokerStand) -> Iterator[Callable[[], str]]:
    """Give what takes the next message and runs it, as a worker does: its state, or that it was killed.

    What kills it is due again at once, as when another worker has found it lost.
    """
    with stand.app.connection_for_read() as connection, connection.channel() as channel:
        queue = Queue("celery")(channel)
        queue.declare()

        def run() -> str:
            message: Any = queue.get()
            try:
                ended = stand.deliver(Sent.of(message))
            except Crash:
                message.requeue()
                return "killed"
            message.ack()
            return ended.state

        yield run


def send(stand: BrokerStand, task: Any) -> None:
    """Send a task on commit."""
    with stand.alchemy.begin():
        task.delay_on_commit()


def row(stand: BrokerStand, columns: str) -> tuple[Any, ...]:
    """Return columns of the one row that there is."""
    [found] = stand.database.rows(f"SELECT {columns} FROM celery_outbox")
    return tuple(found)


def test_first_start_only_looks(stand: BrokerStand) -> None:
    """The claim says already that a worker has it: nothing is written before the body."""
    seen: list[int] = []

    def pay(session: Session) -> None:
        session.execute(text("INSERT INTO effect (name) VALUES ('paid')"))
        seen.extend(row(stand, "deliveries"))

    send(stand, stand.task(pay, name="pay", once=True))
    with lone_statements() as statements, worker(stand) as run:
        state = run()

    assert (state, seen, statements) == ("SUCCESS", [0], ["SELECT"])
    assert stand.database.rows("SELECT name FROM effect") == [("paid",)]


@pytest.mark.parametrize("allowed", [2, 3])
def test_task_that_kills_its_workers_is_dead_after_so_many_starts(stand: BrokerStand, allowed: int) -> None:
    """The first start, which nothing has counted, counts from the second one on."""
    starts: list[int] = []

    def kills(session: Session) -> None:
        starts.append(1)
        raise Crash

    send(stand, stand.task(kills, name="kills", once=True, max_deliveries=allowed))
    with worker(stand) as run:
        states = [run() for _ in range(allowed + 1)]

    assert states == ["killed"] * allowed + ["FAILURE"]
    assert len(starts) == allowed
    assert row(stand, "died_at IS NOT NULL") == (True,)


def test_task_that_may_start_once_is_not_dead_before_it_has_begun(stand: BrokerStand) -> None:
    """A worker that is lost may have had its message in reserve: the first one that begins it runs it."""

    def pay() -> None: ...

    send(stand, stand.task(pay, name="pay", once=True, max_deliveries=1))
    with stand.app.connection_for_read() as connection, connection.channel() as channel:
        queue = Queue("celery")(channel)
        queue.declare()
        message: Any = queue.get()
        message.requeue()

    with worker(stand) as run:
        assert run() == "SUCCESS"


def test_second_delivery_of_work_that_is_done_reports_it(stand: BrokerStand) -> None:
    """A copy finds the completion with one look."""
    runs: list[int] = []

    def pay() -> int:
        runs.append(1)
        return 7

    task = stand.task(pay, name="pay", once=True)
    with stand.alchemy.begin():
        sent = task.delay_on_commit()
    with worker(stand) as run:
        run()
    with lone_statements() as statements:
        again = stand.result_of(task, id=sent.id, celery_alchemy_row=sent.id)

    assert (again.get(timeout=5), runs, statements) == (7, [1], ["SELECT"])
