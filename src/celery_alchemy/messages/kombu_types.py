"""What is asked of kombu's and py-amqp's objects, of which their stubs say less than they can.

Beneath the publisher, which borrows a producer from one of kombu's pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

from kombu import Connection, Exchange, Producer, Queue
from kombu.pools import ProducerPool
from kombu.resource import Resource

from .celery_types import Fields

__all__ = [
    "AmqpChannel",
    "AmqpConnection",
    "Entity",
    "Returned",
    "TheProducer",
    "borrowed",
    "close_all",
    "connected",
    "forget_declared",
]


#: What can be declared.
Entity = Exchange | Queue

#: Told of a message that RabbitMQ had no queue for: the error, exchange, routing key and message.
Returned = Callable[[Exception, str, str, object], None]


class AmqpTransport(Protocol):
    """What py-amqp writes to: a socket."""

    def having_timeout(self, timeout: float) -> AbstractContextManager[object]: ...

    def write(self, data: bytes) -> None: ...


class AmqpConnection(Protocol):
    """A connection of py-amqp, as kombu's transport has made it.

    Attributes:
        client: Kombu's connection, for which it was made.
    """

    client: Connection

    @property
    def transport(self) -> AmqpTransport: ...

    def channel(self) -> AmqpChannel: ...

    def collect(self) -> None: ...

    def drain_events(self, timeout: float) -> object: ...


class AmqpChannel(Protocol):
    """A channel of py-amqp.

    Attributes:
        events: Who is told of the broker's answers, by the name of the answer.
    """

    connection: AmqpConnection
    channel_id: int
    events: dict[str, set[Callable[..., None]]]

    def confirm_select(self) -> object: ...

    def prepare_message(
        self,
        body: bytes,
        priority: int,
        content_type: str,
        content_encoding: str,
        headers: Fields,
        properties: Fields,
    ) -> object: ...


class TheProducer(Protocol):
    """A producer of kombu that has its connection, which in the stubs it may not have.

    Attributes:
        channel: Where the messages go; on RabbitMQ an AmqpChannel.
        on_return: Told of returned messages, on each channel that is made while it publishes.
    """

    channel: AmqpChannel
    on_return: Returned | None

    @property
    def connection(self) -> Connection: ...

    def maybe_declare(self, entity: Entity) -> bool: ...

    def revive(self, channel: object) -> None: ...

    # Of kombu 5.7, on Redis.
    def batch(self, max_size: int) -> AbstractContextManager[object]: ...

    def publish(self, **message: object) -> object: ...


def connected(producer: Producer) -> TheProducer:
    """Return a producer as what it is: it was made on a connection."""
    return cast("TheProducer", producer)


@contextmanager
def borrowed(pool: ProducerPool) -> Iterator[TheProducer]:
    """Take a producer out of a pool for a block, waiting for it if all are in use.

    Raises:
        Exception: The broker cannot be reached.
    """
    with pool.acquire(block=True) as producer:
        yield connected(producer)


def close_all(pool: ProducerPool) -> None:
    """Close what a pool holds, its connections too, and whatever is in use of them."""
    # A kombu.resource.Resource as well, which its stubs do not say.
    cast("Resource", pool).force_close_all()
    pool.connections.force_close_all()


def forget_declared(connection: Connection) -> None:
    """Have what is declared on a connection declared again."""
    if connection.declared_entities is not None:
        connection.declared_entities.clear()
