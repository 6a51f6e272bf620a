"""Two tasks with one key, of which the second does the work: the row of the key is the first one's message, and must not vanish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import Ignore
from kombu import Queue
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, enqueue
from celery_alchemy.operations.dead_tasks import dead, revive, status
from celery_alchemy.outbox.relay import relay_of
from tests.broker.broker_stand import BrokerStand, write
from tests.services.databases import Database
from tests.stand import Sent

#: What is still to be done.
OPEN = "SELECT task_id FROM celery_outbox WHERE completed_at IS NULL"


class Worker:
    """Takes messages and runs them, as a worker does."""

    def __init__(self, stand: BrokerStand, channel: Any) -> None:
        self._stand = stand
        self._queue: Any = Queue("celery")(channel)
        self._queue.declare()

    def take(self) -> Any:
        """Take the next message; None if there is none."""
        return self._queue.get()

    def run(self, message: Any) -> str:
        """Run a message and acknowledge it; return how its task ended."""
        ended = self._stand.deliver(Sent.of(message))
        message.ack()
        return ended.state

    def run_all(self) -> list[str]:
        """Run what waits until nothing is due; return the ids of its tasks."""
        ran = []
        while (message := self.take()) is not None:
            self.run(message)
            ran.append(message.headers["id"])
        return ran


@pytest.fixture
def workers(stand: BrokerStand) -> Iterator[Callable[[], Worker]]:
    """Make workers of the stand."""
    connections: list[Any] = []

    def make() -> Worker:
        connections.append(stand.app.connection_for_read())
        return Worker(stand, connections[-1].channel())

    yield make
    for connection in connections:
        connection.release()


@pytest.fixture(autouse=True)
def tasks(stand: BrokerStand) -> None:
    """Make the tasks of these tests."""

    def charge(session: Session, order: int) -> str:
        write(session, f"charge {order}")
        return f"charged {order}"

    def note(session: Session, by: str) -> str:
        return write(session, by)

    def gives_up(session: Session, order: int) -> None:
        raise Ignore

    def collect(parts: list[str]) -> list[str]:
        return parts

    stand.task(charge, name="charge", once=lambda order: f"order {order}")
    stand.task(gives_up, name="gives up", once=lambda order: f"order {order}")
    stand.task(note, name="note")
    stand.task(collect, name="collect")


def send(stand: BrokerStand, name: str, **options: Any) -> Any:
    """Send a task of the key 7 on commit."""
    with stand.alchemy.begin():
        return stand.app.tasks[name].apply_async_on_commit((7,), **options)


def note(stand: BrokerStand, text: str) -> Any:
    """Return a callback that notes whose it is."""
    return stand.app.tasks["note"].si(text)


def effects(stand: BrokerStand) -> list[str]:
    """Return what was written, sorted."""
    return sorted(name for (name,) in stand.database.rows("SELECT name FROM effect"))


def let_time_pass(stand: BrokerStand) -> None:
    """Have everything be due that waits for its time."""
    stand.database.execute("UPDATE celery_outbox SET due_at = '2020-01-01 00:00:00' WHERE due_at IS NOT NULL")


def test_owners_message_outlives_the_completion_by_a_guest(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """It waits for its own time, in its own queue, and reports what the guest has done."""
    owner = send(stand, "charge", countdown=3600, link=note(stand, "owner's link"), priority=3)
    guest = send(stand, "charge", link=note(stand, "guest's link"))
    worker = workers()
    worker.run_all()

    assert (owner.state, guest.state) == ("PENDING", "SUCCESS")
    kept = stand.database.rows("SELECT task_id, queue, priority, once FROM celery_outbox WHERE completed_at IS NULL")
    assert kept == [(owner.id, "celery", 3, False)]
    assert status(stand.alchemy.engine)["completed"] == 1
    let_time_pass(stand)
    worker.run_all()
    assert owner.get(timeout=5) == "charged 7"
    assert effects(stand) == ["charge 7", "guest's link", "owner's link"]
    assert stand.database.rows(OPEN) == []


def test_chain_and_chord_of_the_owner_go_on(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """As its callbacks do."""
    app = stand.app
    with stand.alchemy.begin() as session:
        parts = [app.tasks["charge"].s(7).set(countdown=3600), app.tasks["charge"].s(8)]
        ended = enqueue(session, chain(chord(parts, app.tasks["collect"].s()), note(stand, "behind")))
    send(stand, "charge")
    worker = workers()
    worker.run_all()
    let_time_pass(stand)
    worker.run_all()

    assert ended.get(timeout=5) == "wrote behind"
    assert ended.parent.result == ["charged 7", "charged 8"]


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "alive"])
def test_owner_that_a_worker_has_reports_once(stand: BrokerStand, workers: Callable[[], Worker], is_lost: bool) -> None:
    """If its worker is lost before it has, another one does; else nothing of its message is left."""
    owner = send(stand, "charge", link=note(stand, "owner's link"))
    send(stand, "charge", link=note(stand, "guest's link"))
    first, second = workers(), workers()
    message = first.take()
    assert message.headers["id"] == owner.id
    second.run_all()
    assert effects(stand) == ["charge 7", "guest's link"]

    if is_lost:
        claims = "UPDATE celery_outbox SET claim = NULL, due_at = created_at WHERE claim IS NOT NULL"
        stand.database.execute(claims)
    else:
        assert first.run(message) == "SUCCESS"
        assert stand.database.rows("SELECT id FROM celery_outbox WHERE once = :no AND task_id = :id", no=False, id=owner.id) == []
    second.run_all()

    assert owner.get(timeout=5) == "charged 7"
    assert effects(stand) == ["charge 7", "guest's link", "owner's link"]
    assert stand.database.rows(OPEN) == []


def test_report_is_one_transaction_with_the_end_of_the_message(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """A process that dies behind it has left nothing to do, and one that dies before it everything."""
    owner = send(stand, "charge", countdown=3600, link=note(stand, "owner's link"))
    send(stand, "charge")
    worker = workers()
    worker.run_all()
    let_time_pass(stand)
    message = worker.take()
    task = stand.app.tasks["charge"]
    args, kwargs, embedded = message.payload
    request = {**message.headers, **embedded, "args": args, "kwargs": kwargs, "is_eager": False}
    task.push_request(**request, called_directly=False, delivery_info={"routing_key": "celery"})
    try:
        # What the tracer would do behind it is never done.
        assert task.run(7) == "charged 7"
    finally:
        task.pop_request()

    assert owner.get(timeout=5) == "charged 7"
    message.requeue()
    worker.run_all()
    assert effects(stand) == ["charge 7", "owner's link"]
    assert stand.database.rows(OPEN) == []


def test_owner_of_what_a_guest_has_ignored_is_done_with(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """It is delivered, finds that there is nothing to report, and goes."""
    owner = send(stand, "gives up", countdown=3600)
    send(stand, "gives up")
    worker = workers()
    worker.run_all()
    assert stand.database.rows(OPEN) == [(owner.id,)]
    let_time_pass(stand)

    assert worker.run_all() == [owner.id]
    assert stand.database.rows(OPEN) == []


def test_owner_goes_on_when_a_direct_call_has_done_its_work(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """A call without an id is none of the owner's deliveries: its callbacks were never sent."""
    owner = send(stand, "charge", link=note(stand, "owner's link"))
    assert stand.app.tasks["charge"](7) == "charged 7"

    workers().run_all()

    assert owner.get(timeout=5) == "charged 7"
    assert effects(stand) == ["charge 7", "owner's link"]
    assert stand.database.rows(OPEN) == []


def test_owner_is_revoked_after_a_guest_has_done_its_work(stand: BrokerStand) -> None:
    """Its message is one that waits, and its work stays done."""
    owner = send(stand, "charge", countdown=3600)
    stand.app.tasks["charge"](7)

    owner.revoke()

    assert owner.state == "REVOKED"
    assert stand.database.rows(OPEN) == []
    assert dead(stand.alchemy.engine) == []


def test_schema_of_its_own_keeps_the_message_too(database: Database) -> None:
    """The statements reach the table where it is."""
    if database.name != "postgresql":
        pytest.skip("its schema is made by create_tables()")
    app = Celery("schema", set_as_current=False)
    alchemy = Alchemy(app, database.url, broker=True, schema="apart", publish_in_transaction="allow")
    alchemy.create_tables()

    @app.task(shared=False, once=lambda order: f"{order}", name="pay")
    def pay(session: Session, order: int) -> int:
        return order

    with alchemy.begin():
        owner = pay.apply_async_on_commit((7,), countdown=3600)
    pay(7)

    rows = database.rows("SELECT id, once FROM apart.celery_outbox WHERE body IS NOT NULL")
    assert rows == [(owner.id, False)]
    app.close()
    alchemy.engine.dispose()


def test_relay_is_not_needed(stand: BrokerStand) -> None:
    """The kept message is in its queue: a relay that runs as well leaves it alone."""
    owner = send(stand, "charge", countdown=3600)
    stand.app.tasks["charge"](7)
    let_time_pass(stand)

    assert relay_of(stand.alchemy).step() == 0
    assert stand.database.rows(OPEN) == [(owner.id,)]


@pytest.mark.parametrize("ending", ["requeued", "acknowledged"])
def test_owner_that_ends_without_a_report_is_not_lost(stand: BrokerStand, workers: Callable[[], Worker], ending: str) -> None:
    """What its worker says of the delivery holds for the message that was kept meanwhile."""
    owner = send(stand, "charge", link=note(stand, "owner's link"))
    send(stand, "charge")
    first, second = workers(), workers()
    message = first.take()
    second.run_all()

    if ending == "requeued":
        # Its child was killed, or its database was cut.
        message.requeue()
    else:
        # By a worker that does not know the task.
        message.ack()
        assert first.take() is None
        assert [row["task_id"] for row in dead(stand.alchemy.engine)] == [owner.id]
        assert revive(stand.alchemy.engine, [owner.id]) == 1
    first.run_all()

    assert owner.get(timeout=5) == "charged 7"
    assert effects(stand) == ["charge 7", "owner's link"]
    assert stand.database.rows(OPEN) == []


def test_owner_that_was_taken_from_a_worker_reports_once(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """The worker stood still, and another one has reported meanwhile."""
    app = stand.app
    part = app.tasks["charge"].s(7)
    part.link(note(stand, "link"))
    with stand.alchemy.begin() as session:
        owner = enqueue(session, chain(part, note(stand, "behind")))
    send(stand, "charge")
    first, second = workers(), workers()
    message = first.take()
    second.run_all()
    stand.database.execute("UPDATE celery_outbox SET claim = NULL, due_at = created_at WHERE claim IS NOT NULL")
    second.run_all()
    assert owner.get(timeout=5) == "wrote behind"

    assert first.run(message) == "SUCCESS"
    second.run_all()

    assert effects(stand) == ["behind", "charge 7", "link"]
    assert stand.database.rows(OPEN) == []


def test_callbacks_that_say_the_same_are_each_tasks_own(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """Sent plainly they have no ids: the guest's is none of the next task's."""
    for _ in range(2):
        stand.app.tasks["charge"].apply_async((7,), link=note(stand, "link"))

    workers().run_all()

    assert effects(stand) == ["charge 7", "link", "link"]
    assert stand.database.rows(OPEN) == []


def test_retry_with_arguments_of_another_key_ends_the_row_that_it_began(stand: BrokerStand, workers: Callable[[], Worker]) -> None:
    """Its message is that row: it would be given up with no end, or wait for ever."""

    @stand.task(name="ships", once=lambda place: place, bind=True)
    def ships(self: Any, session: Session, place: str) -> str:
        write(session, place)
        if place == "EU":
            raise self.retry(args=("US",), countdown=0)
        return place

    ended = [ships.delay("EU"), ships.delay("US")]
    workers().run_all()
    ended.append(ships.delay("EU"))
    workers().run_all()

    assert [one.get(timeout=5) for one in ended] == ["US", "US", "US"]
    assert effects(stand) == ["US", "US"]
    assert stand.database.rows(OPEN) == []
    assert dead(stand.alchemy.engine) == []
