"""The answer to the COMMIT of a worker's parent is lost: what was taken by it is the worker's, and must not stay so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Queue
from sqlalchemy.exc import DBAPIError

from celery_alchemy.broker import claims, heart, taking, workers
from celery_alchemy.broker.broadcasts import Log
from celery_alchemy.broker.tables import BrokerTables
from celery_alchemy.broker.workers import Released
from celery_alchemy.databases.tables import metadata
from tests.broker.lines import Heard, Line
from tests.delivery.proxy import CommitProxy, Loss
from tests.services.databases import Database
from tests.waiting import eventually

pytestmark = pytest.mark.databases("postgresql", "mariadb")

JOBS = Queue("jobs")


@pytest.fixture
def proxy(database: Database) -> Iterator[CommitProxy]:
    """What a consumer reaches the database by."""
    metadata.create_all(database.engine)
    with CommitProxy(database.url) as proxy:
        yield proxy


@pytest.fixture
def consumer(proxy: CommitProxy) -> Iterator[Line]:
    """A connection by way of the proxy."""
    with Connection(f"alchemy+{proxy.url}") as connection:
        yield Line(connection)


@pytest.fixture
def producer(database: Database) -> Iterator[Line]:
    """A connection past the proxy."""
    with Connection(f"alchemy+{database.url}") as connection:
        yield Line(connection)


@pytest.fixture
def lose_next_round(proxy: CommitProxy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the next round that takes a message get no answer to its COMMIT."""
    really = claims.take
    losses: list[Loss] = []

    def take(tables: BrokerTables, *args: Any) -> Any:
        taken = really(tables, *args)
        if taken and losses:
            proxy.lose_next(losses.pop(), of=tables.connection)
        return taken

    monkeypatch.setattr(taking, "take", take)
    return lambda: losses.append("answer")


def gone(database: Database) -> None:
    eventually(lambda: database.scalar("SELECT count(*) FROM celery_outbox") == 0, what="no message is left")


def test_messages_of_a_round_without_an_answer_arrive(
    proxy: CommitProxy, consumer: Line, producer: Line, database: Database, lose_next_round: Callable[[], None]
) -> None:
    """The worker lives on, and they are its own: nobody else would ever make them due again."""
    with consumer.consuming(JOBS) as heard:
        producer.send(JOBS, "hello")
        heard.wait_for(1)
        heard.messages.pop().ack()
        gone(database)
        lose_next_round()
        for number in range(3):
            producer.send(JOBS, number)
        heard.wait_for(3)
        heard.drain(0.5)

        assert proxy.lost == 1
        assert sorted(message.payload for message in heard.messages) == [0, 1, 2]
        for message in heard.messages:
            message.ack()
        gone(database)


def test_worker_whose_first_row_had_no_answer_takes_messages(
    proxy: CommitProxy, consumer: Line, producer: Line, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is there, and is its own."""
    really = heart.enlist

    def enlist(tables: BrokerTables, *args: Any) -> None:
        really(tables, *args)
        if not proxy.lost:
            proxy.lose_next("answer", of=tables.connection)

    monkeypatch.setattr(heart, "enlist", enlist)
    producer.send(JOBS, "hello")
    with consumer.consuming(JOBS) as heard:
        [message] = heard.wait_for(1, timeout=20)

        assert proxy.lost == 1
        assert message.payload == "hello"
        assert database.scalar("SELECT count(*) FROM celery_workers") == 1
        message.ack()
        gone(database)


def test_message_of_a_get_without_an_answer_can_be_had(
    proxy: CommitProxy, consumer: Line, producer: Line, database: Database, lose_next_round: Callable[[], None]
) -> None:
    """The caller has an error, and gets the message the next time."""
    producer.send(JOBS, "hello")
    lose_next_round()
    with pytest.raises(DBAPIError):
        consumer.take(JOBS)

    message = eventually(lambda: consumer.take(JOBS), what="the message has come")

    assert proxy.lost == 1
    assert message.payload == "hello"
    message.ack()
    gone(database)


def test_remote_control_of_a_round_without_an_answer_is_heard(
    proxy: CommitProxy, consumer: Line, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is not read again."""
    really = Log.read

    def read(log: Log, tables: BrokerTables, *args: Any) -> Any:
        said = really(log, tables, *args)
        if said and not proxy.lost:
            proxy.lose_next("answer", of=tables.connection)
        return said

    heard: list[str] = []
    app: Any = Celery("control", set_as_current=False, broker=f"alchemy+{database.url}")
    handlers = {"ping": lambda state: heard.append("ping")}
    node = app.control.mailbox.Node("celery@node", channel=consumer.channel, handlers=handlers)
    node.listen()
    monkeypatch.setattr(Log, "read", read)

    app.control.broadcast("ping")
    Heard(consumer.connection).drain(3.0)

    assert proxy.lost == 1
    assert heard == ["ping"]
    app.close()


def test_poison_of_a_look_without_an_answer_is_set_aside(
    proxy: CommitProxy, consumer: Line, producer: Line, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that has found it out has it from then on."""
    really = workers.release_lost

    def release(tables: BrokerTables, *args: Any) -> Released:
        released = really(tables, *args)
        if released.poisonous:
            proxy.lose_next("answer", of=tables.connection)
        return released

    monkeypatch.setattr("celery_alchemy.broker.heart.release_lost", release)
    monkeypatch.setattr(heart, "BEAT_MAX_SECONDS", 0.2)
    producer.send(JOBS, "hello")
    database.execute("UPDATE celery_outbox SET claim = 'gone', due_at = NULL, deliveries = 5")
    with consumer.consuming(JOBS):
        died = "SELECT count(*) FROM celery_outbox WHERE died_at IS NOT NULL"
        eventually(lambda: database.scalar(died) == 1, what="it is set aside")

    assert proxy.lost == 1
