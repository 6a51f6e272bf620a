"""Publishes many messages in one round trip, and says which are confirmed.

It does so where the broker's transport can.

Beneath ``publisher.py``, which publishes one by one whatever this leaves: a message that is refused
takes its neighbours with it here, and gets an error of its own there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import monotonic

from kombu.entity import maybe_delivery_mode

from .celery_types import App, Fields
from .declarations import entity_of
from .kombu_types import AmqpConnection, Entity, TheProducer, forget_declared
from .message import Message

__all__ = ["CONFIRM_TIMEOUT_SECONDS", "confirmed_together", "entities_of", "publish_arguments"]

logger: logging.Logger = logging.getLogger("celery_alchemy.publisher")

#: Seconds that a broker may take to confirm a message.
CONFIRM_TIMEOUT_SECONDS = 10.0

# Bytes that are collected for one write to the socket: a write for each takes longer than the
# message.
_WRITE_BYTES = 128 * 1024


_CONFIRMING = "celery_alchemy_confirming"


def publish_arguments(message: Message) -> Fields:
    """Return a message as the arguments of ``kombu.Producer.publish``."""
    return {
        "body": message.body,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "exchange": message.exchange,
        "routing_key": message.routing_key_at_publish(),
        "headers": message.headers,
        **message.properties_at_publish(),
    }


def entities_of(app: App, producer: TheProducer, message: Message) -> list[Entity]:
    """Return what must be declared before a message is published.

    That is its queues, or the exchange of an event.

    Redis takes an exchange that was not declared for one without queues, and drops the message in
    silence.
    """
    if message.task_id is None and message.exchange == app.conf.event_exchange:
        # The app has loaded it, to make the event; one that sends none does without.
        from celery.events.event import get_exchange

        return [get_exchange(producer.connection, name=message.exchange)]
    queues = app.amqp.queues
    return [*(queues[name] for name in message.queues), *map(entity_of, message.declare)]


def confirmed_together(app: App, producer: TheProducer, messages: Sequence[Message]) -> set[int]:
    """Publish messages in order, in as few round trips as the transport allows.

    Args:
        app: The Celery app, for its queues.
        producer: A kombu producer that no other thread uses meanwhile.
        messages: The messages.

    Returns:
        The indexes of those that the broker has confirmed; empty when the transport cannot, or when
        it is not known which.

    Raises:
        TimeoutError: The broker did not confirm in time.
    """
    try:
        channel = producer.channel
        if producer.connection.transport.driver_type == "amqp" and hasattr(
            channel, "confirm_select"
        ):
            _declare(app, producer, messages)
            return _confirming(channel.connection).publish(messages)
        if getattr(producer, "supports_batch_publish", False):
            _declare(app, producer, messages)
            with producer.batch(max_size=len(messages)):
                for message in messages:
                    producer.publish(**publish_arguments(message))
            # Redis has answered each command of the pipeline when the block ends without an error.
            return set(range(len(messages)))
    except TimeoutError:
        raise
    except Exception as exc:  # noqa: BLE001 - whatever it was, each message meets it again alone.
        logger.debug("Publishing one by one: %r", exc)
    return set()


def _declare(app: App, producer: TheProducer, messages: Sequence[Message]) -> None:
    # Of the messages that need the same one asks for it.
    needed = {
        (message.task_id is None, message.exchange, *message.queues, repr(message.declare)): message
        for message in messages
    }
    for message in needed.values():
        for entity in entities_of(app, producer, message):
            producer.maybe_declare(entity)


# --- RabbitMQ -------------------------------------------------------------------------------------


class _Collected:
    """Stands in for the transport that py-amqp's frame writer writes to."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


class _ConfirmingChannel:
    """A channel of its own in confirm mode.

    A batch is sent on it before the first confirm is waited for.

    py-amqp waits for the confirm of each message before it sends the next. Its own frame writer is
    used here, on a buffer, so that many messages are one write to the socket.

    Source: https://www.rabbitmq.com/docs/confirms#publisher-confirms: the broker counts a channel's
    messages from 1 in the order of their arrival, ``multiple`` confirms all up to the tag, and a
    return comes before the confirm of its message.

    Args:
        connection: A py-amqp connection that no other thread uses meanwhile.
    """

    def __init__(self, connection: AmqpConnection) -> None:
        from amqp.method_framing import frame_writer

        self._connection = connection
        self._collected = _Collected()
        self._write_frame = frame_writer(connection, self._collected)
        self._channel = connection.channel()
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._on_ack)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)
        self._last_tag = 0
        self._open: set[int] = set()
        self._refused: set[int] = set()
        self._returned = False

    def publish(self, messages: Sequence[Message]) -> set[int]:
        """Publish messages and wait until the broker has answered for each.

        Args:
            messages: The messages.

        Returns:
            The indexes of those that were confirmed.

        Raises:
            TimeoutError: The broker did not answer in time.
            amqp.AMQPError: The connection or the channel was closed.
        """
        first = self._last_tag + 1
        self._last_tag += len(messages)
        self._open = set(range(first, first + len(messages)))
        self._refused, self._returned = set(), False
        try:
            for message in messages:
                self._collect(message)
                if len(self._collected.data) >= _WRITE_BYTES:
                    self._flush()
            self._flush()
            deadline = monotonic() + CONFIRM_TIMEOUT_SECONDS
            while self._open:
                self._channel.connection.drain_events(timeout=max(0.001, deadline - monotonic()))
        except TimeoutError:
            self._connection.collect()
            raise
        except BaseException:
            # What is still under way would be counted among the next batch's.
            self._connection.__dict__.pop(_CONFIRMING, None)
            raise
        if self._returned:
            # A queue is gone. Which message was for it is not said: all are published again, one by
            # one.
            self._forget_declarations()
            return set()
        return {tag - first for tag in range(first, self._last_tag + 1) if tag not in self._refused}

    def _collect(self, message: Message) -> None:
        from amqp import spec
        from amqp.serialization import dumps

        properties = dict(message.properties_at_publish())
        properties["delivery_mode"] = maybe_delivery_mode(properties.get("delivery_mode"))
        priority = properties.pop("priority", 0)
        expiration = properties.pop("expiration", None)
        if expiration is not None:
            properties["expiration"] = str(int(expiration * 1000))
        content = self._channel.prepare_message(
            message.body,
            priority,
            message.content_type,
            message.content_encoding,
            message.headers,
            properties,
        )
        # Without a route a message would be confirmed, and lost.
        arguments = dumps(
            "Bssbb",
            (0, message.exchange, message.routing_key_at_publish(), message.has_route, False),
        )
        self._write_frame(1, self._channel.channel_id, spec.Basic.Publish, arguments, content)

    def _flush(self) -> None:
        data = self._collected.data
        if data:
            transport = self._connection.transport
            with transport.having_timeout(CONFIRM_TIMEOUT_SECONDS):
                transport.write(bytes(data))
            data.clear()

    def _forget_declarations(self) -> None:
        forget_declared(self._connection.client)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._answered(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused |= self._answered(tag, multiple)

    def _answered(self, tag: int, multiple: bool) -> set[int]:
        tags = {t for t in self._open if t <= tag} if multiple else {tag}
        self._open -= tags
        return tags

    def _on_return(self, exc: Exception, exchange: str, routing_key: str, message: object) -> None:
        self._returned = True


def _confirming(connection: AmqpConnection) -> _ConfirmingChannel:
    """Return the channel of a connection; it is kept on the connection, with which it ends."""
    channel: _ConfirmingChannel | None = connection.__dict__.get(_CONFIRMING)
    if channel is None:
        channel = connection.__dict__[_CONFIRMING] = _ConfirmingChannel(connection)
    return channel
