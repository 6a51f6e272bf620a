"""The starts of a `once` task whose message is a row: taking it says the first one, and costs no statement."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
from kombu import Consumer, Exchange, Queue
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.broker import heart, hold
from celery_alchemy.broker.hold import moment
from celery_alchemy.databases import LoneStatement
from celery_alchemy.outbox import lone_statement
from celery_alchemy.outbox.lone_statement import Answer
from celery_alchemy.outbox.outbox import ROW_HEADER, TAKEN_HEADER
from tests.broker.broker_stand import BrokerStand, write
from tests.services.databases import Database
from tests.stand import Crash, Sent
from tests.waiting import eventually

#: Where tasks go that say nothing of a queue.
CELERY = Queue("celery")


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
def taking(stand: BrokerStand, queue: Queue = CELERY) -> Iterator[Callable[[], Any]]:
    """Give what takes the next message of a queue."""
    with stand.app.connection_for_read() as connection, connection.channel() as channel:
        bound: Any = queue(channel)
        bound.declare()
        yield bound.get


@contextmanager
def worker(stand: BrokerStand) -> Iterator[Callable[[], str]]:
    """Give what takes the next message and runs it, as a worker does: its state, or that it was killed.

    What kills it is due again at once, as when another worker has found it lost.
    """
    with taking(stand) as take:

        def run() -> str:
            message = take()
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


def test_first_start_costs_no_statement(stand: BrokerStand) -> None:
    """The claim says already that a worker has it, and that it is not done."""
    seen: list[int] = []

    def pay(session: Session) -> None:
        session.execute(text("INSERT INTO effect (name) VALUES ('paid')"))
        seen.extend(row(stand, "deliveries"))

    send(stand, stand.task(pay, name="pay", once=True))
    with lone_statements() as statements, worker(stand) as run:
        state = run()

    assert (state, seen, statements) == ("SUCCESS", [0], [])
    assert stand.database.rows("SELECT name FROM effect") == [("paid",)]


def noting(runs: list[int]) -> Callable[[], None]:
    """Return a body that notes its run."""

    def body() -> None:
        runs.append(1)

    return body


def failing(error: type[Exception]) -> Callable[..., NoReturn]:
    """Return a function that raises an error."""

    def fails(*args: object) -> NoReturn:
        raise error

    return fails


def given_back(stand: BrokerStand, message: Any, patch: pytest.MonkeyPatch) -> None:
    """The worker has given back a message since it took this one: a channel of its was closed, perhaps."""
    send(stand, stand.app.tasks["pay"])
    message.channel.basic_get("celery").requeue()


def silent(stand: BrokerStand, message: Any, patch: pytest.MonkeyPatch) -> None:
    """The worker has not shown its life for half of the time after which it counts as lost."""
    seconds = stand.home.worker_lost_after_seconds / 2
    patch.setattr(hold, "moment", lambda: moment() + seconds)


def of_another(stand: BrokerStand, message: Any, patch: pytest.MonkeyPatch) -> None:
    """The worker that has shown its life is another one than has taken the message."""
    message.headers[TAKEN_HEADER][0] = "another"


def of_another_row(stand: BrokerStand, message: Any, patch: pytest.MonkeyPatch) -> None:
    """The row of its message is not the task's, as where the sender and the worker make other keys of one task."""
    message.headers[ROW_HEADER] = "another"


@pytest.mark.parametrize("happens", [given_back, silent, of_another, of_another_row])
def test_start_looks_where_another_worker_may_have_the_message(
    stand: BrokerStand,
    happens: Callable[[BrokerStand, Any, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another one may have done it meanwhile: its body does not run again."""
    runs: list[int] = []
    send(stand, stand.task(noting(runs), name="pay", once=True))
    with taking(stand) as take:
        message = take()
        happens(stand, message, monkeypatch)
        copy = Sent.of(message)
        with lone_statements() as statements:
            states = [stand.deliver(copy).state for _ in range(2)]
        message.ack()

    assert (states, statements, runs) == (["SUCCESS", "SUCCESS"], ["SELECT", "SELECT"], [1])


def test_message_is_held_for_as_long_as_the_heart_beats(database: Database) -> None:
    """However long a message waits in its worker, its start costs no statement."""
    runs: list[int] = []
    stand = BrokerStand(database, worker_lost_after=1)
    send(stand, stand.task(noting(runs), name="pay", once=True))
    with taking(stand) as take:
        message = take()
        worker_id, taken_at = message.headers[TAKEN_HEADER]
        eventually(
            lambda: moment() - taken_at > 1 and stand.home.hold.covers(worker_id, taken_at, 0.25),
            timeout=20,
            what="it is held when it would count as lost without a heartbeat",
        )
        message.ack()


def test_start_looks_where_another_message_may_start_the_task(stand: BrokerStand) -> None:
    """A task that was sent twice, under an id that its sender chose, is done by another worker while this one holds it."""
    runs: list[int] = []
    task = stand.task(noting(runs), name="report", once=True)
    for _ in range(2):
        with stand.alchemy.begin() as session:
            enqueue(session, task.s(), task_id="report-7")
    with taking(stand) as take:
        messages = [take(), take()]
        for message in reversed(messages):
            assert stand.deliver(Sent.of(message)).state == "SUCCESS"
            message.ack()

    assert runs == [1]


def test_message_of_two_queues_is_done_once(stand: BrokerStand) -> None:
    """Each queue has one: the body does not run for the second."""
    runs: list[int] = []
    exchange = Exchange("all", type="direct")
    with stand.app.connection_for_write() as connection, connection.channel() as channel:
        for name in ("left", "right"):
            Queue(name, exchange, "told")(channel).declare()
    task = stand.task(noting(runs), name="told", once=True)
    with stand.alchemy.begin() as session:
        enqueue(session, task.s(), exchange=exchange, routing_key="told")
    with taking(stand, Queue("left")) as left, taking(stand, Queue("right")) as right:
        messages = [left(), right()]
        for message in reversed(messages):
            assert stand.deliver(Sent.of(message)).state == "SUCCESS"
            message.ack()

    assert runs == [1]


def test_message_of_a_queue_and_a_reader_is_done_once(stand: BrokerStand) -> None:
    """What is read as a broadcast may do the work too."""
    runs: list[int] = []
    exchange = Exchange("all", type="direct")
    task = stand.task(noting(runs), name="told", once=True)
    heard: list[Any] = []
    with taking(stand, Queue("left", exchange, "told")) as left, stand.app.connection_for_read() as connection:
        reader = Queue("reader", exchange, "told", auto_delete=True)
        with Consumer(connection, [reader], on_message=heard.append, accept=["json"], no_ack=True):
            with stand.alchemy.begin() as session:
                enqueue(session, task.s(), exchange=exchange, routing_key="told")
            message = left()
            while not heard:
                connection.drain_events(timeout=10)
        for copy in (heard[0], message):
            assert stand.deliver(Sent.of(copy)).state == "SUCCESS"
        message.ack()

    assert runs == [1]


@pytest.mark.parametrize("first", ["INSERT INTO effect (name) VALUES ('sent')", "SELECT 1"])
def test_plain_send_in_a_transaction_may_have_a_chosen_id(database: Database, first: str) -> None:
    """It is written with the transaction, or on SQLite when that ends: another message of its id may be there, or come."""
    runs: list[int] = []
    stand = BrokerStand(database, publish_in_transaction="defer")
    task = stand.task(noting(runs), name="report", once=True)

    def sends(session: Session) -> None:
        session.execute(text(first))
        task.apply_async(task_id="report-7")

    sender = stand.task(sends, name="sends")
    for _ in range(2):
        assert stand.result_of(sender).state == "SUCCESS"
    with taking(stand) as take:
        messages = [take(), take()]
        for message in reversed(messages):
            assert stand.deliver(Sent.of(message)).state == "SUCCESS"
            message.ack()

    assert runs == [1]


def test_task_that_has_died_by_another_message_stays_dead(stand: BrokerStand) -> None:
    """Its id was sent again, and that message's run has failed for good while this one was held."""
    runs: list[int] = []

    def fails_first(session: Session) -> None:
        runs.append(1)
        write(session, f"run {len(runs)}")
        if len(runs) == 1:
            raise ValueError

    task = stand.task(fails_first, name="pay", once=True)
    with stand.alchemy.begin():
        sent = task.delay_on_commit()
    task.apply_async(task_id=sent.id)
    with taking(stand) as take:
        messages = [take(), take()]
        states = [stand.deliver(Sent.of(message)).state for message in reversed(messages)]
        for message in messages:
            message.ack()

    assert states == ["FAILURE", "FAILURE"]
    assert row(stand, "died_at IS NOT NULL, completed_at IS NULL") == (True, True)
    assert stand.database.rows("SELECT name FROM effect") == []


def test_worker_that_finds_itself_lost_holds_nothing(stand: BrokerStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is gone, whatever the clocks say: the clock of the database was set, or the machine stood still with its own."""
    monkeypatch.setattr(heart, "BEAT_MAX_SECONDS", 0.1)
    send(stand, stand.task(noting([]), name="pay", once=True))
    with taking(stand) as take:
        worker_id, taken_at = take().headers[TAKEN_HEADER]
        stand.database.execute("DELETE FROM celery_workers")
        eventually(lambda: not stand.home.hold.covers(worker_id, taken_at, 1000), timeout=20)

        assert not stand.home.hold.covers(worker_id, moment(), 1000)


def test_claims_from_before_an_outage_are_not_held(stand: BrokerStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has crashed, or its replica, may have lost their commits."""
    monkeypatch.setattr(heart, "BEAT_MAX_SECONDS", 0.1)
    really = heart.beat
    send(stand, stand.task(noting([]), name="pay", once=True))
    with taking(stand) as take:
        worker_id, taken_at = take().headers[TAKEN_HEADER]
        with monkeypatch.context() as patch:
            patch.setattr(heart, "beat", failing(ConnectionError))
            eventually(lambda: not stand.home.hold.covers(worker_id, taken_at, 1000), timeout=20)
        monkeypatch.setattr(heart, "beat", really)
        eventually(lambda: stand.home.hold.covers(worker_id, moment(), 1000), timeout=20)

        assert not stand.home.hold.covers(worker_id, taken_at, 1000)


def test_run_that_is_overtaken_looks(stand: BrokerStand) -> None:
    """Its message was what it had taken; what has become of it is read."""
    runs: list[int] = []

    def pay() -> int:
        runs.append(1)
        if len(runs) == 1:
            stand.database.execute("DELETE FROM celery_outbox")
        return len(runs)

    send(stand, stand.task(pay, name="pay", once=True))
    with lone_statements() as statements, worker(stand) as run:
        state = run()

    assert (state, runs, statements) == ("SUCCESS", [1, 1], ["SELECT"])


def test_plain_send_that_is_claimed_anew_in_mid_run_runs_no_third_time(stand: BrokerStand) -> None:
    """The second delivery writes a row to count its starts in; the first run, which had found none, completes that row."""
    runs: list[int] = []
    has_begun, may_go_on = threading.Event(), threading.Event()

    def pay(session: Session) -> int:
        runs.append(1)
        run = len(runs)
        if run == 1:
            copy = pool.submit(stand.deliver, second)
            assert has_begun.wait(20)
            copies.append(copy)
        elif run == 2:
            has_begun.set()
            assert may_go_on.wait(20)
        write(session, f"run {run}")
        return run

    copies: list[Any] = []
    stand.task(pay, name="pay", once=True).delay()
    with taking(stand) as take, ThreadPoolExecutor(1) as pool:
        lost = take()
        first = Sent.of(lost)
        lost.requeue()
        message = take()
        second = Sent.of(message)
        ended = stand.deliver(first)
        may_go_on.set()
        copy = copies[0].result(20)
        message.ack()

    assert (ended.state, ended.value, copy.state, copy.value) == ("SUCCESS", 1, "SUCCESS", 1)
    assert runs == [1, 1]
    assert stand.database.rows("SELECT name FROM effect") == [("run 1",)]
    assert row(stand, "completed_at IS NOT NULL, deliveries, died_at IS NULL") == (True, 0, True)


def test_retry_is_held_by_who_takes_it(stand: BrokerStand) -> None:
    """Its message passes on the headers of the delivery before: what they say of that is not believed."""
    runs: list[int] = []

    def pay(self: Any) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise self.retry(countdown=0)

    send(stand, stand.task(pay, name="pay", bind=True, once=True))
    with worker(stand) as run:
        states = [run()]
        with lone_statements() as statements:
            states.append(run())

    assert (states, runs, statements) == (["RETRY", "SUCCESS"], [1, 1], ["SELECT"])


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
    with taking(stand) as take:
        take().requeue()

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
