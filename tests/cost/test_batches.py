"""A batch is published in one round trip, and each of its messages is confirmed or has its own error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Queue

from celery_alchemy.messages import publisher as publishing
from celery_alchemy.messages.message import Message
from celery_alchemy.messages.publisher import Publisher
from celery_alchemy.messages.recording import recording
from tests.services.brokers import Broker

ROWS = 50


@pytest.fixture
def app(broker: Broker) -> Celery:
    """An app with one task on the test's broker."""
    app = broker.app("batches")

    @app.task(name="number", shared=False)
    def number(value: int) -> int:
        return value

    return app


@pytest.fixture
def publisher(app: Celery) -> Iterator[Publisher]:
    """A publisher, closed at the end."""
    publisher = Publisher(app)
    yield publisher
    publisher.close()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """The messages that were not confirmed together with others and published one by one."""
    sent: list[Message] = []
    original = publishing.send

    def send(app: Celery, producer: Any, message: Message, **how: Any) -> None:
        sent.append(message)
        original(app, producer, message, **how)

    monkeypatch.setattr(publishing, "send", send)
    return sent


def _messages(app: Celery, count: int = ROWS) -> list[Message]:
    with recording(app) as messages:
        for number in range(count):
            app.send_task("number", (number,), countdown=number % 3 or None, priority=number % 2)
    return messages


def _taken(broker: Broker) -> list[Any]:
    """Take every message out of the broker."""
    options = broker.settings.get("broker_transport_options", {})
    with Connection(broker.settings["broker_url"], transport_options=options) as connection:
        queue = Queue(broker.prefix, durable=True, channel=connection.default_channel)
        return list(iter(lambda: queue.get(no_ack=True), None))


@pytest.mark.brokers("redis", "rabbitmq")
def test_batch_is_confirmed_as_one(app: Celery, broker: Broker, publisher: Publisher, alone: list[Message]) -> None:
    """Where the transport can, a batch goes out together, each message once, unchanged and in order."""
    messages = _messages(app)

    errors = publisher.publish(messages)

    assert errors == [None] * ROWS
    assert alone == []
    taken = _taken(broker)
    by_id = {message.headers["id"]: message for message in taken}
    assert len(taken) == ROWS
    for message in messages:
        got = by_id[message.headers["id"]]
        assert got.headers == message.headers
        assert got.body in (message.body, message.body.decode())
        assert got.content_type == message.content_type
        assert got.properties["correlation_id"] == message.properties["correlation_id"]
        assert got.properties["delivery_mode"] == 2
        assert got.properties["priority"] == message.properties["priority"]


@pytest.mark.brokers("rabbitmq")
def test_refused_message_has_its_own_error(app: Celery, broker: Broker, publisher: Publisher) -> None:
    """RabbitMQ closes the channel for one bad message; the others of its batch are confirmed all the same."""
    messages = _messages(app)
    messages[20].exchange = f"{broker.prefix}-that-nobody-declared"

    errors = publisher.publish(messages)

    assert [index for index, error in enumerate(errors) if error is not None] == [20]
    assert "NOT_FOUND" in str(errors[20])
    assert not publisher.paused
    taken = _taken(broker)
    assert {message.headers["id"] for message in taken} == {message.task_id for message in messages if message is not messages[20]}


@pytest.mark.brokers("rabbitmq")
def test_queue_that_was_deleted_is_made_again(app: Celery, broker: Broker, publisher: Publisher) -> None:
    """A confirm says that the message was routed, not just received: none is lost when its queue vanished."""
    publisher.publish(_messages(app, 2))
    broker._on_channel("queue_delete", broker.prefix)
    messages = _messages(app)

    errors = publisher.publish(messages)

    assert errors == [None] * ROWS
    taken = _taken(broker)
    assert {message.headers["id"] for message in taken} == {message.task_id for message in messages}


@pytest.mark.brokers("redis", "rabbitmq")
def test_dropped_connection_is_made_again(app: Celery, broker: Broker, publisher: Publisher) -> None:
    """A connection that the broker has dropped in between costs no message its publishing."""
    publisher.publish(_messages(app, 2))
    with publisher._producers().acquire() as producer:
        _drop(producer)
    messages = _messages(app)

    errors = publisher.publish(messages)

    assert errors == [None] * ROWS
    taken = _taken(broker)
    assert {message.task_id for message in messages} <= {message.headers["id"] for message in taken}


def _channel_of(producer: Any) -> Any:
    return producer.channel


def _drop(producer: Any) -> None:
    """Close the socket beneath a producer, as a broker or a firewall does."""
    connection = producer.connection
    if connection.transport.driver_type == "redis":
        connection.default_channel.client.connection_pool.disconnect()
    else:
        connection.connection.transport.sock.close()


@pytest.mark.brokers("redis")
def test_refusal_by_redis_has_its_own_error(app: Celery, broker: Broker, publisher: Publisher) -> None:
    """A key of another type in the place of one queue fails the messages to that queue only."""
    messages = _messages(app)
    queue = broker.queue("taken")
    with publisher._producers().acquire() as producer:
        _channel_of(producer).client.set(queue, "no list")
    messages[20].routing_key, messages[20].properties["priority"] = queue, 0

    errors = publisher.publish(messages)

    assert [index for index, error in enumerate(errors) if error is not None] == [20]
    taken = _taken(broker)
    assert len({message.headers["id"] for message in taken}) == ROWS - 1


@pytest.mark.brokers("rabbitmq")
def test_message_that_is_larger_than_a_frame_arrives_whole(
    app: Celery, broker: Broker, publisher: Publisher, alone: list[Message]
) -> None:
    """A body that takes many frames goes out with the batch and arrives as it was."""
    messages = _messages(app, 3)
    messages[1].body = b'[["' + b"x" * 700_000 + b'"], {}, {}]'

    errors = publisher.publish(messages)

    assert errors == [None] * 3
    assert alone == []
    taken = _taken(broker)
    assert max(len(message.body) for message in taken) == len(messages[1].body)


@pytest.mark.brokers("rabbitmq")
def test_silent_broker_is_not_taken_for_a_confirm(app: Celery, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no confirm comes in time every message has an error and the broker counts as down."""
    from celery_alchemy.messages import batches as pipeline

    publisher.publish(_messages(app, 2))
    monkeypatch.setattr(pipeline, "CONFIRM_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(pipeline._ConfirmingChannel, "_on_ack", lambda *_: None)
    with publisher._producers().acquire() as producer:
        _channel_of(producer).connection.__dict__.pop(pipeline._CONFIRMING, None)

    errors = publisher.publish(_messages(app, 3))

    assert [type(error) for error in errors] == [TimeoutError] * 3
    assert publisher.paused
