"""On real brokers: what is settled is in the broker, also after it has lost everything it had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue
from kombu.transport.native_delayed_delivery import calculate_routing_key
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

pytestmark = [
    pytest.mark.databases("sqlite"),
    # redis-py deprecates what Celery's result backend uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def stand(database: Database, broker: Broker) -> Iterator[OutboxStand]:
    """A stand on a real broker."""
    stand = OutboxStand(database, broker)
    yield stand
    stand.close()


@pytest.mark.parametrize("number", [1, 5])
def test_committed_messages_are_in_the_broker(stand: OutboxStand, number: int) -> None:
    """Alone and together, in their order, with their headers and properties."""
    with stand.alchemy.begin() as session:
        ids = [enqueue(session, stand.effect.s(f"{n}"), priority=n, headers={"n": n}).id for n in range(number)]

    sent = stand.sent()
    assert sorted(one.id for one in sent) == sorted(ids)
    assert all(one.headers["n"] == int(one.args[0]) == one.properties["priority"] for one in sent)
    assert stand.outbox() == []


@pytest.mark.brokers("rabbitmq")
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("priority", [None, 3])
def test_properties_are_those_that_celery_gives(stand: OutboxStand, number: int, priority: int | None) -> None:
    """A message that Celery sends without a priority has none here either, alone and in a batch."""
    options: dict[str, Any] = {"queue": stand.queue, "expires": 3600.4} | ({} if priority is None else {"priority": priority})
    stand.effect.apply_async(("a",), **options)
    with stand.alchemy.begin() as session:
        for _ in range(number):
            enqueue(session, stand.effect.s("a"), **options)

    plain, *ours = ({**sent.properties, "headers": sorted(sent.headers)} for sent in stand.sent())
    varying = ("correlation_id", "delivery_tag", "application_headers", "expiration")
    expected = {name: value for name, value in plain.items() if name not in varying}
    assert len(ours) == number
    for properties in ours:
        assert {name: value for name, value in properties.items() if name not in varying} == expected
        assert abs(int(properties["expiration"]) - int(plain["expiration"])) < 60_000
    assert plain.get("priority") == priority


@pytest.mark.parametrize("number", [1, 5])
def test_owed_tasks_are_sent_again_after_the_broker_came_back_empty(stand: OutboxStand, broker: Broker, number: int) -> None:
    """Their queue is gone with everything else: the relay declares it again."""

    @stand.task(name="owed", once=True)
    def owed(session: Session, name: str) -> None:
        session.add(Effect(name=name))

    with stand.alchemy.begin():
        ids = {owed.delay_on_commit(f"{n}").id for n in range(number)}
    stand.handed_over()
    lose_everything(broker, stand.queue)
    stand.make_due()
    stand.relay_all()

    sent = stand.sent()
    assert {one.id for one in sent} == ids
    for one in sent:
        stand.deliver(one)
    assert sorted(stand.effects()) == [f"{n}" for n in range(number)]


@pytest.mark.brokers("redis", "rabbitmq")
@pytest.mark.parametrize("number", [1, 3])
def test_monitors_are_told_of_what_the_outbox_sends(stand: OutboxStand, number: int) -> None:
    """With task_send_sent_event, and also when this process is the first that an exchange for events is declared by."""
    stand.app.conf.task_send_sent_event = True
    told: list[str] = []

    def drain(connection: Any) -> bool:
        with suppress(OSError):
            connection.drain_events(timeout=0.1)
        return len(told) >= number

    with stand.broker_down(), stand.alchemy.begin() as session:
        first = enqueue(session, stand.effect.s("first")).id
    stand.make_due()
    stand.relay_all()
    left = stand.outbox()
    with stand.app.connection_for_read() as connection:
        receiver: Any = stand.app.events.Receiver(connection, handlers={"task-sent": lambda event: told.append(event["uuid"])})
        with receiver.consumer_context() as (listening, _, _):
            drain(listening)
            with stand.alchemy.begin() as session:
                ids = [enqueue(session, stand.effect.s(f"{n}")).id for n in range(number)]
            eventually(lambda: drain(listening), what="the monitor has been told")

    assert left == []
    assert set(told) - {first} == set(ids)


def lose_everything(broker: Broker, queue: str) -> None:
    """Do what a restart without persistence does to a queue."""
    options = broker.settings.get("broker_transport_options", {})
    with Connection(broker.settings["broker_url"], transport_options=options) as connection:
        channel: Any = connection.channel()
        channel.queue_purge(queue)
        if broker.name == "rabbitmq":
            channel.queue_delete(queue)


@pytest.mark.brokers("rabbitmq")
@pytest.mark.parametrize("number", [1, 5])
def test_message_that_rabbitmq_refuses_is_not_settled(stand: OutboxStand, broker: Broker, number: int) -> None:
    """A full queue with reject-publish answers with a nack, which only a channel in confirm mode gets."""
    name = broker.queue("full")
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    queue = Queue(name, routing_key=name, queue_arguments=arguments)
    stand.app.conf.task_queues = [queue]
    with Connection(broker.settings["broker_url"]) as connection:
        queue(connection.channel()).declare()
        connection.Producer().publish("in the way", routing_key=name)

        with stand.alchemy.begin() as session:
            ids = [enqueue(session, stand.effect.s(f"{n}"), queue=name).id for n in range(number)]
        kept = stand.outbox()
        queue(connection.channel()).purge()
        stand.make_due()
        stand.relay_all()
    left = stand.outbox()

    assert sorted(kept) == sorted(ids)
    assert len(left) == number - 1


@pytest.mark.brokers("rabbitmq")
def test_every_channel_that_publishes_is_in_confirm_mode(stand: OutboxStand) -> None:
    """Without it RabbitMQ may drop a message in silence, and the outbox would have deleted it."""
    outbox = stand.alchemy.outbox
    assert outbox is not None
    with outbox.publisher._producers().acquire(block=True) as producer:
        channel: Any = producer.channel
        client: Any = producer.connection
        assert client.transport_options["confirm_publish"] is True
        assert channel.connection.confirm_publish is True
        assert channel.basic_publish.__name__ == "basic_publish_confirm"


@pytest.mark.brokers("rabbitmq")
@pytest.mark.parametrize("number", [1, 5])
def test_message_without_a_route_is_not_settled(stand: OutboxStand, number: int) -> None:
    """RabbitMQ confirms a message that no queue takes: it must be asked to give it back."""
    with stand.broker_down(), stand.alchemy.begin() as session:
        for n in range(number):
            enqueue(session, stand.effect.s(f"{n}"))
    for row_id, envelope in stand.outbox("id, envelope"):
        lost = json.dumps({**json.loads(envelope), "routing_key": f"{stand.prefix}-nowhere", "queues": []})
        with stand.database.engine.begin() as connection:
            connection.execute(text("UPDATE celery_outbox SET envelope = :e WHERE id = :i"), {"e": lost, "i": row_id})
    stand.make_due()
    stand.relay_all()
    with stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("routed"))

    assert [sent.args for sent in stand.sent()] == [["routed"]]
    assert len(stand.outbox()) == number
    assert all(f"{stand.prefix}-nowhere" in error for error in stand.outbox("error"))


@pytest.mark.brokers("rabbitmq")
@pytest.mark.parametrize("number", [1, 5])
def test_queue_behind_an_exchange_of_its_own_is_declared_again_when_it_is_gone(
    stand: OutboxStand, broker: Broker, number: int
) -> None:
    """RabbitMQ confirms what a topic exchange has no queue for, as it does on the default exchange."""
    name = broker.queue("topic")
    stand.app.conf.task_queues = [Queue(name, Exchange(name, type="topic"), routing_key=f"{name}.#")]
    with stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("first"), queue=name, routing_key=f"{name}.effects")
    stand.handed_over()
    with Connection(broker.settings["broker_url"]) as connection:
        channel: Any = connection.channel()
        channel.queue_delete(name)
    with stand.alchemy.begin() as session:
        for n in range(number):
            enqueue(session, stand.effect.s(f"{n}"), queue=name, routing_key=f"{name}.effects")

    assert sorted(sent.args[0] for sent in stand.sent(name)) == [f"{n}" for n in range(number)]
    assert stand.outbox() == []


@pytest.mark.brokers("rabbitmq")
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize(("left", "shortest"), [(600, 500), (-60, 0)], ids=["some of it", "nothing"])
def test_delay_that_rabbitmq_counts_is_what_is_left_of_it(
    stand: OutboxStand, broker: Broker, number: int, left: int, shortest: int
) -> None:
    """With quorum queues the broker holds a message for the seconds in its routing key, from the publish on."""
    name = broker.queue("delayed")
    exchange = Exchange(f"{name}_celery_delayed_27", type="topic", auto_delete=True)
    with Connection(broker.settings["broker_url"]) as connection:
        Queue(name, exchange, routing_key="#")(connection.channel()).declare()
        with stand.broker_down(), stand.alchemy.begin() as session:
            for n in range(number):
                enqueue(session, stand.effect.s(f"{n}"), countdown=3600)
        for row_id, envelope in stand.outbox("id, envelope"):
            message = json.loads(envelope)
            message |= {"exchange": exchange.name, "routing_key": calculate_routing_key(3600, stand.queue), "queues": []}
            message["headers"]["eta"] = (datetime.now(timezone.utc) + timedelta(seconds=left)).isoformat()
            with stand.database.engine.begin() as database:
                database.execute(
                    text("UPDATE celery_outbox SET envelope = :e WHERE id = :i"), {"e": json.dumps(message), "i": row_id}
                )
        stand.make_due()
        stand.relay_all()

    routes = [sent.routing[1].split(".") for sent in stand.sent(name)]
    assert [route[28:] for route in routes] == [[stand.queue]] * number
    assert all(shortest <= int("".join(route[:28]), 2) <= max(left, 0) for route in routes)
